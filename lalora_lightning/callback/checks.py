"""What is checked when fit starts, so that adapters do learn."""

import lightning.pytorch as pl

from lalora_lightning.adapters import lora_layers

__all__ = ["require_optimized"]


def require_optimized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the optimizers hold all trainable adapter parameters, which would otherwise never change.

    Strategies that flatten or shard parameters give the optimizers others; then nothing can be checked.

    Raises:
        RuntimeError: The optimizers lack some.
    """
    optimized = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
    if not any(id(p) in optimized for p in pl_module.parameters()):
        return
    forgotten = [
        f"{name}.{factor}"
        for name, layer in lora_layers(pl_module).items()
        for factor in ("lora_A", "lora_B")
        if getattr(layer, factor).requires_grad and id(getattr(layer, factor)) not in optimized
    ]
    if forgotten:
        raise RuntimeError(
            f"Expected the optimizers to hold all adapter parameters but they lack {len(forgotten)}, "
            f"{forgotten[0]} the first. Build them in configure_optimizers() from self.parameters()."
        )
