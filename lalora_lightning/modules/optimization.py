"""The optimizer and learning rate schedule of all task modules."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["adamw_with_linear_decay", "parameter_groups"]


def adamw_with_linear_decay(
    module: LightningModule, learning_rate: float, weight_decay: float, warmup: float
) -> OptimizerLRSchedulerConfig:
    """Return AdamW over the trainable parameters, with linear warmup and linear decay to zero.

    Args:
        module: A module that is attached to a Trainer, which provides the length of the run.
        learning_rate: Peak of the schedule.
        weight_decay: Applied to matrices only; biases and the parameters of norms are vectors.
        warmup: Fraction of the run's optimizer steps during which the rate rises from zero, in [0, 1).

    Raises:
        ValueError: The length of the run is unknown.
    """
    steps = module.trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise ValueError(
            "Expected a run of known length for a linear decay but it has none; set max_steps or max_epochs."
        )
    warmup_steps = int(warmup * steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (steps - step) / max(1, steps - warmup_steps))

    optimizer = AdamW(parameter_groups(module, weight_decay), lr=learning_rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the trainable parameters in two groups: matrices with weight decay, vectors without."""
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for p in module.parameters():
        if p.requires_grad:
            groups[weight_decay if p.ndim > 1 else 0.0].append(p)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
