"""Figures of one run: ranks, budget and sparsity."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lalora_lightning.names import blocks_by_kind
from lalora_lightning.plotting.axes import BLUE, ORANGE, legend_above, name_kinds, name_layers
from lalora_lightning.runs import Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Source",
    "plot_budget",
    "plot_final_ranks",
    "plot_rank_lines",
    "plot_rank_map",
    "plot_rank_trajectories",
    "plot_sparsity",
    "plot_sparsity_and_rank",
]

Source = Run | str | os.PathLike[str]
"""A run, a folder of logs or a checkpoint."""


def plot_rank_trajectories(source: Source) -> Figure:
    """Plot the rank of every layer over training as a heat map, and below it the total and the budget.

    Projections of several blocks and kinds are sorted by kind, and by block within a kind.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    run = read_run(source)
    layers = len(run.layer_names)
    layout = blocks_by_kind(run.layer_names)
    order = list(range(layers))
    if layout is not None:
        cells = layout.cells
        order.sort(key=lambda i: (cells[i][1], cells[i][0]))
    # The axis label has to fit next to few layers, too.
    height = max(2.2, min(5.5, 0.18 * layers))
    figure = Figure(figsize=(7, height + 2.4), layout="constrained")
    heat, total = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [height, 1.4]})
    # A rank applies until the next logged step, so the column of a step ends there.
    last = run.steps[-1] if len(run.steps) == 1 else 2 * run.steps[-1] - run.steps[-2]
    edges = [*run.steps, max(last, run.steps[-1] + 1)]
    rows = [[row[i] for row in run.ranks] for i in order]
    lowest = min(1, *map(min, run.ranks))
    mesh = heat.pcolormesh(edges, range(layers + 1), rows, cmap="viridis", vmin=lowest, vmax=run.max_rank)
    figure.colorbar(mesh, ax=heat, label="rank", ticks=MaxNLocator(integer=True), pad=0.01)
    if layout is None:
        name_layers(heat.yaxis, run.layer_names, offset=0.5)
    else:
        name_kinds(heat, layout)
    heat.invert_yaxis()
    _draw_budget(total, run)
    return figure


def plot_rank_lines(source: Source) -> Figure:
    """Plot the rank of every layer over training, one line each; lines are shifted by up to 1/3 rank."""
    run = read_run(source)
    layers = len(run.layer_names)
    shifts = [0.0 if layers == 1 else 0.66 * i / (layers - 1) - 0.33 for i in range(layers)]
    shifted = [[rank + shift for rank, shift in zip(row, shifts, strict=True)] for row in run.ranks]
    figure, axes = _lines_by_depth(run.steps, shifted, run.layer_names, drawstyle="steps-post")
    axes.set_ylabel("rank (lines shifted)" if layers > 1 else "rank")
    axes.set_ylim(0.5, run.max_rank + 0.5)
    return figure


def plot_rank_map(
    names: Sequence[str],
    ranks: Sequence[int],
    outlined: Collection[str] = (),
    title: str | None = None,
) -> Figure:
    """Plot ranks as a map with a row for each block and a column for each kind of projection.

    Args:
        names: Names of the projections.
        ranks: The rank of each.
        outlined: Names of projections to outline.
        title: Title of the figure.

    Raises:
        ValueError: The projections are not of several blocks and several kinds.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    layout = blocks_by_kind(names)
    if layout is None:
        raise ValueError(
            f"Expected projections of several blocks and several kinds but got {', '.join(names[:3])}, ...; use "
            'plot_final_ranks, or group_by="module" in the run.'
        )
    values = np.full((len(layout.blocks), len(layout.kinds)), np.nan)
    values[tuple(zip(*layout.cells, strict=True))] = ranks
    top = max(1, *ranks)

    small = len(layout.blocks) > 16
    row_height = 0.2 if small else 0.45
    figure = Figure(
        figsize=(max(5.0, 1.6 + 0.8 * len(layout.kinds)), 1.4 + row_height * len(layout.blocks)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (row, column), rank, name in zip(layout.cells, ranks, names, strict=True):
        color = "white" if rank > 0.6 * top else "black"
        axes.text(column, row, str(rank), ha="center", va="center", color=color, fontsize=8 if small else 11)
        if name in outlined:
            box = Rectangle((column - 0.44, row - 0.42), 0.88, 0.84, fill=False, edgecolor="#FFB000", linewidth=3)
            # Visible on light and dark cells, also without color.
            box.set_path_effects([withStroke(linewidth=6, foreground="black")])
            axes.add_patch(box)
    axes.set_xticks(range(len(layout.kinds)), layout.kinds)
    if max(map(len, layout.kinds)) > 9:
        axes.set_xticks(range(len(layout.kinds)), layout.kinds, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layout.blocks)), layout.blocks, fontsize=8 if small else 10)
    axes.set_xlabel("projection")
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    # White lines between the cells.
    axes.set_xticks(np.arange(len(layout.kinds) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(layout.blocks) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1 if small else 2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(nbins=8, integer=True), pad=0.02)
    if title is not None:
        axes.set_title(title, fontsize="medium", pad=12)
    return figure


def plot_budget(source: Source) -> Figure:
    """Plot the total rank and the budget over training, and the total rank of LoRA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    _draw_budget(figure.subplots(), read_run(source))
    return figure


