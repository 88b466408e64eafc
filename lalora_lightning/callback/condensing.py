"""When a run of a Trainer condenses its adapters."""

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lalora_lightning.adapters import Condensation
from lalora_lightning.allocator import RankAllocator, broadcast_from_first, require_condensing

__all__ = ["CondensingSchedule", "steps_of"]


class CondensingSchedule:
    """Condenses the adapters of a run once.

    Args:
        average_rank: As many parameters as LoRA with this rank on the same projections; None to never condense.
        at: Number of optimizer steps (an integer) or fraction of the run (a float) after which to condense.
        min_rank: Minimum rank of a layer.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, average_rank: float | None, at: int | float, min_rank: int) -> None:
        require_condensing(average_rank, at, min_rank)
        self.average_rank, self.at = average_rank, at
        # The allocator's step after which to condense; None before a run.
        self._step: int | None = None

    def start(self, trainer: pl.Trainer, earlier_steps: int) -> None:
        """Set the step of a run.

        Args:
            trainer: The Trainer.
            earlier_steps: The allocator's steps before this run.

        Raises:
            ValueError: A fraction is given and the length of the run is not known.
        """
        self._step = None
        if self.average_rank is not None:
            self._step = earlier_steps + max(1, steps_of(trainer, self.at, "condense_at"))

    def after_step(self, trainer: pl.Trainer, allocator: RankAllocator) -> Condensation | None:
        """Condense if it is time to, and return what was kept."""
        if self.average_rank is None or self._step is None or allocator.condensed or allocator.steps < self._step:
            return None
        agree = broadcast_from_first if trainer.world_size > 1 else None
        condensation = allocator.condense(self.average_rank, trainer.optimizers, agree)
        rank_zero_info(f"La-LoRA: condensed after step {trainer.global_step}: {condensation}")
        return condensation

    def end(self, trainer: pl.Trainer, allocator: RankAllocator | None) -> None:
        """Warn if the run was too short, unless it was a trial of one step."""
        if self.average_rank is None or allocator is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not allocator.condensed:
            rank_zero_warn(
                f"La-LoRA: the adapters were not condensed, because the run ended at step {allocator.steps}, before "
                f"step {self._step}; call condense_lora(module, average_rank={self.average_rank}), or lower "
                "condense_at."
            )


def steps_of(trainer: pl.Trainer, steps: int | float, argument: str) -> int:
    """Return a number of steps or a fraction of the run as a number of steps.

    Raises:
        ValueError: A fraction is given and the length of the run is not known.
    """
    if not isinstance(steps, float):
        return steps
    whole = trainer.estimated_stepping_batches
    if whole == math.inf:
        raise ValueError(
            f"Expected a run of known length for {argument}={steps} but it has none; set max_steps or max_epochs, or "
            f"give {argument} as a number of steps."
        )
    return int(steps * whole)
