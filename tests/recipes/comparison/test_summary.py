"""Tables and figures of a comparison."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.comparison import append_record, figures, markdown, read_records, summarize, write_csv
from recipes.comparison.summary import plateau


def record(
    task: str, method: str, seed: int, score: float, ranks: tuple[int, ...] = (), only_measured: bool = False
) -> dict[str, Any]:
    measured = {
        "metric": "test/accuracy",
        "score": score,
        "trainable_parameters": 1000,
        "final_parameters": 900 + seed,
        "deployed_parameters": 800 + seed,
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
        "protocol": {"version": 2, "learning_rates": [0.005], "selection_rows": None, "selection_seeds": []},
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
    assert (lalora.score, lalora.spread, lalora.worst) == pytest.approx((56, 32**0.5, 52))
    assert (lalora.pairs, lalora.difference) == (2, pytest.approx(1))
    # Student's t for one degree of freedom, 12.706, times the standard error: sqrt(2) / sqrt(2).
    assert (lalora.low, lalora.high) == pytest.approx((1 - 12.706, 1 + 12.706))
    assert (lalora.total_rank, lalora.ranks, lalora.final_parameters) == (9.5, (3.5, 6), 900.5)
    assert (lora.difference, lora.total_rank) == (0, 16)
    assert (head.pairs, head.difference, head.low) == (1, pytest.approx(-20), None)
    assert (head.spread, head.total_rank) == (None, None)
    assert (alone.pairs, alone.difference) == (0, None)

    text = markdown([lora, lalora, head, alone])
    table = text[text.index("## digits") :].splitlines()
    assert table[:3] == ["## digits", "", "steps 3; shared learning rate 0.005; precision 32-true"]
    assert table[6:9] == [
        "| lora | 800 | 55.0 +- 7.1 | 50.0 |  | 2 | 1,000 | 16.0 | 2.5 | 100 | 0.005 |",
        "| lalora | 800 | 56.0 +- 5.7 | 52.0 | +1.0 (-11.7 to +13.7) | 2 | 1,000 | 9.5 | 2.5 | 100 | 0.005 |",
        "| head | 801 | 40.0 | 40.0 | -20.0 | 1 | 1,000 |  | 3.0 | 100 | 0.005 |",
    ]
    assert table[10] == "## cifar10"
    assert table[16] == "| head | 800 | 30.0 | 30.0 |  | 1 | 1,000 |  | 2.0 | 100 | 0.005 |"


def test_all_tasks_together():
    """The baseline first, with its scores; then the differences to it, where it was run."""
    overview = markdown(summarize(RECORDS)).split("## ")[1].splitlines()
    assert overview[0] == "All tasks"
    assert overview[4:9] == [
        "| method | digits | cifar10 |",
        "| --- | ---: | ---: |",
        "| lora | 55.0 +- 7.1 |  |",
        "| lalora | +1.0 (-11.7 to +13.7) |  |",
        "| head | -20.0 |  |",
    ]
    assert "All tasks" not in markdown(summarize(RECORDS[:4]))
    longer = [{**r, "task_settings": {"steps": 9}} for r in RECORDS[:1]]
    text = markdown(summarize([*RECORDS[:2], *longer]))
    assert "| method | digits | digits-2 |" in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["All tasks", "digits", "digits-2"]


def test_another_baseline():
    lora, lalora, *_ = summarize(RECORDS, baseline="lalora")
    assert (lora.difference, lalora.difference) == (pytest.approx(-1), 0)
    table = markdown([lora, lalora], baseline="lalora").splitlines()
    assert "difference to lalora (95% interval)" in table[4]
    assert (
        table[6] == "| lora | 800 | 55.0 +- 7.1 | 50.0 | -1.0 (-13.7 to +11.7) | 2 | 1,000 | 16.0 | 2.5 | 100 | 0.005 |"
    )


def test_scores_by_learning_rate():
    protocol = {"version": 2, "learning_rates": [0.005, 0.01], "selection_rows": "held out", "selection_seeds": [8, 9]}
    chosen = {"protocol": protocol, "selection_scores": {"0.005": [0.5, 0.6], "0.01": [0.2, 0.4]}}
    failed = {"protocol": protocol, "selection_scores": {"0.005": [0.5, 0.7], "0.01": [0.7, 0.49], "0.02": [None, 0.8]}}
    rows = summarize([{**RECORDS[0], **chosen}, {**RECORDS[1], **failed}])
    assert rows[0].selection_scores == pytest.approx({0.005: 55, 0.01: 30})
    table = markdown(rows).splitlines()
    assert table[2].split("; ")[1] == "learning rate of each method chosen among 0.005, 0.01 and beyond"
    assert table[9:] == [
        "Mean accuracy on the held-out training rows (2 seeds) by learning rate; the plateau is the range within 2 "
        "points of the best",
        "",
        "| method | 0.005 | 0.01 | 0.02 | plateau |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| lora | **55.0** | 30.0 |  | 0.005 to 0.005 |",
        "| lalora | **60.0** | 59.5 | nan | 0.005 to 0.01 |",
    ]


def test_runs_of_the_first_protocol(tmp_path: Path):
    """Which did not record deployed parameters, and chose rates on the test rows."""
    new = {"protocol", "deployed_parameters"}
    old = [{k: v for k, v in r.items() if k not in new} | {"learning_rates": [0.003, 0.005]} for r in RECORDS[:2]]
    for r in old:
        append_record(tmp_path / "a.jsonl", r)
    table = markdown(summarize(read_records(tmp_path / "a.jsonl"))).splitlines()
    assert table[2] == "steps 3; learning rate of each method searched over 0.003, 0.005; precision 32-true"
    assert table[4].startswith("| method | final parameters | accuracy |")
    assert table[6] == "| lora | 900 | 50.0 | 50.0 |  | 1 | 1,000 | 16.0 | 2.0 | 100 | 0.005 |"


def test_ranks_are_averaged_by_name():
    """A layer that one run leaves out has rank 0 there."""
    first, second = ({**r, "ranks": ranks} for r, ranks in zip(RECORDS[:2], ({"a": 2, "b": 4}, {"b": 2}), strict=True))
    second |= {"method": first["method"], "settings": first["settings"], "seed": 9}
    (row,) = summarize([first, second])
    assert (row.ranks, row.total_rank) == ((1, 3), 4)


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


@pytest.mark.parametrize("failed", [0.001, 0.002, 0.008])
def test_a_learning_rate_whose_runs_failed_is_on_no_plateau(failed: float):
    scores = {0.001: 91.0, 0.002: 91.0, 0.004: 92.0, 0.008: 91.0, failed: math.nan}
    expected = {0.001: (0.002, 0.008), 0.002: (0.004, 0.008), 0.008: (0.001, 0.004)}
    assert plateau(scores) == expected[failed]


def test_a_score_that_is_no_number_stops_no_table(tmp_path: Path):
    """As Pearson's of predictions that are all the same."""
    rows = summarize([*RECORDS[:3], record("digits", "lalora", 1, math.nan, (4, 7))])
    assert "| lalora | 800 | nan +- nan | nan | +nan (+nan to +nan) | 2 |" in markdown(rows)
    figures(rows)["digits"].savefig(tmp_path / "a.png")
