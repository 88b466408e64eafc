"""Checks at the start of fit and in the first steps, so that what is to learn does learn."""

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lalora_lightning.adapters import (
    GradientMonitor,
    disable_input_gradients,
    enable_input_gradients,
    lora_layers,
    require_trainable,
    require_unmerged,
)

__all__ = ["LearningChecks", "require_optimized"]


class LearningChecks:
    """What is checked of the adapters of one run, and what is changed for it in the module and restored after it."""

    def __init__(self) -> None:
        self._gradients: GradientMonitor | None = None
        # Models whose inputs were made to require gradients.
        self._input_gradients: list[nn.Module] = []

    def start_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the adapters and the optimizers when fit starts.

        Raises:
            RuntimeError: Adapters are merged, frozen, or missing in the optimizers.
        """
        require_unmerged(lora_layers(pl_module))
        require_trainable(pl_module)
        require_optimized(trainer, pl_module)
        self._input_gradients = enable_input_gradients(pl_module)

    def start_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the adapters again, since the ``on_fit_start`` of others may have frozen them, and begin to watch.

        Raises:
            RuntimeError: Adapters are frozen.
        """
        require_trainable(pl_module)
        if _optimized_parameters(trainer, pl_module):
            self._gradients = GradientMonitor(pl_module, patience=2 * len(trainer.optimizers))

    def before_optimizer_step(self) -> None:
        """Warn in the first steps if adapters get no gradient."""
        warning = None if self._gradients is None else self._gradients.observe()
        if warning is not None:
            rank_zero_warn(f"La-LoRA: {warning}")

    def end(self) -> None:
        """Restore the module."""
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None
        disable_input_gradients(self._input_gradients)
        self._input_gradients = []


def require_optimized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check that the optimizers contain all trainable parameters of the adapters.

    If a strategy flattens or shards parameters, the optimizers contain other parameters and cannot be checked.

    Raises:
        RuntimeError: Parameters of adapters are missing in the optimizers.
    """
    optimized = _optimized_parameters(trainer, pl_module)
    if not optimized:
        return
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


def _optimized_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> set[int]:
    """Return the ids of the module's parameters that the optimizers contain."""
    optimized = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
    return optimized.intersection(map(id, pl_module.parameters()))
