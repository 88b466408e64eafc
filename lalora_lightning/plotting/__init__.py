"""Figures of runs and of scores. matplotlib is imported when a function is called.

Every function returns a matplotlib Figure that is not attached to pyplot: ``figure.savefig("ranks.png")``. Figures of a
run accept a :class:`lalora_lightning.runs.Run`, a folder of logs or a checkpoint. The colors are viridis and those of
Okabe and Ito, which color-blind readers can tell apart.
"""

from lalora_lightning.plotting.run_figures import (
    Source,
    plot_budget,
    plot_final_ranks,
    plot_rank_lines,
    plot_rank_map,
    plot_rank_trajectories,
    plot_sparsity,
    plot_sparsity_and_rank,
)
from lalora_lightning.plotting.score_figures import (
    plot_comparison,
    plot_gamma,
    plot_learning_rates,
    plot_parameter_budget,
)

__all__ = [
    "Source",
    "plot_budget",
    "plot_comparison",
    "plot_final_ranks",
    "plot_gamma",
    "plot_learning_rates",
    "plot_parameter_budget",
    "plot_rank_lines",
    "plot_rank_map",
    "plot_rank_trajectories",
    "plot_sparsity",
    "plot_sparsity_and_rank",
]
