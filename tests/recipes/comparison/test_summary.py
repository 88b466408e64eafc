"""Tables and figures of a comparison."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lalora_lightning.intervals import bootstrap_interval
from recipes.comparison import figures, markdown, summarize, write_csv


def record(
    task: str, method: str, seed: int, score: float, ranks: tuple[int, ...] = (), only_measured: bool = False
) -> dict[str, Any]:
    measured = {
        "metric": "test/accuracy",
        "score": score,
        "trainable_parameters": 1000,
        "final_parameters": 900 + seed,
        "ranks": {f"layer.{i}": rank for i, rank in enumerate(ranks)},
        "seconds": 2.0 + seed,
        "memory_mib": 100.0,
    }
    planned = {
        "task": task,
        "task_settings": {"steps": 3},
        "method": method,
        "settings": {},
        "seed": seed,
        "learning_rates": [0.005],
        "learning_rate": 0.005,
        "searched": None,
        "precision": "32-true",
    }
    return {k: v for k, v in measured.items() if k != "score"} if only_measured else {**planned, **measured}


RECORDS = [
    record("digits", "lora", 0, 0.50, (8, 8)),
    record("digits", "lalora", 0, 0.52, (3, 5)),
    record("digits", "lora", 1, 0.60, (8, 8)),
    record("digits", "lalora", 1, 0.60, (4, 7)),
    record("digits", "head", 1, 0.40),
    # Another task, without a reference.
    record("cifar10", "head", 0, 0.30),
]


def test_table():
    lora, lalora, head, alone = summarize(RECORDS)
    # By hand: 52 and 60 have mean 56 and deviation sqrt(2 * 4^2) = 5.66; they are 2 and 0 above LoRA's 50 and 60.
    assert (lalora.score, lalora.spread) == pytest.approx((56, 32**0.5))
    assert (lalora.pairs, lalora.difference) == (2, pytest.approx(1))
    assert (lalora.low, lalora.high) == pytest.approx((0, 2))
    assert (lalora.total_rank, lalora.ranks, lalora.final_parameters) == (9.5, (3.5, 6), 900.5)
    assert (lora.difference, lora.total_rank) == (0, 16)
    assert (head.pairs, head.difference, head.low) == (1, pytest.approx(-20), None)
    assert (head.spread, head.total_rank) == (None, None)
    assert (alone.pairs, alone.difference) == (0, None)

    table = markdown([lora, lalora, head, alone]).splitlines()
    assert table[:3] == ["## digits", "", "steps 3; shared learning rate 0.005; precision 32-true"]
    assert table[6:9] == [
        "| lora | 55.0 +- 7.1 |  | 2 | 1,000 | 900 | 16.0 | 2.5 | 100 | 0.005 |",
        "| lalora | 56.0 +- 5.7 | +1.0 (+0.0 to +2.0) | 2 | 1,000 | 900 | 9.5 | 2.5 | 100 | 0.005 |",
        "| head | 40.0 | -20.0 | 1 | 1,000 | 901 |  | 3.0 | 100 | 0.005 |",
    ]
    assert table[10] == "## cifar10"
    assert table[16] == "| head | 30.0 |  | 1 | 1,000 | 900 |  | 2.0 | 100 | 0.005 |"


def test_csv(tmp_path: Path):
    write_csv(tmp_path / "a.csv", summarize(RECORDS))
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora", "lalora", "head", "head"]
    assert [rows[1][key] for key in ("task", "ranks", "total_rank", "pairs")] == ["digits", "3.5 6", "9.5", "2"]
    assert float(rows[1]["difference"]) == pytest.approx(1)
    assert rows[3]["difference"] == ""


def test_other_settings_of_a_task_are_another_comparison():
    longer = [{**r, "task_settings": {"steps": 9}} for r in RECORDS[:1]]
    rows = summarize([*RECORDS[:2], *longer])
    assert [(row.method, row.task_settings) for row in rows] == [
        ("lora", '{"steps": 3}'),
        ("lalora", '{"steps": 3}'),
        ("lora", '{"steps": 9}'),
    ]


def test_labels_follow_the_defaults_of_today():
    """So that a run at a default that was changed since is told from one at today's."""
    old = {**record("digits", "lalora", 0, 0.5), "settings": {"rank": 8, "gamma": 2.5, "gone": 1}, "label": "lalora"}
    assert [row.method for row in summarize([old])] == ["lalora:gamma=2.5,gone=1"]


def test_a_figure_of_each_comparison():
    longer = [{**entry, "task_settings": {"steps": 9}} for entry in RECORDS[:2]]
    drawn_by_name = figures(summarize([*RECORDS, *longer]))
    assert len(drawn_by_name) == len({(row.task, row.task_settings) for row in summarize([*RECORDS, *longer])})
    assert "digits" in drawn_by_name
    assert "digits-2" in drawn_by_name
    axes = drawn_by_name["digits"].axes[0]
    assert axes.get_yticklabels()[0].get_text() == "lora"
    drawn = sorted(value for line in axes.lines[:1] for value in line.get_xdata())
    own = [100 * r["score"] for r in RECORDS if (r["task"], r["method"], r["searched"]) == ("digits", "lora", None)]
    assert drawn == pytest.approx(sorted(own))


def test_a_score_that_is_no_number_stops_no_table(tmp_path: Path):
    """As Pearson's of predictions that are all the same."""
    rows = summarize([*RECORDS[:3], record("digits", "lalora", 1, math.nan, (4, 7))])
    assert "| lalora | nan +- nan | +nan (+nan to +nan) | 2 |" in markdown(rows)
    figures(rows)["digits"].savefig(tmp_path / "a.png")


def test_bootstrap_interval():
    assert bootstrap_interval([1.5, 1.5, 1.5]) == (1.5, 1.5)
    # The mean of two draws from 0 and 1 is 0, 0.5 or 1 with odds 1 : 2 : 1.
    assert bootstrap_interval([0, 1]) == (0, 1)
    # Of many numbers the interval is nearly that of the normal distribution, 1.96 standard errors to each side.
    numbers = torch.randn(400, dtype=torch.float64)
    low, high = bootstrap_interval(numbers.tolist())
    mean, half = float(numbers.mean()), 1.96 * float(numbers.std()) / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
