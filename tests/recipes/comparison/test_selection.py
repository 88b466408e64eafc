"""Which learning rates are tried, and which runs come next."""

import math
from typing import Any

import pytest

from recipes.comparison import run_key
from recipes.comparison.selection import (
    HIGHEST_RATE,
    SELECTION_SEEDS,
    best_rate,
    new_protocol,
    next_runs,
    rate_grid,
    rates_to_try,
)

GRID = (0.01, 0.02)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, [0.01, 0.02]),
        ({0.01: [0.5, 0.5]}, [0.02]),
        # The best is at the upper edge, then at the lower one, then neither.
        ({0.01: [0.5, 0.5], 0.02: [0.6, 0.6]}, [0.04]),
        ({0.01: [0.6, 0.6], 0.02: [0.5, 0.5]}, [0.005]),
        ({0.01: [0.5, 0.5], 0.02: [0.6, 0.6], 0.04: [0.6, 0.5]}, []),
        # The mean of the seeds decides: 0.55 to 0.5.
        ({0.01: [0.9, 0.2], 0.02: [0.5, 0.5]}, [0.005]),
        # Equal scores: the lower rate, which is at the edge.
        ({0.01: [0.5, 0.5], 0.02: [0.5, 0.5]}, [0.005]),
        # A run that failed or has no number as its score makes a rate the worst.
        ({0.01: [0.1, 0.1], 0.02: [None, 0.9], 0.04: [math.nan, 0.9], 0.005: [0.0, 0.0]}, []),
        ({0.01: [None, None], 0.02: [math.nan, 0.1]}, []),
    ],
)
def test_rates_to_try(scores: dict[float, list[float | None]], expected: list[float]):
    assert rates_to_try(GRID, scores) == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_a_grid_is_not_extended_without_end(sign: int):
    """Scores that only grow, in one direction."""
    scores: dict[float, list[float | None]] = {}
    while rates := rates_to_try(rate_grid(0.005), scores):
        scores |= {rate: [sign * rate] * 2 for rate in rates}
    assert max(scores) == (0.08 if sign > 0 else 0.02)
    assert HIGHEST_RATE < 2 * 0.08
    assert min(scores) == pytest.approx(0.00125 if sign > 0 else 0.00125 / 2**10)
    assert best_rate(scores) == (max(scores) if sign > 0 else min(scores))


def test_next_runs():
    """Everything that can be done now, for several at a time: the search of one method, the first seed of another."""
    plan: dict[str, Any] = {
        "task": "digits",
        "task_settings": {},
        "protocol": new_protocol(GRID),
        "precision": "32-true",
    }
    plans = [{**plan, "method": name, "settings": {}} for name in ("lora", "head")]

    def titles(outcomes: dict[str, Any]) -> list[tuple[str, float, int]]:
        return [(r["method"], r["learning_rate"], r["seed"]) for r in next_runs(plans, [0, 1], outcomes)]

    first = list(next_runs(plans, [0, 1], {}))
    assert titles({}) == [(m, rate, seed) for m in ("lora", "head") for rate in GRID for seed in SELECTION_SEEDS]
    # LoRA is better at 0.01 than at 0.005 and 0.02.
    lower = [{**run, "learning_rate": 0.005, "searched": 0.005} for run in first[:2]]
    done = {run_key(run): {**run, "score": {0.01: 0.6}.get(run["searched"], 0.5)} for run in (*first[:4], *lower)}
    assert titles(done)[:2] == [("lora", 0.01, 0), ("head", 0.01, 1_000_000)]
    assert titles(done)[-1] == ("lora", 0.01, 1)
    assert len(titles(done)) == 6
    # A run that failed is not tried again.
    first = next(next_runs(plans, [0], done))
    failed = {run_key(first): {**first, "failed": "no luck"}}
    assert titles({**done, **failed})[0] == ("head", 0.01, 1_000_000)
    # With one learning rate there is nothing to choose.
    plans = [{**plan, "method": "lora", "settings": {}, "protocol": new_protocol([0.3])}]
    assert titles({}) == [("lora", 0.3, 0), ("lora", 0.3, 1)]
