"""Comparisons of methods: which runs are done, which are kept, and which fail."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes import compare, comparison
from recipes.comparison import markdown, read_records, summarize
from recipes.comparison.tasks import TaskSettings
from tests.recipes.comparison.test_summary import record


def run(settings: TaskSettings, output: Path, **arguments: Any) -> list[dict[str, Any]]:
    usual = {"tasks": ["digits"], "methods": ["lora", "lalora:gamma=4"], "seeds": [0, 1], "learning_rates": []}
    compare.compare(**{**usual, **arguments}, task_settings=settings, output=output)
    return read_records(output)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Label, seed and learning rate of all that is trained."""
    calls = []
    train = compare.train

    def spy(task: Any, plan: dict[str, Any], title: str) -> dict[str, Any]:
        calls.append((comparison.label(plan), plan["seed"], plan["learning_rate"]))
        return train(task, plan, title)

    monkeypatch.setattr(compare, "train", spy)
    return calls


def test_runs_are_kept_and_not_done_again(settings: TaskSettings, tmp_path: Path, trained: list):
    output = tmp_path / "runs" / "digits.jsonl"
    records = run(settings, output)
    rate = 5e-3
    assert trained == [("lora", 0, rate), ("lalora:gamma=4", 0, rate), ("lora", 1, rate), ("lalora:gamma=4", 1, rate)]
    first = records[1]
    assert first["settings"]["gamma"] == 4.0
    assert first["settings"]["growth"] == "matched"
    assert first["steps"] == 3
    assert 0 <= first["score"] <= 1
    # 6 blocks, query and value, rank 8, width 48, 48 x 10 + 10 in the head.
    assert first["trainable_parameters"] == 12 * 8 * 96 + 490
    assert list(first["ranks"]) == [f"model.blocks.{i}" for i in range(6)]
    assert first["total_rank"] == sum(first["ranks"].values()) < 48
    assert first["final_parameters"] == 2 * 96 * first["total_rank"] + 490
    assert records[0]["total_rank"] == 48
    assert first["memory_mib"] > 100
    assert torch.__version__.startswith(first["versions"]["torch"])

    # A run that was cut off while it was written is done again, the others are not.
    output.write_text(output.read_text()[:-40])
    trained.clear()
    again = run(settings, output)
    assert trained == [("lalora:gamma=4", 1, rate)]
    assert again[:3] == records[:3]
    assert {**again[3], "seconds": 0, "memory_mib": 0} == {**records[3], "seconds": 0, "memory_mib": 0}

    trained.clear()
    assert run(settings, output) == again
    assert run(settings, output, methods=["full"], report_only=True) == again
    assert trained == []
    assert output.with_suffix(".md").read_text() == markdown(summarize(again))
    assert len(output.with_suffix(".csv").read_text().splitlines()) == 3


