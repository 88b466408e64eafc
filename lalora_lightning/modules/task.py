"""What the task modules share: optimizer and schedule, the same for all."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lalora_lightning.modules.optimization import adamw_with_linear_decay


class TaskModule(LightningModule):
    """A LightningModule that trains its trainable parameters as :func:`adamw_with_linear_decay` does.

    Args:
        learning_rate: Peak of the schedule.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run in which the learning rate rises, in [0, 1).

    Raises:
        ValueError: warmup is out of range.
    """

    def __init__(self, learning_rate: float, weight_decay: float, warmup: float) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"Expected warmup to be a fraction of the run in [0, 1) but got {warmup}.")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_with_linear_decay(self, self.learning_rate, self.weight_decay, self.warmup)
