"""Run: the logged values of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Run"]


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
