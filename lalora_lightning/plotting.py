"""Pictures of runs and of scores. matplotlib is imported when a function is called.

Every function gives a matplotlib Figure that is not attached to pyplot: ``figure.savefig("ranks.png")``. Those of one
run take a :class:`lalora_lightning.runs.Run`, a folder of logs or a checkpoint. Colours are viridis and those of Okabe
and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lalora_lightning.names import common_prefix as shared_parts
from lalora_lightning.runs import Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Source = Run | str | os.PathLike[str]

_MOST_LABELS = 24
_LONGEST_PREFIX = 24
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def plot_rank_trajectories(source: Source) -> Figure:
    """Rank of every layer over training as a heat map, above the total rank and the budget."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    run = read_run(source)
    layers = len(run.layer_names)
    figure = Figure(figsize=(7, min(9.0, 3.2 + 0.18 * layers)), layout="constrained")
    heat, total = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [max(1.5, min(5.0, 0.12 * layers)), 1]}
    )
    # Each reading holds until the next one, so its column spans that far.
    last = run.steps[-1] if len(run.steps) == 1 else 2 * run.steps[-1] - run.steps[-2]
    edges = [*run.steps, max(last, run.steps[-1] + 1)]
    columns = [list(column) for column in zip(*run.ranks, strict=True)]
    mesh = heat.pcolormesh(edges, range(layers + 1), columns, cmap="viridis", vmin=1, vmax=run.max_rank)
    figure.colorbar(mesh, ax=heat, label="rank", ticks=MaxNLocator(integer=True), pad=0.01)
    _name_layers(heat.yaxis, run.layer_names, offset=0.5)
    heat.invert_yaxis()
    _draw_budget(total, run)
    return figure


def plot_rank_lines(source: Source) -> Figure:
    """Rank of every layer over training, one line each; equal ranks are set apart by up to a third of a rank."""
    run = read_run(source)
    layers = len(run.layer_names)
    shifts = [0.0 if layers == 1 else 0.66 * i / (layers - 1) - 0.33 for i in range(layers)]
    shifted = [[rank + shift for rank, shift in zip(row, shifts, strict=True)] for row in run.ranks]
    figure, axes = _lines_by_depth(run.steps, shifted, run.layer_names, drawstyle="steps-post")
    axes.set_ylabel("rank (equal ranks set apart)" if layers > 1 else "rank")
    axes.set_ylim(0.5, run.max_rank + 0.5)
    return figure