def plot_final_ranks(sources: Mapping[str, Source]) -> Figure:
    """Plot the final rank of every layer as bars, one panel per data set (Fig. 5).

    Args:
        sources: Runs of one model by the name of their data set.

    Raises:
        ValueError: The runs have different layers.
    """
    from matplotlib.figure import Figure

    runs = {name: read_run(source) for name, source in sources.items()}
    names = next(iter(runs.values())).layer_names
    for name, run in runs.items():
        if list(run.layer_names) != list(names):
            raise ValueError(
                f"Expected runs of one model, with the layers {names[0]} to {names[-1]}, but {name} has "
                f"{run.layer_names[0]} to {run.layer_names[-1]}."
            )
    figure = Figure(figsize=(7, 0.8 + 1.5 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        _draw_ranks(axes, run)
        unit = "total rank" if run.unit == "rank" else run.unit
        axes.set_title(f"{name}: {unit} {run.describe_total()}", fontsize="medium")
    name_layers(panels[-1].xaxis, names)
    return figure


def plot_sparsity(source: Source) -> Figure:
    """Plot the sparsity (Eq. 1) of every layer's increment over training, one line each (Fig. 1).

    Raises:
        ValueError: The run has no sparsities.
    """
    run = read_run(source)
    sparsity = _require_sparsity(run)
    percent = [[100 * share for share in row] for row in sparsity.values()]
    figure, axes = _lines_by_depth(list(sparsity), percent, run.layer_names)
    axes.set_ylabel("sparsity of the increment, %")
    axes.set_ylim(bottom=0)
    return figure


def plot_sparsity_and_rank(source: Source) -> Figure:
    """Plot the final rank of every layer, and below it the final sparsity of its increment (Fig. 4).

    Raises:
        ValueError: The run has no sparsities.
    """
    from matplotlib.figure import Figure

    run = read_run(source)
    sparsity = _require_sparsity(run)
    final = [100 * share for share in sparsity[max(sparsity)]]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_ranks(above, run)
    below.bar(range(len(final)), final, color=ORANGE)
    below.set_ylabel("sparsity, %")
    below.set_ylim(bottom=0)
    name_layers(below.xaxis, run.layer_names)
    return figure


def _draw_budget(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import EngFormatter

    of_ranks = run.unit == "rank"
    axes.step(run.steps, run.totals, where="post", color=BLUE, label="total rank" if of_ranks else run.unit)
    axes.plot(run.steps, run.total_budgets, linestyle="--", color=ORANGE, label="budget")
    axes.axhline(run.full, color="0.6", linewidth=0.8, label=f"LoRA at rank {run.max_rank}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("rank, all layers" if of_ranks else "parameters")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0, 1.08 * max(run.full, *run.total_budgets))
    legend_above(axes)


def _draw_ranks(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(range(len(run.layer_names)), run.ranks[-1], color=BLUE)
    axes.axhline(run.max_rank, color="0.6", linewidth=0.8)
    axes.set_ylabel("rank")
    axes.set_ylim(0, 1.08 * run.max_rank)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _lines_by_depth(
    steps: Sequence[int], rows: Sequence[Sequence[float]], layer_names: Sequence[str], drawstyle: str = "default"
) -> tuple[Figure, Axes]:
    """Draw one line per layer over the steps, colored by depth, with a color bar of the layers' names."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    layers = len(layer_names)
    # The end of viridis is too light for lines on white.
    colors = [colormaps["viridis"](0.88 * i / max(layers - 1, 1)) for i in range(layers)]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    marker = "." if len(steps) == 1 else ""
    for color, line in zip(colors, zip(*rows, strict=True), strict=True):
        axes.plot(steps, line, color=color, drawstyle=drawstyle, linewidth=1.4 if layers <= 24 else 0.8, marker=marker)
    norm = BoundaryNorm([i - 0.5 for i in range(layers + 1)], layers)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, pad=0.02)
    bar.minorticks_off()
    name_layers(bar.ax.yaxis, layer_names)
    bar.ax.invert_yaxis()
    axes.set_xlabel("optimizer step")
    return figure, axes


def _require_sparsity(run: Run) -> Mapping[int, Sequence[float]]:
    if not run.sparsity:
        raise ValueError(
            "Expected a run with sparsities but it has none; train with LaLoraCallback(log_sparsity=True), which logs "
            "sparsity/<layer>."
        )
    return run.sparsity
