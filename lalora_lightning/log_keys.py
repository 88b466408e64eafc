"""The keys of logged ranks and costs, for the code that writes logs and the code that reads them."""

from collections.abc import Sequence

__all__ = [
    "ENERGY_KEPT",
    "FIT_PREFIX",
    "PEAK_MEMORY",
    "RANK_BUDGET",
    "RANK_MAP",
    "RANK_PARAMETERS",
    "RANK_PREFIX",
    "RANK_TOTAL",
    "RANK_TRAJECTORIES",
    "SECONDS",
    "SETTINGS_PREFIX",
    "SPARSITY_PREFIX",
    "rank_key",
    "rank_metrics",
    "sparsity_key",
]

RANK_PREFIX = "rank/"
"""Prefix of the key of a layer's current rank."""

RANK_TOTAL = "rank/total"
"""Sum of the ranks of all layers."""

RANK_BUDGET = "rank/budget"
"""The budget (Eq. 5), a number of ranks."""

RANK_PARAMETERS = "rank/parameters"
"""Parameters of all adapters at their current ranks; logged if a rank costs more in some layers than in others."""

RANK_TRAJECTORIES = "rank/trajectories"
"""The heat map of ranks, an image."""

SPARSITY_PREFIX = "sparsity/"
"""Prefix of the key of the sparsity of a layer's increment (Eq. 1), in [0, 1]."""

RANK_MAP = "rank/map"
"""The final ranks of blocks by kind of projection, an image."""

FIT_PREFIX = "fit/"
"""Prefix of the keys that are logged once in a run."""

ENERGY_KEPT = "fit/energy_kept"
"""Share of the energy that was kept when the adapters were condensed, in [0, 1]."""

SECONDS = "fit/seconds"
"""Duration of training, in seconds."""

PEAK_MEMORY = "fit/peak_memory_mib"
"""Peak memory of training, in MiB."""

SETTINGS_PREFIX = "lalora"
"""Prefix of the callback's settings in the hyperparameters."""


def rank_key(layer: str) -> str:
    """Return the key of a layer's rank.

    >>> rank_key("encoder.layer.0")
    'rank/encoder.layer.0'
    """
    return RANK_PREFIX + layer


def sparsity_key(layer: str) -> str:
    """Return the key of a layer's sparsity."""
    return SPARSITY_PREFIX + layer


def rank_metrics(
    layers: Sequence[str], ranks: Sequence[int], budget: float, costs: Sequence[int] = ()
) -> dict[str, float]:
    """Return ranks, their totals and the budget by their log keys.

    Args:
        layers: Names of the layers.
        ranks: Their ranks.
        budget: A number of ranks.
        costs: Parameters of one rank of each layer.

    >>> rank_metrics(["a", "b"], [1, 3], 4.5)
    {'rank/a': 1.0, 'rank/b': 3.0, 'rank/total': 4.0, 'rank/budget': 4.5}
    """
    metrics = {rank_key(layer): float(rank) for layer, rank in zip(layers, ranks, strict=True)}
    metrics |= {RANK_TOTAL: float(sum(ranks)), RANK_BUDGET: budget}
    if len(set(costs)) > 1:
        metrics[RANK_PARAMETERS] = float(sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)))
    return metrics