def plot_budget(source: Source) -> Figure:
    """Total rank and budget over training, below LoRA's total rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    _draw_budget(figure.subplots(), read_run(source))
    return figure


def plot_final_ranks(sources: Mapping[str, Source]) -> Figure:
    """Final rank of every layer as bars, one panel a data set (the paper's Fig. 5).

    Args:
        sources: Runs by the name of their data set; all of one model.

    Raises:
        ValueError: The runs are of different layers.
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
        total, full = sum(run.ranks[-1]), len(names) * run.max_rank
        axes.set_title(f"{name}: total rank {total} of LoRA's {full} ({total / full:.0%})", fontsize="medium")
    _name_layers(panels[-1].xaxis, names)
    return figure


def plot_sparsity(source: Source) -> Figure:
    """Sparsity (Eq. 1) of every layer's increment over training, one line each (Fig. 1).

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
    """Final rank of every layer above its increment's final sparsity (Fig. 4).

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
    below.bar(range(len(final)), final, color=_ORANGE)
    below.set_ylabel("sparsity, %")
    _name_layers(below.xaxis, run.layer_names)
    return figure


def plot_gamma(scores: Mapping[str, Mapping[float, Sequence[float]]], score: str) -> Figure:
    """Score over gamma, one line a data set (Fig. 3).

    Args:
        scores: ``{data set: {gamma: scores of the seeds}}``; :func:`lalora_lightning.runs.final_scores_by` gives
            the inner one. Lines go through the means; bars are 95% intervals of the mean, with two or more seeds.
        score: Name and unit of the score, for the axis.
    """
    figure, axes = _score_lines(scores, score)
    axes.set_xlabel("gamma")
    return figure


def plot_parameter_budget(scores: Mapping[str, Mapping[float, Sequence[float]]], score: str) -> Figure:
    """Score over trainable parameters, one line a method (Fig. 6).

    Args:
        scores: ``{method: {trainable parameters: scores of the seeds}}``, drawn as by :func:`plot_gamma`.
        score: Name and unit of the score, for the axis.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = _score_lines(scores, score)
    axes.set_xlabel("trainable parameters")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def plot_comparison(scores: Mapping[str, Sequence[float]], score: str) -> Figure:
    """Methods side by side: every seed as a dot, the mean and its 95% interval.

    Args:
        scores: ``{method: scores of the seeds}``, drawn from top to bottom.
        score: Name and unit of the score, for the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.1 + 0.4 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(scores.values()):
        label = row == 0
        axes.plot(values, [row + 0.16] * len(values), ".", color="0.5", label="one seed" if label else None)
        axes.errorbar(
            statistics.mean(values),
            row - 0.08,
            xerr=confidence(values),
            fmt="o",
            color=_BLUE,
            capsize=4,
            label="mean and its 95% interval" if label else None,
        )
    # Settings after a method's name make long names.
    axes.set_yticks(
        range(len(scores)),
        ["\n".join(textwrap.wrap(name.replace(",", ", "), 40, break_long_words=False)) for name in scores],
    )
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel(score)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(fontsize="small", loc="outside upper center", ncols=2, frameon=False)
    return figure


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample of two and more; NaN, at which ``statistics`` fails, where a value is none.

    >>> deviation([1.0, 2.0, 3.0]), deviation([1.0, math.nan])
    (1.0, nan)
    """
    return math.nan if any(map(math.isnan, values)) else statistics.stdev(values)


def confidence(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean, by Student's t; 0 for a single value.

    >>> round(confidence([1.0, 2.0, 3.0]), 2)
    2.48
    """
    if len(values) < 2:
        return 0.0
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    freedom = len(values) - 1
    # Above 10 degrees of freedom the first terms of the expansion around the normal quantile are as exact.
    z = 1.96
    t = quantiles[freedom - 1] if freedom <= 10 else z + (z**3 + z) / (4 * freedom) + 0.0233 * (11 / freedom) ** 2
    return t * deviation(values) / math.sqrt(len(values))


def _draw_budget(axes: Axes, run: Run) -> None:
    full = len(run.layer_names) * run.max_rank
    axes.step(run.steps, [sum(row) for row in run.ranks], where="post", color=_BLUE, label="total rank")
    axes.plot(run.steps, run.budgets, linestyle="--", color=_ORANGE, label="budget")
    axes.axhline(full, color="0.6", linewidth=0.8, label=f"LoRA at rank {run.max_rank}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("rank, all layers")
    axes.set_ylim(0, 1.08 * full)
    _legend_above(axes)


def _draw_ranks(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.bar(range(len(run.layer_names)), run.ranks[-1], color=_BLUE)
    axes.axhline(run.max_rank, color="0.6", linewidth=0.8)
    axes.set_ylabel("rank")
    axes.set_ylim(0, 1.08 * run.max_rank)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _lines_by_depth(
    steps: Sequence[int], rows: Sequence[Sequence[float]], layer_names: Sequence[str], drawstyle: str = "default"
) -> tuple[Figure, Axes]:
    """One line a layer over the steps, coloured by depth, with a colour bar that names the layers."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    layers = len(layer_names)
    # Without viridis's end, which is too light for lines on white.
    colours = [colormaps["viridis"](0.88 * i / max(layers - 1, 1)) for i in range(layers)]
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    marker = "." if len(steps) == 1 else ""
    for colour, line in zip(colours, zip(*rows, strict=True), strict=True):
        axes.plot(steps, line, color=colour, drawstyle=drawstyle, linewidth=1.4 if layers <= 24 else 0.8, marker=marker)
    norm = BoundaryNorm([i - 0.5 for i in range(layers + 1)], layers)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=axes, pad=0.02)
    bar.minorticks_off()
    _name_layers(bar.ax.yaxis, layer_names)
    bar.ax.invert_yaxis()
    axes.set_xlabel("optimizer step")
    return figure, axes


def _score_lines(scores: Mapping[str, Mapping[float, Sequence[float]]], score: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, by_x) in enumerate(scores.items()):
        xs = sorted(by_x)
        axes.errorbar(
            xs,
            [statistics.mean(by_x[x]) for x in xs],
            yerr=[confidence(by_x[x]) for x in xs],
            label=name,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            capsize=3,
        )
    axes.set_ylabel(score)
    axes.grid(axis="y", color="0.9")
    _legend_above(axes)
    return figure, axes


def _legend_above(axes: Axes) -> None:
    """Above the axes, whose lines may run anywhere."""
    columns = min(4, len(axes.get_legend_handles_labels()[1]))
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def _name_layers(axis: Axis, layer_names: Sequence[str], offset: float = 0.0) -> None:
    """Ticks with the layers' names, without what they share at the front, and not so many that they overlap."""
    from matplotlib.axis import XAxis

    layers = len(layer_names)
    shared = shared_parts(layer_names) if layers > 1 else []
    labels = [".".join(name.split(".")[len(shared) :]) or name for name in layer_names]
    stride = -(-layers // _MOST_LABELS)
    axis.set_ticks([i + offset for i in range(0, layers, stride)], labels=labels[::stride])
    prefix = ".".join(shared)
    if len(prefix) > _LONGEST_PREFIX:
        prefix = "..." + prefix[-_LONGEST_PREFIX:].partition(".")[2]
    axis.set_label_text(f"layer ({prefix}.*)" if prefix else "layer")
    if isinstance(axis, XAxis) and max(map(len, labels)) > 3:
        axis.set_tick_params(rotation=90)


def _require_sparsity(run: Run) -> Mapping[int, Sequence[float]]:
    if not run.sparsity:
        raise ValueError(
            "Expected a run with sparsities but it has none; train with LaLoraCallback(log_sparsity=True), which logs "
            "sparsity/<layer>."
        )
    return run.sparsity
