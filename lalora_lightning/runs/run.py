"""Run: the logged values of a training run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Run", "parameter_totals"]


@dataclass(frozen=True)
class Run:
    """Ranks, budget and other logged values of a run, at T steps and for L layers.

    Attributes:
        layer_names: L names.
        max_rank: Maximum rank of a layer; if the logs do not contain it, the highest logged rank.
        steps: T numbers of optimizer steps, increasing, at which the ranks were logged.
        ranks: ``(T, L)``.
        budgets: T budgets (Eq. 5).
        sparsity: ``(L,)`` sparsities (Eq. 1) in [0, 1] by step, if they were logged.
        settings: Hyperparameters, flat: ``{"lalora.gamma": 2.0, ...}``.
        scores: ``(step, value)`` pairs of every other metric.
        summary: Values of the whole run, such as parameters, time, memory and final scores.
        parameters: T numbers of adapter parameters, if a rank is known to cost more in some layers than in others.
        full_parameters: Adapter parameters at the maximum rank, if ``parameters`` are known.
    """

    layer_names: Sequence[str]
    max_rank: int
    steps: Sequence[int]
    ranks: Sequence[Sequence[int]]
    budgets: Sequence[float]
    sparsity: Mapping[int, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    parameters: Sequence[int] = ()
    full_parameters: int = 0

    @property
    def unit(self) -> str:
        """What totals count: ``"adapter parameters"`` if a rank costs more in some layers, else ``"rank"``."""
        return "adapter parameters" if self.parameters else "rank"

    @property
    def total_name(self) -> str:
        """What the total of all layers is called."""
        return "total rank" if self.unit == "rank" else self.unit

    @property
    def totals(self) -> list[int]:
        """The total of all layers at each step, in ranks or parameters."""
        return list(self.parameters) or [sum(row) for row in self.ranks]

    @property
    def total_budgets(self) -> list[float]:
        """The budget at each step, in ranks or parameters."""
        all_ranks = self.max_rank * len(self.layer_names)
        return [budget * self.full / all_ranks for budget in self.budgets]

    @property
    def full(self) -> int:
        """The total if every layer has the maximum rank, as in LoRA."""
        return self.full_parameters or self.max_rank * len(self.layer_names)

    def describe_total(self) -> str:
        """Return the final total as text.

        >>> Run(["a", "b"], 4, [1], [[1, 3]], [4.0]).describe_total()
        "4 of LoRA's 8 (50%)"
        """
        return f"{self.totals[-1]:,} of LoRA's {self.full:,} ({self.totals[-1] / self.full:.0%})"

    def describe_budget(self) -> str:
        """Return the final budget as text.

        >>> Run(["a", "b"], 4, [1], [[1, 3]], [4.0]).describe_budget()
        '4.0'
        """
        return f"{self.total_budgets[-1]:,.{1 if self.unit == 'rank' else 0}f}"


def parameter_totals(ranks: Iterable[Sequence[int]], costs: Sequence[int], max_rank: int) -> dict[str, Any]:
    """Return the arguments of :class:`Run` that count parameters; none if all ranks cost the same.

    Args:
        ranks: ``(T, L)``.
        costs: Parameters of one rank of each layer; empty if they are not known.
        max_rank: Maximum rank of a layer.

    >>> parameter_totals([[1, 1], [2, 1]], [10, 30], 4)
    {'parameters': [40, 50], 'full_parameters': 160}
    """
    if len(set(costs)) < 2:
        return {}
    totals = [sum(rank * cost for rank, cost in zip(row, costs, strict=True)) for row in ranks]
    return {"parameters": totals, "full_parameters": max_rank * sum(costs)}
