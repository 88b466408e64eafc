"""Tables and figures of a comparison: mean scores, and differences to LoRA paired by seed."""

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lalora_lightning.intervals import bootstrap_interval, deviation
from lalora_lightning.plotting import plot_comparison
from lalora_lightning.tables import markdown_table
from recipes.comparison.records import SAME_COMPARISON, Record, group_records, label

__all__ = ["REFERENCE", "Row", "figures", "markdown", "summarize", "write_csv"]

REFERENCE = "lora"
"""Label of the method to which the others are compared."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on a task over its seeds. Scores and differences are in percent.

    Attributes:
        task: Name of the task.
        task_settings: Settings of the task, as JSON.
        learning_rates: The searched learning rates, or the shared learning rate, as JSON.
        precision: Precision of the Trainer.
        method: Name and settings of the method.
        metric: Name of the score.
        seeds: Number of runs.
        scores: Score of each run.
        score: Mean score.
        spread: Standard deviation of the scores; None for a single run.
        trainable_parameters: Trainable parameters during training.
        final_parameters: Trainable parameters after cutting the layers to their final ranks, mean.
        total_rank: Sum of the layers' final ranks, mean; None for methods without ranks.
        ranks: Final rank of each layer, mean.
        seconds: Duration of training, mean.
        memory_mib: Peak memory in training, mean; None if it was not measured.
        learning_rate: The learning rate of the runs.
        pairs: Number of seeds for which the reference was also run.
        difference: Mean difference to the reference over these seeds; None without pairs.
        low: Lower end of the 95% bootstrap interval of the difference; None for a single pair.
        high: Upper end of the interval.
    """

    task: str
    task_settings: str
    learning_rates: str
    precision: str
    method: str
    metric: str
    seeds: int
    scores: tuple[float, ...]
    score: float
    spread: float | None
    trainable_parameters: int
    final_parameters: float
    total_rank: float | None
    ranks: tuple[float, ...]
    seconds: float
    memory_mib: float | None
    learning_rate: float
    pairs: int
    difference: float | None
    low: float | None
    high: float | None


def summarize(records: Iterable[Record]) -> list[Row]:
    """Return a row for each method of each comparison, in the order of their first runs."""
    rows = []
    for comparison in group_records([r for r in records if r["searched"] is None], SAME_COMPARISON):
        methods = group_records(comparison, ("method", "settings"))
        reference = {r["seed"]: r["score"] for runs in methods if label(runs[0]) == REFERENCE for r in runs}
        rows += [_row(method, reference) for method in methods]
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown section with a table for each comparison."""
    sections = []
    for comparison in group_records([dataclasses.asdict(row) for row in rows], SAME_COMPARISON):
        first = comparison[0]
        settings = ", ".join(f"{key} {value}" for key, value in json.loads(first["task_settings"]).items())
        rates = json.loads(first["learning_rates"])
        rate = f"shared learning rate {rates[0]:g}"
        if len(rates) > 1:
            rate = f"learning rate of each method searched over {', '.join(f'{rate:g}' for rate in rates)}"
        header = ["method", first["metric"].removeprefix("test/"), f"difference to {REFERENCE} (95% interval)", "seeds"]
        header += ["trainable parameters", "final parameters", "total rank", "seconds", "memory (MiB)", "learning rate"]
        table = markdown_table(header, [_cells(row) for row in comparison], left=[0])
        sections.append(f"## {first['task']}\n\n{settings}; {rate}; precision {first['precision']}\n\n{table}\n")
    return "\n".join(sections)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows with unrounded numbers."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {"scores": row.scores, "ranks": row.ranks}
            lists = {name: " ".join(f"{number:g}" for number in values) for name, values in numbers.items()}
            writer.writerow({**dataclasses.asdict(row), **lists})


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Return a figure of the scores of each comparison by task; further ones of a task have a number."""
    by_name: dict[str, Figure] = {}
    for comparison in group_records([dataclasses.asdict(row) for row in rows], SAME_COMPARISON):
        name = comparison[0]["task"].replace("/", "-")
        if name in by_name:
            name += f"-{sum(other.startswith(name) for other in by_name) + 1}"
        metric = comparison[0]["metric"].removeprefix("test/")
        by_name[name] = plot_comparison({row["method"]: row["scores"] for row in comparison}, f"{metric}, %")
    return by_name


def _row(runs: list[Record], reference: dict[int, float]) -> Row:
    scores = [100 * run["score"] for run in runs]
    differences = [100 * (run["score"] - reference[run["seed"]]) for run in runs if run["seed"] in reference]
    low, high = bootstrap_interval(differences) if len(differences) > 1 else (None, None)
    ranks = [list(run["ranks"].values()) for run in runs]
    memory = [run["memory_mib"] for run in runs if run["memory_mib"] is not None]
    first = runs[0]
    return Row(
        task=first["task"],
        task_settings=json.dumps(first["task_settings"]),
        learning_rates=json.dumps(first["learning_rates"]),
        precision=first["precision"],
        method=label(first),
        metric=first["metric"],
        seeds=len(runs),
        scores=tuple(scores),
        score=statistics.mean(scores),
        spread=deviation(scores) if len(scores) > 1 else None,
        trainable_parameters=first["trainable_parameters"],
        final_parameters=statistics.mean(run["final_parameters"] for run in runs),
        total_rank=statistics.mean(map(sum, ranks)) if ranks[0] else None,
        ranks=tuple(statistics.mean(layer) for layer in zip(*ranks, strict=True)),
        seconds=statistics.mean(run["seconds"] for run in runs),
        memory_mib=statistics.mean(memory) if memory else None,
        learning_rate=first["learning_rate"],
        pairs=len(differences),
        difference=statistics.mean(differences) if differences else None,
        low=low,
        high=high,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    difference = "" if row["difference"] is None else f"{row['difference']:+.1f}"
    if row["low"] is not None:
        difference += f" ({row['low']:+.1f} to {row['high']:+.1f})"
    return [
        row["method"],
        f"{row['score']:.1f}" + ("" if row["spread"] is None else f" +- {row['spread']:.1f}"),
        "" if row["method"] == REFERENCE else difference,
        str(row["seeds"]),
        f"{row['trainable_parameters']:,}",
        f"{row['final_parameters']:,.0f}",
        "" if row["total_rank"] is None else f"{row['total_rank']:.1f}",
        f"{row['seconds']:.1f}",
        "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
        f"{row['learning_rate']:g}",
    ]
