"""Checks at the start of fit."""

import lightning.pytorch as pl

from lalora_lightning.adapters import lora_layers

__all__ = ["optimizers_hold_parameters", "require_optimized"]


def optimizers_hold_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Return whether the optimizers hold parameters of the module.

    Strategies that flatten or shard parameters give the optimizers others; then parameters and gradients of the module
    tell nothing.
    """
    optimized = _optimized(trainer)
    return any(id(p) in optimized for p in pl_module.parameters())


def require_optimized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the optimizers contain all trainable parameters of the adapters.

    Raises:
        RuntimeError: Parameters of adapters are missing in the optimizers.
    """
    if not optimizers_hold_parameters(trainer, pl_module):
        return
    optimized = _optimized(trainer)
    forgotten = [
        f"{name}.{factor}"
        for name, layer in lora_layers(pl_module).items()
        for factor in ("lora_A", "lora_B")
        if getattr(layer, factor).requires_grad and id(getattr(layer, factor)) not in optimized
    ]
    if forgotten:
        raise RuntimeError(
            f"Expected the optimizers to contain all adapter parameters but they lack {len(forgotten)}, "
            f"{forgotten[0]} the first; build them in configure_optimizers() from self.parameters()."
        )


def _optimized(trainer: pl.Trainer) -> set[int]:
    return {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
