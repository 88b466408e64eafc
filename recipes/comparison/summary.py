"""Tables and figures of a comparison: mean scores, differences to a baseline paired by seed, learning rates."""

import csv
import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lalora_lightning.intervals import confidence, deviation
from lalora_lightning.plotting import plot_comparison, plot_learning_rates
from lalora_lightning.tables import markdown_table
from recipes.comparison.records import SAME_COMPARISON, Record, group_records, label

__all__ = ["REFERENCE", "Row", "figures", "markdown", "plateau", "summarize", "write_csv"]

REFERENCE = "lora"
"""Label of the method to which the others are compared by default."""

_PLATEAU = 2.0
"""Learning rates whose score for selection is at most this far below the best, in percent, are called its plateau."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on a task over its seeds. Scores and differences are in percent.

    Attributes:
        task: Name of the task.
        task_settings: Settings of the task, as JSON.
        protocol: What decided on the learning rates, as JSON.
        precision: Precision of the Trainer.
        method: Name and settings of the method.
        metric: Name of the score.
        seeds: Number of runs.
        failed: Seed and reason of each run that failed.
        scores: Score of each run; NaN if it failed.
        score: Mean score.
        spread: Standard deviation of the scores; None for a single run.
        worst: Lowest score; NaN if one of them is NaN.
        trainable_parameters: Trainable parameters during training. As the numbers below, NaN if all runs failed.
        final_parameters: Trainable parameters after cutting the layers to their final ranks, mean.
        deployed_parameters: The same without the head; None if they were not recorded.
        total_rank: Sum of the layers' final ranks, mean; None for methods without ranks.
        ranks: Final rank of each layer, mean.
        seconds: Duration of training, mean.
        memory_mib: Peak memory in training, mean; None if it was not measured.
        learning_rate: The learning rate of the runs.
        selection_scores: Mean score for selection by learning rate; empty if it was not chosen or not recorded.
        pairs: Number of seeds for which the baseline was also run.
        difference: Mean difference to the baseline over these seeds; None without pairs.
        low: Lower end of the 95% interval of the difference by Student's t; None for a single pair.
        high: Upper end of the interval.
    """

    task: str
    task_settings: str
    protocol: str
    precision: str
    method: str
    metric: str
    seeds: int
    failed: tuple[str, ...]
    scores: tuple[float, ...]
    score: float
    spread: float | None
    worst: float
    trainable_parameters: float
    final_parameters: float
    deployed_parameters: float | None
    total_rank: float | None
    ranks: tuple[float, ...]
    seconds: float
    memory_mib: float | None
    learning_rate: float
    selection_scores: dict[float, float]
    pairs: int
    difference: float | None
    low: float | None
    high: float | None


def summarize(records: Iterable[Record], baseline: str = REFERENCE) -> list[Row]:
    """Return a row for each method of each comparison, in the order of their first runs.

    Args:
        records: The runs.
        baseline: Label of the method to which the others are compared.
    """
    rows: list[Row] = []
    for comparison in group_records([r for r in records if r["searched"] is None], SAME_COMPARISON):
        methods = group_records(comparison, ("method", "settings"))
        compared_to = {r["seed"]: _score(r) for runs in methods if label(runs[0]) == baseline for r in runs}
        metric = next((r["metric"] for r in comparison if "failed" not in r), "score")
        rows += [_row(method, metric, compared_to) for method in methods]
    return rows


def markdown(rows: Sequence[Row], baseline: str = REFERENCE) -> str:
    """Return a Markdown section for each comparison, with a table of scores and one of scores by learning rate.

    If there are several, a table of all of them comes first.
    """
    comparisons = _comparisons(rows)
    sections = [_overview(comparisons, baseline)] if len(comparisons) > 1 else []
    for name, comparison in comparisons.items():
        first = comparison[0]
        metric = first.metric.removeprefix("test/")
        settings = ", ".join(f"{key} {value}" for key, value in json.loads(first.task_settings).items())
        deployed = "final parameters" if first.deployed_parameters is None else "deployed parameters"
        header = ["method", deployed, metric, "worst seed", f"difference to {baseline} (95% interval)", "seeds"]
        header += ["trainable parameters", "total rank", "seconds", "memory (MiB)", "learning rate"]
        table = markdown_table(header, [_cells(row, baseline) for row in comparison], left=[0])
        protocol = json.loads(first.protocol)
        sections.append(f"## {name}\n\n{settings}; {_choice(protocol)}; precision {first.precision}\n\n{table}\n")
        if failed := [f"- {row.method}, {reason}" for row in comparison for reason in row.failed]:
            sections.append("\n".join(["Failed:", "", *failed, ""]))
        if any(row.selection_scores for row in comparison):
            seeds = len(protocol["selection_seeds"])
            sections.append(
                f"Mean {metric} on the held-out training rows ({seeds} seeds) by learning rate; the plateau is the "
                f"range within {_PLATEAU:g} points of the best\n\n{_rate_table(comparison)}\n"
            )
    return "\n".join(sections)


