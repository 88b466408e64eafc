"""Models inside of wrappers whose names are not those of the model."""

from torch import nn

__all__ = ["model_itself", "unwrapped"]

# By name, so that Lightning is not imported.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "_FabricModule": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``torch.compile``, DDP, FSDP and Fabric's wrapper."""
    while (attribute := _INNER.get(type(model).__name__)) is not None:
        model = getattr(model, attribute)
    return model


def model_itself(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers, whose layers have the names of the base model.

    Raises:
        ValueError: It is a LightningModule.
    """
    model = unwrapped(model)
    # By name, too.
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        raise ValueError(
            f"Expected the model itself but got the LightningModule {type(model).__name__}, whose layers have "
            "other names than those of the base model; pass the attribute with the model, such as module.model."
        )
    return model
