"""Choosing the learning rate of a method, and which runs of a comparison can be done next.

Each method is trained at all rates of a grid, with two seeds that the compared runs do not use, and scored on training
rows that no run is trained on. If the best rate is at an edge of the grid, the grid is extended by factors of 2 until
it is not. The compared runs then use this rate, and are scored on the test rows.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from recipes.comparison.records import Record, label, run_key

__all__ = [
    "HIGHEST_RATE",
    "LOWEST_RATE",
    "SELECTION_SEEDS",
    "ProtocolError",
    "Scores",
    "best_rate",
    "new_protocol",
    "next_runs",
    "rate_grid",
    "rates_to_try",
    "require_same_protocol",
    "selection",
]

SELECTION_SEEDS = (1_000_000, 1_000_001)
"""Seeds of the runs that choose learning rates; the compared runs do not use them."""

LOWEST_RATE, HIGHEST_RATE = 1e-6, 0.1
"""Grids of learning rates are not extended beyond these."""

Scores = Mapping[float, Sequence[float | None]]
"""The score of each seed for selection, by learning rate; None for a run that failed."""


class ProtocolError(ValueError):
    """The runs of a file cannot be compared with the planned ones."""


def rate_grid(middle: float) -> list[float]:
    """Return five learning rates, a factor of 2 apart.

    >>> rate_grid(0.005)
    [0.00125, 0.0025, 0.005, 0.01, 0.02]
    """
    return [middle * 2.0**power for power in range(-2, 3)]


def new_protocol(rates: Iterable[float]) -> Record:
    """Return what decides on the learning rate, as a part of a record. A single rate is used without a choice."""
    grid = sorted(set(rates))
    chosen = len(grid) > 1
    return {
        "version": 2,
        "learning_rates": grid,
        "selection_rows": "training rows that are held out" if chosen else None,
        "selection_seeds": list(SELECTION_SEEDS) if chosen else [],
    }


def require_same_protocol(records: Iterable[Record], task: str, protocol: Record, backbone: str | None = None) -> None:
    """Check that recorded runs follow a protocol. Only other tasks may have another grid of learning rates.

    Args:
        records: The runs.
        task: Name of the task of the planned runs.
        protocol: What decides on their learning rates.
        backbone: What identifies the weights that the task adapts, if it pretrains them. Records may lack it.

    Raises:
        ProtocolError: A run follows another protocol, or adapts other weights.
    """
    for record in records:
        if record["task"] == task and record.get("backbone", backbone) != backbone:
            raise ProtocolError(
                f"Expected a file of runs that adapt one pretrained backbone, {backbone}, but its runs of {task} adapt "
                f"another one, {record['backbone']}; choose another file, or the --cache of its runs."
            )
        other = {**protocol, "learning_rates": record["protocol"]["learning_rates"]}
        if record["protocol"] not in ([protocol] if record["task"] == task else [other]):
            raise ProtocolError(
                f"Expected a file of runs that follow one protocol, {_describe(protocol)}, but its runs of "
                f"{record['task']} follow another one, {_describe(record['protocol'])}; choose another file."
            )


def best_rate(scores: Scores) -> float | None:
    """Return the learning rate with the highest mean score, the lowest of them if there are several; None without one.

    A rate at which a run failed or has a score of NaN is worse than all others.
    """
    means = {rate: _mean(scores[rate]) for rate in sorted(scores)}
    best = max(means, key=means.__getitem__, default=None)
    return None if best is None or means[best] == -math.inf else best


def rates_to_try(grid: Iterable[float], scores: Scores) -> list[float]:
    """Return the learning rates that have to be tried next, after those with scores.

    Returns:
        The rates of the grid; then one rate at a time, while the best rate is at an edge.

    >>> rates_to_try([0.01, 0.02], {0.01: [0.5], 0.02: [0.6]})
    [0.04]
    """
    missing = [rate for rate in grid if rate not in scores]
    best = best_rate(scores)
    if missing or best is None:
        return missing
    if best == max(scores) and 2 * best <= HIGHEST_RATE:
        return [2 * best]
    if best == min(scores) and best / 2 >= LOWEST_RATE:
        return [best / 2]
    return []


def selection(plan: Record, outcomes: Mapping[str, Record]) -> tuple[Scores, list[Record]]:
    """Return the scores by learning rate so far, and the runs that are needed to go on with the choice.

    Args:
        plan: A method, with everything that identifies a run except for seed and learning rate.
        outcomes: Records of the runs by key; those of failed runs have no score.
    """
    scores: dict[float, Sequence[float | None]] = {}
    seeds = plan["protocol"]["selection_seeds"]
    while seeds and (rates := rates_to_try(plan["protocol"]["learning_rates"], scores)):
        runs = [{**plan, "seed": seed, "searched": rate, "learning_rate": rate} for rate in rates for seed in seeds]
        missing = [run for run in runs if run_key(run) not in outcomes]
        if missing:
            return scores, missing
        for rate in rates:
            scores[rate] = [outcomes[run_key(run)].get("score") for run in runs if run["learning_rate"] == rate]
    return scores, []


def next_runs(plans: Iterable[Record], seeds: Iterable[int], outcomes: Mapping[str, Record]) -> Iterator[Record]:
    """Yield the missing runs that can be done now.

    All plans come with one seed before the next, so that methods can be compared before all seeds are done.

    Args:
        plans: The methods, see :func:`selection`.
        seeds: Seeds of the compared runs.
        outcomes: Records of the runs by key; those of failed runs have no score.

    Raises:
        ProtocolError: Compared runs of a method have another learning rate than the one that is chosen now.
    """
    plans = list(plans)
    choices = [selection(plan, outcomes) for plan in plans]
    for position, seed in enumerate(seeds):
        for plan, (scores, missing) in zip(plans, choices, strict=True):
            if missing:
                yield from missing if position == 0 else ()
                continue
            rate = best_rate(scores) if scores else plan["protocol"]["learning_rates"][0]
            if rate is not None:
                named = {repr(rate): list(values) for rate, values in sorted(scores.items())}
                run = {**plan, "seed": seed, "searched": None, "learning_rate": rate, "selection_scores": named}
                done = outcomes.get(run_key(run))
                if done is None:
                    yield run
                elif done["learning_rate"] != rate:
                    raise ProtocolError(
                        f"Expected runs of {label(run)} to have the learning rate that is chosen now, {rate:g}, but "
                        f"that of seed {seed} has {done['learning_rate']:g}; choose another file."
                    )


def _mean(scores: Sequence[float | None]) -> float:
    numbers = [-math.inf if score is None or math.isnan(score) else score for score in scores]
    return statistics.fmean(numbers)


def _describe(protocol: Record) -> str:
    rates = ", ".join(f"{rate:g}" for rate in protocol["learning_rates"])
    seeds = len(protocol["selection_seeds"])
    chosen = f" chosen on {protocol['selection_rows']} with {seeds} seed{'s' * (seeds != 1)}" if seeds else ""
    return f"version {protocol['version']} with learning rates {rates}{chosen}"