def plateau(scores: dict[float, float]) -> tuple[float, float]:
    """Return the lowest and the highest learning rate around the best without a score far below the best.

    A score of NaN, of runs that failed, is below all others.

    >>> plateau({0.001: 80.0, 0.002: 91.0, 0.004: 92.0, 0.008: 85.0, 0.016: 90.5})
    (0.002, 0.004)
    """
    rates = sorted(scores)
    best = max(rates, key=lambda rate: (not math.isnan(scores[rate]), scores[rate]))
    low = high = rates.index(best)
    while low > 0 and scores[rates[low - 1]] >= scores[best] - _PLATEAU:
        low -= 1
    while high + 1 < len(rates) and scores[rates[high + 1]] >= scores[best] - _PLATEAU:
        high += 1
    return rates[low], rates[high]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows with unrounded numbers."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {"scores": row.scores, "ranks": row.ranks}
            lists = {name: " ".join(f"{number:g}" for number in values) for name, values in numbers.items()}
            by_rate = " ".join(f"{rate:g}:{score:g}" for rate, score in row.selection_scores.items())
            writer.writerow({**dataclasses.asdict(row), **lists, "selection_scores": by_rate})


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Return figures of each comparison by its name: its scores and, with ``-rates``, its scores by learning rate."""
    by_name: dict[str, Figure] = {}
    for title, comparison in _comparisons(rows).items():
        name = title.replace("/", "-")
        metric = comparison[0].metric.removeprefix("test/")
        by_name[name] = plot_comparison({row.method: row.scores for row in comparison}, f"{metric}, %")
        if by_rate := {row.method: row.selection_scores for row in comparison if row.selection_scores}:
            by_name[f"{name}-rates"] = plot_learning_rates(by_rate, f"{metric} on held-out rows, %")
    return by_name


def _comparisons(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by what is the same for all runs of a comparison.

    Returns:
        The comparisons by name: that of the task, with a number for further comparisons of this task.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.task_settings, row.protocol, row.precision), []).append(row)
    named: dict[str, list[Row]] = {}
    numbers: Counter[str] = Counter()
    for (task, *_), group in groups.items():
        numbers[task] += 1
        named[task if numbers[task] == 1 else f"{task}-{numbers[task]}"] = group
    return named


def _row(runs: list[Record], metric: str, baseline: dict[int, float]) -> Row:
    done = [run for run in runs if "failed" not in run]
    scores = [_score(run) for run in runs]
    differences = [_score(run) - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    difference = statistics.fmean(differences) if differences else None
    half = confidence(differences) if len(differences) > 1 else None
    ranks = [run["ranks"] for run in done if run["ranks"]]
    layers = dict.fromkeys(layer for run in ranks for layer in run)
    memory = [run["memory_mib"] for run in done if run["memory_mib"] is not None]
    first = runs[0]
    deployed = [run["deployed_parameters"] for run in done if "deployed_parameters" in run]
    selection = {float(rate): _mean(values) for rate, values in first.get("selection_scores", {}).items()}
    return Row(
        task=first["task"],
        task_settings=json.dumps(first["task_settings"]),
        protocol=json.dumps(first["protocol"]),
        precision=first["precision"],
        method=label(first),
        metric=metric,
        seeds=len(runs),
        failed=tuple(f"seed {run['seed']}: {run['failed']}" for run in runs if "failed" in run),
        scores=tuple(scores),
        score=statistics.fmean(scores),
        spread=deviation(scores) if len(scores) > 1 else None,
        worst=math.nan if any(map(math.isnan, scores)) else min(scores),
        trainable_parameters=done[0]["trainable_parameters"] if done else math.nan,
        final_parameters=statistics.fmean(run["final_parameters"] for run in done) if done else math.nan,
        deployed_parameters=statistics.fmean(deployed) if deployed else None if done else math.nan,
        total_rank=statistics.fmean(sum(run.values()) for run in ranks) if ranks else None,
        ranks=tuple(statistics.fmean(run.get(layer, 0) for run in ranks) for layer in layers),
        seconds=statistics.fmean(run["seconds"] for run in done) if done else math.nan,
        memory_mib=statistics.fmean(memory) if memory else None,
        learning_rate=first["learning_rate"],
        selection_scores=selection,
        pairs=len(differences),
        difference=difference,
        low=None if difference is None or half is None else difference - half,
        high=None if difference is None or half is None else difference + half,
    )


def _score(run: Record) -> float:
    """Return the score of a run in percent; NaN if it failed."""
    return 100 * run.get("score", math.nan)


def _mean(scores: Sequence[float | None]) -> float:
    """Return a mean score in percent; NaN if a run failed."""
    return 100 * statistics.fmean(math.nan if score is None else score for score in scores)


def _choice(protocol: Record) -> str:
    """Return what decided on the learning rates as a phrase."""
    rates = protocol["learning_rates"]
    if len(rates) == 1:
        return f"shared learning rate {rates[0]:g}"
    listed = ", ".join(f"{rate:g}" for rate in rates)
    if protocol["version"] == 1:
        return f"learning rate of each method searched over {listed}"
    return f"learning rate of each method chosen among {listed} and beyond"


def _overview(comparisons: Mapping[str, Sequence[Row]], baseline: str) -> str:
    """Return a table of methods by task: the scores of the baseline, and the differences of the other methods to it."""
    methods = dict.fromkeys(row.method for rows in comparisons.values() for row in rows)
    table = []
    for method in sorted(methods, key=lambda method: method != baseline):
        found = [[row for row in rows if row.method == method] for rows in comparisons.values()]
        show = _mean_score if method == baseline else _difference
        table.append([method, *(show(row[0]) if row else "" for row in found)])
    title = f"Scores of {baseline}, and differences of the other methods to it with their 95% intervals"
    return f"## All tasks\n\n{title}\n\n{markdown_table(['method', *comparisons], table, left=[0])}\n"


def _mean_score(row: Row) -> str:
    return f"{row.score:.1f}" + ("" if row.spread is None else f" +- {row.spread:.1f}")


def _difference(row: Row) -> str:
    difference = "" if row.difference is None else f"{row.difference:+.1f}"
    return difference if row.low is None else f"{difference} ({row.low:+.1f} to {row.high:+.1f})"


def _rate_table(rows: Sequence[Row]) -> str:
    rates = sorted({rate for row in rows for rate in row.selection_scores})
    table = []
    for row in rows:
        scores = row.selection_scores
        cells = [f"{scores[rate]:.1f}" if rate in scores else "" for rate in rates]
        if row.learning_rate in rates:
            position = rates.index(row.learning_rate)
            cells[position] = f"**{cells[position]}**"
        low, high = plateau(scores) if scores else (math.nan, math.nan)
        table.append([row.method, *cells, f"{low:g} to {high:g}" if scores else ""])
    return markdown_table(["method", *(f"{rate:g}" for rate in rates), "plateau"], table, left=[0])


def _cells(row: Row, baseline: str) -> list[str]:
    deployed = row.final_parameters if row.deployed_parameters is None else row.deployed_parameters
    return [
        row.method,
        f"{deployed:,.0f}",
        _mean_score(row),
        f"{row.worst:.1f}",
        "" if row.method == baseline else _difference(row),
        str(row.seeds),
        f"{row.trainable_parameters:,}",
        "" if row.total_rank is None else f"{row.total_rank:.1f}",
        f"{row.seconds:.1f}",
        "" if row.memory_mib is None else f"{row.memory_mib:.0f}",
        f"{row.learning_rate:g}",
    ]