def test_a_learning_rate_is_searched_with_a_seed_held_out(
    settings: TaskSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores = {0.1: float("nan"), 0.2: 0.3, 0.3: 0.2}

    def train(task: Any, plan: dict[str, Any], title: str) -> dict[str, Any]:
        return {"score": scores[plan["learning_rate"]], **made_of(plan)}

    def made_of(plan: dict[str, Any]) -> dict[str, Any]:
        return record("digits", plan["method"], plan["seed"], 0.0, only_measured=True)

    monkeypatch.setattr(compare, "train", train)
    records = run(settings, tmp_path / "a.jsonl", learning_rates=[0.1, 0.2, 0.3], methods=["lora"], seeds=[5, 6])
    assert [(r["searched"], r["seed"]) for r in records[:3]] == [(rate, 1_000_000) for rate in (0.1, 0.2, 0.3)]
    assert [(r["searched"], r["seed"], r["learning_rate"]) for r in records[3:]] == [(None, 5, 0.2), (None, 6, 0.2)]
    (row,) = summarize(records)
    assert (row.seeds, row.learning_rate, row.learning_rates) == (2, 0.2, "[0.1, 0.2, 0.3]")


def test_a_method_that_does_not_apply_is_reported_once_and_skipped(
    settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = run(settings, tmp_path / "a.jsonl", methods=["prefix", "head"], seeds=[0, 1])
    assert [(r["method"], r["seed"]) for r in records] == [("head", 0), ("head", 1)]
    errors = capsys.readouterr().err
    assert "digits, prefix: Method prefix does not apply to this model because" in errors
    assert errors.count("prefix: ") == 1


def test_unknown_tasks_and_methods(settings: TaskSettings, tmp_path: Path):
    with pytest.raises(ValueError, match=r"Expected a task to be one of digits, cifar10, .* but got 'digit'"):
        run(settings, tmp_path / "a.jsonl", tasks=["digit"])
    with pytest.raises(ValueError, match="Expected a method to be one of"):
        run(settings, tmp_path / "a.jsonl", methods=["lorra"])


def test_a_setting_that_a_method_has_got_since_orphans_no_run(settings: TaskSettings, tmp_path: Path, trained: list):
    output = tmp_path / "a.jsonl"
    (before,) = run(settings, output, methods=["lora"], seeds=[0])
    settings_then = {key: value for key, value in before["settings"].items() if key != "use_rslora"}
    output.write_text(json.dumps({**before, "settings": settings_then}) + "\n")
    trained.clear()
    assert run(settings, output, methods=["lora"], seeds=[0]) == [before]
    assert trained == []


def test_a_rate_that_was_searched_is_not_searched_again(settings: TaskSettings, tmp_path: Path, trained: list):
    output = tmp_path / "a.jsonl"
    run(settings, output, methods=["head"], seeds=[0], learning_rates=[1e-3, 1e-2])
    trained.clear()
    run(settings, output, methods=["head"], seeds=[0], learning_rates=[1e-1, 1e-2, 1e-3])
    assert [(seed, rate) for _, seed, rate in trained[:-1]] == [(1_000_000, 1e-1)]


def test_settings_that_do_not_fit_are_reported_and_the_others_go_on(
    settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = run(settings, tmp_path / "a.jsonl", methods=["lora:rank=64", "head"], seeds=[0])
    assert [r["method"] for r in records] == ["head"]
    assert "digits, lora:rank=64, seed 0, learning rate 0.005: Cannot adapt model.blocks.0" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Label, seed and learning rate of all runs; those of LoRA fail with an odd seed and at learning rate 0.2."""
    calls = []

    def train(task: Any, plan: dict[str, Any], title: str) -> dict[str, Any]:
        calls.append((comparison.label(plan), plan["seed"], plan["learning_rate"]))
        if plan["method"] == "lora" and (plan["seed"] % 2 or plan["learning_rate"] == 0.2):
            raise ValueError("no luck")
        return record("digits", plan["method"], plan["seed"], 0.0, only_measured=True) | {"score": 0.5}

    monkeypatch.setattr(compare, "train", train)
    return calls


def test_every_run_that_fails_is_reported_and_the_others_go_on(
    settings: TaskSettings, tmp_path: Path, failing: list, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "a.jsonl"
    failed = compare.compare(["digits"], ["lora", "head"], [0, 1, 2, 3], [0.1], settings, output)
    assert failed == 2
    assert len(failing) == 8
    lines = [line for line in capsys.readouterr().err.splitlines() if "no luck" in line]
    assert lines == [f"digits, lora, seed {seed}, learning rate 0.1: no luck" for seed in (1, 3)]
    assert [(row.method, row.seeds) for row in summarize(read_records(output))] == [("lora", 2), ("head", 4)]
    assert "| lora |" in output.with_suffix(".md").read_text()
    # They are tried again, and only they.
    failing.clear()
    assert compare.compare(["digits"], ["lora", "head"], [0, 1, 2, 3], [0.1], settings, output) == 2
    assert failing == [("lora", 1, 0.1), ("lora", 3, 0.1)]


def test_a_search_that_fails_leaves_a_method_out(
    settings: TaskSettings, tmp_path: Path, failing: list, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "a.jsonl"
    assert compare.compare(["digits"], ["lora", "head"], [0, 2], [0.1, 0.2], settings, output) == 1
    search = compare.SEARCH_SEED
    assert failing[:2] == [("lora", search, 0.1), ("lora", search, 0.2)]
    assert [name for name, *_ in failing[2:]] == ["head"] * 4
    errors = capsys.readouterr().err
    assert f"digits, lora, seed {search}, learning rate 0.2: no luck" in errors
    assert errors.count("digits, lora: skipped, because the search of its learning rate failed.") == 1


@pytest.mark.parametrize(("seeds", "status"), [(["0", "2"], 0), (["0", "1"], 1)])
def test_the_exit_status_tells_of_failures(
    seeds: list[str],
    status: int,
    tmp_path: Path,
    failing: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    task = SimpleNamespace(name="digits", settings={}, learning_rate=0.1)
    monkeypatch.setattr(compare, "build_task", lambda name, settings: task)
    arguments = ["--methods", "lora", "--seeds", *seeds, "--output", f"{tmp_path}/a.jsonl"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    if status:
        with pytest.raises(SystemExit, match=r"^error: 1 run failed"):
            compare.main()
    else:
        compare.main()
    assert "## digits" in capsys.readouterr().out


def test_missing_data_end_the_command_with_the_options_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["--tasks", "cifar10", "--cifar10_path", f"{tmp_path}/none", "--output", f"{tmp_path}/a.jsonl"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    with pytest.raises(SystemExit, match=r"^error: Cannot load the data set") as end:
        compare.main()
    assert "--cifar10_path" in str(end.value).splitlines()[-1]


def test_a_run_without_a_batch_is_no_run(settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = dataclasses.replace(settings, batch_size=5000)
    assert run(settings, tmp_path / "a.jsonl", methods=["head"], seeds=[0]) == []
    assert "at least one batch of training rows but there is none" in capsys.readouterr().err
