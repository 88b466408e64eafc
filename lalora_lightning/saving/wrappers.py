"""Models inside of wrappers whose names are not those of the model."""

from torch import nn

__all__ = ["unwrapped"]

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
