"""AllocationSettings: the settings of the rank allocation."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lalora_lightning.names import GroupBy

__all__ = ["AllocationSettings", "Contribution", "ContributionScale", "Growth"]

Contribution = Literal["norm", "fisher"]
ContributionScale = Literal["relative", "absolute"]
Growth = Literal["matched", "stored"]


@dataclass(frozen=True, kw_only=True)
class AllocationSettings:
    """The arguments of :class:`RankAllocator`.

    Values are checked as far as this does not need a model. ``RankAllocator(model, **vars(settings))`` builds an
    allocator.

    Attributes:
        gamma: How strongly growth of the values increases the budget (Eq. 5). The budget is about
            ``L * (s / s_0) ** gamma``: with 8 it is full when the values have grown by a factor of
            ``r ** (1 / 8)``, which is 1.3 at rank 8. With 0 the budget does not change.
        contribution: ``"norm"`` (Eq. 9) or ``"fisher"``, where the root of the averaged squared gradients replaces the
            norms in Eqs. 9 and 10.
        contribution_scale: ``"relative"`` divides contributions by their mean over layers; ``"absolute"`` does not, as
            in the published equations.
        temperature: Divides the contributions. Values above 1 make the layers' shares more equal, values below 1 less
            equal.
        growth: ``"matched"`` compares values at the same rank; ``"stored"`` compares with the value that was stored
            at the previous rank, as in the published equations.
        gradual_budget: With False, the whole budget is available from the first step (Table 10).
        fidelity: With False, contributions do not contain the fidelities (Table 11).
        average_rank: The maximum of the budget is ``average_rank * L``; by default it is ``max_rank * L``.
        group_by: Which projections share a rank, see :func:`lalora_lightning.names.group_names`.
        min_rank: Minimum rank of a layer, 1 as in the paper, or 0.
        interval: Update the ranks at every ``interval``-th step.
        freeze_after: Number of steps after which ranks and budget stay fixed.

    Raises:
        ValueError: A value is out of range.
    """

    gamma: float = 8.0
    contribution: Contribution = "norm"
    contribution_scale: ContributionScale = "relative"
    temperature: float = 1.0
    growth: Growth = "matched"
    gradual_budget: bool = True
    fidelity: bool = True
    average_rank: float | None = None
    group_by: GroupBy = "block"
    min_rank: int = 1
    interval: int = 1
    freeze_after: int | float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name, kinds in (
            ("contribution", Contribution),
            ("contribution_scale", ContributionScale),
            ("growth", Growth),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"Expected {name} to be one of {get_args(kinds)} but got {getattr(self, name)!r}.")
        if self.contribution == "fisher" and self.contribution_scale == "absolute":
            raise ValueError(
                'Expected contribution_scale="relative" with contribution="fisher", which has the scale of the '
                'gradients, but got "absolute".'
            )
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"Expected gamma to be finite and at least 0 but got {self.gamma}.")
        # Division by smaller numbers could overflow in float32, and one layer would get the whole budget anyway.
        if not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"Expected temperature to be finite and at least 1e-6 but got {self.temperature}.")
        if self.min_rank not in (0, 1):
            raise ValueError(f"Expected min_rank to be 0 or 1 but got {self.min_rank!r}.")
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"Expected interval to be an integer of at least 1 but got {self.interval}.")
        if self.freeze_after is not None and not self.freeze_after >= 0:
            raise ValueError(f"Expected freeze_after to be at least 0 but got {self.freeze_after}.")
