"""TaskModule: the training step, optimizer and schedule of all task modules."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lalora_lightning.modules.optimization import adamw_with_linear_decay

__all__ = ["TaskModule"]


class TaskModule(LightningModule):
    """Base class of the task modules. Subclasses set ``model`` and override :meth:`loss` if it differs.

    Logs ``train/loss``.

    Args:
        learning_rate: Peak of the schedule of :func:`adamw_with_linear_decay`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run during which the learning rate rises, in [0, 1).

    Raises:
        ValueError: ``warmup`` is out of range.
    """

    model: Any

    def __init__(self, learning_rate: float, weight_decay: float, warmup: float) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"Expected warmup to be a fraction of the run in [0, 1) but got {warmup}.")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, a scalar; by default the one that a transformers model returns."""
        return self.model(**batch).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log and return the loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and schedule of :func:`adamw_with_linear_decay`."""
        return adamw_with_linear_decay(self, self.learning_rate, self.weight_decay, self.warmup)
