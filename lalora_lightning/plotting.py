"""Pictures of ranks. matplotlib is imported when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalora_lightning.adapters import shared_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 24


def plot_rank_trajectories(
    steps: Sequence[int],
    ranks: Sequence[Sequence[int]],
    layer_names: Sequence[str],
    budgets: Sequence[float],
    max_rank: int,
) -> Figure:
    """Rank of every layer over training as a heat map, above the total rank and the budget.

    Args:
        steps: Optimizer steps at which the ranks were read, rising, T of them.
        ranks: ``(T, L)``.
        layer_names: L names; what they have in common at the front is left out.
        budgets: T budgets.
        max_rank: Upper end of the colour scale.

    Returns:
        A matplotlib Figure, not attached to pyplot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = len(layer_names)
    figure = Figure(figsize=(7, min(9.0, 3.2 + 0.18 * layers)), layout="constrained")
    heat, total = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [max(1.5, min(5.0, 0.12 * layers)), 1]}
    )

    # Each reading holds until the next one, so its column spans that far.
    last = steps[-1] if len(steps) == 1 else 2 * steps[-1] - steps[-2]
    edges = [*steps, max(last, steps[-1] + 1)]
    columns = [list(column) for column in zip(*ranks, strict=True)]
    mesh = heat.pcolormesh(edges, range(layers + 1), columns, cmap="viridis", vmin=1, vmax=max_rank)
    figure.colorbar(mesh, ax=heat, label="rank", ticks=MaxNLocator(integer=True), pad=0.01)
    shared = shared_parts(layer_names) if layers > 1 else []
    labels = [".".join(name.split(".")[len(shared) :]) or name for name in layer_names]
    stride = -(-layers // _MOST_LABELS)
    heat.set_yticks([i + 0.5 for i in range(0, layers, stride)], labels[::stride])
    heat.invert_yaxis()
    heat.set_ylabel("layer" if not shared else f"layer ({'.'.join(shared)}.*)")

    total.step(steps, [sum(row) for row in ranks], where="post", label="total rank")
    total.plot(steps, budgets, linestyle="--", label="budget")
    total.axhline(layers * max_rank, color="0.6", linewidth=0.8, label=f"LoRA at rank {max_rank}")
    total.set_xlabel("optimizer step")
    total.set_ylabel("rank, all layers")
    total.set_ylim(0, 1.08 * layers * max_rank)
    # Above the lines, which may run anywhere.
    total.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure
