"""Figures of the scores of several runs."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lalora_lightning.intervals import confidence
from lalora_lightning.plotting.axes import BLUE, COLORS, MARKERS, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison", "plot_gamma", "plot_learning_rates", "plot_parameter_budget"]


def plot_gamma(scores: Mapping[str, Mapping[float, Sequence[float]]], score: str) -> Figure:
    """Plot a score over gamma, one line per data set (Fig. 3).

    Args:
        scores: ``{data set: {gamma: scores of the seeds}}``. Lines connect the means. Bars are 95% confidence intervals
            of the mean, for two or more seeds.
        score: Name and unit of the score, for the axis.
    """
    figure, axes = _score_lines(scores, score)
    axes.set_xlabel("gamma")
    return figure


def plot_learning_rates(scores: Mapping[str, Mapping[float, float]], score: str) -> Figure:
    """Plot a score over the learning rate, one line per method, with the best rate of each method filled.

    Args:
        scores: ``{method: {learning rate: mean score}}``. A score of NaN, of runs that failed, is left out.
        score: Name and unit of the score, for the axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 3.2 + 0.22 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for i, (name, by_rate) in enumerate(scores.items()):
        rates = sorted(rate for rate in by_rate if not math.isnan(by_rate[rate]))
        color, marker = COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)]
        axes.plot(
            rates, [by_rate[rate] for rate in rates], label=name, color=color, marker=marker, markerfacecolor="white"
        )
        if rates:
            best = max(rates, key=by_rate.__getitem__)
            axes.plot(best, by_rate[best], color=color, marker=marker)
    axes.set_xscale("log")
    tried = sorted({rate for by_rate in scores.values() for rate in by_rate})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(score)
    axes.grid(axis="y", color="0.9")
    # One line for each method, since names with settings are long.
    figure.legend(fontsize="small", loc="outside lower center", ncols=1, frameon=False)
    return figure


def plot_parameter_budget(scores: Mapping[str, Mapping[float, Sequence[float]]], score: str) -> Figure:
    """Plot a score over trainable parameters, one line per method (Fig. 6).

    Args:
        scores: ``{method: {trainable parameters: scores of the seeds}}``, drawn as in :func:`plot_gamma`.
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
    """Plot methods side by side: a dot per seed, the mean and its 95% confidence interval.

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
            color=BLUE,
            capsize=4,
            label="mean and its 95% interval" if label else None,
        )
    # Method names with settings are long.
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
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            capsize=3,
        )
    axes.set_ylabel(score)
    axes.grid(axis="y", color="0.9")
    legend_above(axes)
    return figure, axes
