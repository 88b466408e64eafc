"""The file of the runs."""

import json
from pathlib import Path

import pytest

from recipes.comparison import append_record, label, read_records, run_key
from recipes.methods import parse_method
from tests.recipes.comparison.test_summary import RECORDS, record

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def test_a_half_written_line_is_no_record(tmp_path: Path):
    path = tmp_path / "runs" / "a.jsonl"
    assert read_records(path) == []
    append_record(path, RECORDS[0])
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    (kept,) = read_records(path)
    assert (kept["method"], kept["seed"], kept["score"]) == ("lora", 0, 0.5)
    append_record(path, RECORDS[1])
    assert path.read_text() == f"{json.dumps(RECORDS[0])}\n{json.dumps(RECORDS[1])}\n"


def test_run_key_is_that_of_the_plan_after_a_round_trip():
    planned = {**RECORDS[0], "settings": {"rank": 8, "alpha": 16.0, "target_modules": ["a"]}, "score": None}
    assert run_key(json.loads(json.dumps(planned))) == run_key(planned)


def test_a_removed_setting_with_its_value_of_today_is_dropped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    for method, value in (("lora", False), ("lalora", False), ("dylora", True), ("lora", True)):
        append_record(path, {**record("digits", method, 0, 0.5), "settings": {"rank": 8, "random_rank": value}})
    assert [label(r) for r in read_records(path)] == ["lora", "lalora", "dylora", "lora:random_rank=true"]


# The planted test has records of its own.
COMPARED = [path for path in sorted(RESULTS.glob("*.jsonl")) if path.stem != "planted"]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_the_published_runs_are_runs_of_todays_methods(path: Path):
    for run in read_records(path):
        method, settings = parse_method(label(run))
        plan = {**run, "settings": {**method.defaults, **settings}}
        assert run_key(plan) == run_key(run)
        assert "random_rank" not in label(run)
