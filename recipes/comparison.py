"""Runs as records in a file of JSON lines, and what they add up to: tables and paired differences."""

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lalora_lightning.plotting import deviation, plot_comparison
from recipes.methods import METHODS, method_label

Record = dict[str, Any]
# What the differences are taken to.
REFERENCE = "lora"
# Runs that agree in these are compared with each other, and those that agree in all are one run.
_SAME_COMPARISON = ("task", "task_settings", "learning_rates", "precision")
_SAME_RUN = (*_SAME_COMPARISON, "method", "settings", "seed", "searched")


def label(record: Record) -> str:
    """Method and settings of a run as they are written today, whatever the defaults were when it was run."""
    return method_label(METHODS[record["method"]], record["settings"])


def run_key(record: Record) -> str:
    """What tells a run from others; the same for a run that is planned and for its record."""
    return _key(record, _SAME_RUN)


def read_records(path: Path) -> list[Record]:
    """All complete records of a file, none where there is no file; what follows the last line's end is left out.

    A setting that a method has got since has its default: that is how the run was.
    """
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    records = [json.loads(line) for line in complete.splitlines()]
    return [{**r, "settings": {**METHODS[r["method"]].defaults, **r["settings"]}} for r in records]


def append_record(path: Path, record: Record) -> None:
    """Add a record as one line, in place of a half-written line at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on a task over its seeds. Scores and differences are in percent.

    Attributes:
        task: The task.
        task_settings: Its settings as JSON.
        learning_rates: The learning rates searched, or the one that was shared, as JSON.
        precision: Of the Trainer.
        method: Name and settings.
        metric: Name of the score.
        seeds: Number of runs.
        scores: Of each run.
        score: Their mean.
        spread: Their standard deviation; none of a single run.
        trainable_parameters: While training.
        final_parameters: After cutting layers to their final ranks; mean.
        total_rank: Sum of the layers' final ranks, mean; none without ranks.
        ranks: Final rank of each layer, mean.
        seconds: Of training, mean.
        memory_mib: Peak memory while training, mean.
        learning_rate: The one taken.
        pairs: Seeds that the reference was run with, too.
        difference: Mean difference to the reference over them.
        low, high: Ends of the 95% bootstrap interval of the difference; none of a single pair.
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
    memory_mib: float
    learning_rate: float
    pairs: int
    difference: float | None
    low: float | None
    high: float | None


def summarize(records: Iterable[Record]) -> list[Row]:
    """One row for each method of each comparison, in the order in which they were first run."""
    rows = []
    for comparison in _group([r for r in records if r["searched"] is None], _SAME_COMPARISON):
        methods = _group(comparison, ("method", "settings"))
        reference = {r["seed"]: r["score"] for runs in methods if label(runs[0]) == REFERENCE for r in runs}
        rows += [_row(method, reference) for method in methods]
    return rows


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean (Efron and Tibshirani 1993); the same for the same values."""
    numbers = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = numbers[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def markdown(rows: Sequence[Row]) -> str:
    """One table for each comparison."""
    parts = []
    for comparison in _group([dataclasses.asdict(row) for row in rows], _SAME_COMPARISON):
        first = comparison[0]
        settings = ", ".join(f"{key} {value}" for key, value in json.loads(first["task_settings"]).items())
        rates = json.loads(first["learning_rates"])
        rate = f"shared learning rate {rates[0]:g}"
        if len(rates) > 1:
            rate = f"learning rate of each method searched over {', '.join(f'{rate:g}' for rate in rates)}"
        header = ["method", first["metric"].removeprefix("test/"), f"difference to {REFERENCE} (95% interval)", "seeds"]
        header += ["trainable parameters", "final parameters", "total rank", "seconds", "memory (MiB)", "learning rate"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(_cells, comparison)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {first['task']}\n\n{settings}; {rate}; precision {first['precision']}\n\n{table}\n")
    return "\n".join(parts)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, with numbers as they are."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in rows:
            numbers = {"scores": row.scores, "ranks": row.ranks}
            lists = {name: " ".join(f"{number:g}" for number in values) for name, values in numbers.items()}
            writer.writerow({**dataclasses.asdict(row), **lists})


def pictures(rows: Sequence[Row]) -> dict[str, Figure]:
    """One picture of the scores for each comparison, by the task's name, with a number where there are several."""
    figures: dict[str, Figure] = {}
    for comparison in _group([dataclasses.asdict(row) for row in rows], _SAME_COMPARISON):
        name = comparison[0]["task"].replace("/", "-")
        if name in figures:
            name += f"-{sum(other.startswith(name) for other in figures) + 1}"
        metric = comparison[0]["metric"].removeprefix("test/")
        figures[name] = plot_comparison({row["method"]: row["scores"] for row in comparison}, f"{metric}, %")
    return figures


def _row(runs: list[Record], reference: dict[int, float]) -> Row:
    scores = [100 * run["score"] for run in runs]
    differences = [100 * (run["score"] - reference[run["seed"]]) for run in runs if run["seed"] in reference]
    low, high = bootstrap_interval(differences) if len(differences) > 1 else (None, None)
    ranks = [list(run["ranks"].values()) for run in runs]
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
        memory_mib=statistics.mean(run["memory_mib"] for run in runs),
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
        f"{row['memory_mib']:.0f}",
        f"{row['learning_rate']:g}",
    ]


def _group(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record, names), []).append(record)
    return list(groups.values())


def _key(record: Record, names: Sequence[str]) -> str:
    return json.dumps([record[name] for name in names], sort_keys=True)
