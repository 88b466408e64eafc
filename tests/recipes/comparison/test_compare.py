"""Comparisons of methods: which runs are done, which are kept, and which fail."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from recipes import compare, comparison
from recipes.comparison import markdown, read_records, run_key, selection, summarize
from recipes.comparison.selection import SELECTION_SEEDS, ProtocolError, new_protocol, require_same_protocol
from recipes.comparison.tasks import TaskSettings
from tests.recipes.comparison.test_records import RESULTS
from tests.recipes.comparison.test_summary import record


def run(settings: TaskSettings, output: Path, **arguments: Any) -> list[dict[str, Any]]:
    usual = {"tasks": ["digits"], "methods": ["lora", "lalora:gamma=4"], "seeds": [0, 1], "learning_rates": [5e-3]}
    compare.compare(**{**usual, **arguments}, task_settings=settings, output=output)
    return read_records(output)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Label, seed and learning rate of all that is trained."""
    calls = []
    train = compare.train

    def spy(task: Any, plan: dict[str, Any], progress_bar: bool) -> dict[str, Any]:
        calls.append((comparison.label(plan), plan["seed"], plan["learning_rate"]))
        return train(task, plan, progress_bar)

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
    assert first["deployed_parameters"] == 2 * 96 * first["total_rank"]
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


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[float, float | Exception]:
    """What training at a learning rate results in: by default a score of 0.5."""
    by_rate: dict[float, float | Exception] = {}

    def train(task: Any, plan: dict[str, Any], progress_bar: bool) -> dict[str, Any]:
        score = by_rate.get(plan["learning_rate"], 0.5)
        if isinstance(score, Exception):
            raise score
        return record("digits", plan["method"], plan["seed"], 0.0, only_measured=True) | {"score": score}

    monkeypatch.setattr(compare, "train", train)
    return by_rate


def test_a_learning_rate_is_chosen_with_two_seeds_on_held_out_rows(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception]
):
    scores |= {0.01: float("nan"), 0.02: 0.3, 0.03: 0.2}
    records = run(settings, tmp_path / "a.jsonl", learning_rates=[0.03, 0.01, 0.02], methods=["lora"], seeds=[5, 6])
    chosen_by = [(rate, seed) for rate in (0.01, 0.02, 0.03) for seed in SELECTION_SEEDS]
    assert [(r["searched"], r["seed"]) for r in records[:6]] == chosen_by
    assert [(r["searched"], r["seed"], r["learning_rate"]) for r in records[6:]] == [(None, 5, 0.02), (None, 6, 0.02)]
    # The records say what chose the rate.
    assert records[6]["protocol"] == {
        "version": 2,
        "learning_rates": [0.01, 0.02, 0.03],
        "selection_rows": "training rows that are held out",
        "selection_seeds": [1_000_000, 1_000_001],
    }
    assert str(records[6]["selection_scores"]) == "{'0.01': [nan, nan], '0.02': [0.3, 0.3], '0.03': [0.2, 0.2]}"
    # scikit-learn's digits: 1198 rows to train on, of which a fifth chooses the rate, and 599 to test on.
    sizes = {"steps": 3, "batch_size": 16, "train_rows": 958, "selection_rows": 240, "test_rows": 599}
    assert records[6]["task_settings"] == sizes
    (row,) = summarize(records)
    assert (row.seeds, row.learning_rate) == (2, 0.02)
    assert row.selection_scores == pytest.approx({0.01: float("nan"), 0.02: 30, 0.03: 20}, nan_ok=True)


def test_a_grid_is_extended_while_the_best_rate_is_at_its_edge(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception]
):
    scores |= {0.01: 0.1, 0.02: 0.2, 0.04: 0.3, 0.08: 0.25}
    records = run(settings, tmp_path / "a.jsonl", learning_rates=[0.01, 0.02], methods=["lora"], seeds=[0])
    assert [r["searched"] for r in records[::2]] == [0.01, 0.02, 0.04, 0.08, None]
    assert records[-1]["learning_rate"] == 0.04
    # The grid that was asked for identifies the protocol: it has the same runs the next time.
    assert run(settings, tmp_path / "a.jsonl", learning_rates=[0.01, 0.02], methods=["lora"], seeds=[0]) == records


def test_a_rate_at_which_training_fails_is_the_worst(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception], capsys: pytest.CaptureFixture[str]
):
    scores |= {0.01: 0.1, 0.02: 0.2, 0.04: ValueError("diverged")}
    arguments = {"tasks": ["digits"], "methods": ["lora"], "seeds": [0], "learning_rates": [0.01, 0.02]}
    output = tmp_path / "a.jsonl"
    assert compare.compare(**arguments, task_settings=settings, output=output) == 0
    records = read_records(output)
    assert records[-1]["learning_rate"] == 0.02
    assert records[-1]["selection_scores"]["0.04"] == [None, None]
    assert "digits, lora, learning rate 0.04, seed 1000000: diverged" in capsys.readouterr().err


def test_runs_of_another_protocol_are_not_added(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception]
):
    scores |= {0.02: 0.6}
    output = tmp_path / "a.jsonl"
    grid = [0.01, 0.02, 0.04]
    recorded = run(settings, output, methods=["lora"], seeds=[0], learning_rates=grid)
    for rates in ([0.01], [0.01, 0.02]):
        with pytest.raises(ProtocolError, match=r"rates 0.01.* runs of digits follow another one, .*0.01, 0.02, 0.04"):
            run(settings, output, methods=["lora"], seeds=[1], learning_rates=rates)
    assert read_records(output) == recorded
    old = tmp_path / "digits.jsonl"
    old.write_bytes((RESULTS / "digits.jsonl").read_bytes())
    with pytest.raises(ProtocolError, match=r"version 2 .*version 1 "):
        run(settings, old, seeds=[0], learning_rates=grid)
    # They can still be read.
    assert len(run(settings, old, report_only=True)) == 299
    # Another task may have another grid.
    other = [{**r, "task": "cifar10"} for r in recorded]
    require_same_protocol(other, "digits", new_protocol([0.1, 0.2]))


def test_several_runs_at_a_time_are_the_same_runs(settings: TaskSettings, tmp_path: Path):
    arguments = {"methods": ["head"], "seeds": [0, 1], "learning_rates": [0.01, 0.02]}
    several, one = (run(settings, tmp_path / f"{jobs}.jsonl", jobs=jobs, **arguments) for jobs in (2, 1))
    score = {run_key(r): (r["score"], r["learning_rate"]) for r in one}
    assert {run_key(r): (r["score"], r["learning_rate"]) for r in several} == score
    assert {r["device"].split(", ")[1] for r in several} == {"1 threads"}


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


def test_settings_that_do_not_fit_are_reported_and_the_others_go_on(
    settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = run(settings, tmp_path / "a.jsonl", methods=["lora:rank=64", "head"], seeds=[0])
    assert [r["method"] for r in records if "failed" not in r] == ["head"]
    assert "digits, lora:rank=64, learning rate 0.005, seed 0: Cannot adapt model.blocks.0" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Label, seed and learning rate of all runs; those of LoRA fail with an odd seed and at learning rate 0.2."""
    calls = []

    def train(task: Any, plan: dict[str, Any], progress_bar: bool) -> dict[str, Any]:
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
    assert lines == [f"digits, lora, learning rate 0.1, seed {seed}: no luck" for seed in (1, 3)]
    # The mean of the others would be too high.
    lora, head = summarize(read_records(output))
    assert (lora.method, lora.seeds, lora.failed) == ("lora", 4, ("seed 1: no luck", "seed 3: no luck"))
    assert all(map(math.isnan, (lora.score, lora.worst, lora.difference)))
    assert (head.seeds, head.score, head.failed) == (4, 50, ())
    table = output.with_suffix(".md").read_text()
    assert "| nan +- nan | nan |" in table
    assert "Failed:\n\n- lora, seed 1: no luck\n- lora, seed 3: no luck\n" in table
    # They are tried again, and only they.
    failing.clear()
    assert compare.compare(["digits"], ["lora", "head"], [0, 1, 2, 3], [0.1], settings, output) == 2
    assert failing == [("lora", 1, 0.1), ("lora", 3, 0.1)]
    assert len(read_records(output)) == 8


def test_a_record_that_cannot_be_written_is_no_failed_run(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception], monkeypatch: pytest.MonkeyPatch
):
    append, tried = compare.append_record, []

    def full_for_a_moment(path: Path, entry: dict[str, Any]) -> None:
        tried.append(entry)
        if len(tried) == 1:
            raise OSError("no space left on device")
        append(path, entry)

    monkeypatch.setattr(compare, "append_record", full_for_a_moment)
    with pytest.raises(OSError, match="no space left"):
        run(settings, tmp_path / "a.jsonl", methods=["lora"], seeds=[0])


def test_a_method_that_only_fails_does_not_change_the_columns(
    settings: TaskSettings, tmp_path: Path, failing: list[tuple[str, int, float]]
):
    """Also if it is the first one."""
    output = tmp_path / "a.jsonl"
    assert compare.compare(["digits"], ["lora", "head"], [1, 3], [0.1], settings, output) == 2
    table = output.with_suffix(".md").read_text()
    assert "| method | deployed parameters | accuracy |" in table
    assert "| lora | nan | nan +- nan |" in table


def test_a_failure_that_is_no_value_error_does_not_end_the_comparison(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception], capsys: pytest.CaptureFixture[str]
):
    scores |= {0.02: RuntimeError("out of memory")}
    output = tmp_path / "a.jsonl"
    assert compare.compare(["digits"], ["lora"], [0], [0.02], settings, output) == 1
    assert "digits, lora, learning rate 0.02, seed 0: RuntimeError: out of memory" in capsys.readouterr().err
    (row,) = summarize(read_records(output))
    assert math.isnan(row.score)
    assert "RuntimeError: out of memory" in output.with_suffix(".md").read_text()


def test_a_choice_that_changes_after_a_failure_is_refused(
    settings: TaskSettings, tmp_path: Path, scores: dict[float, float | Exception]
):
    scores |= {0.01: 0.1, 0.02: 0.2, 0.04: ValueError("diverged")}
    arguments = {"methods": ["lora"], "learning_rates": [0.01, 0.02]}
    run(settings, tmp_path / "a.jsonl", seeds=[0], **arguments)
    scores |= {0.04: 0.3, 0.08: 0.1}
    with pytest.raises(ProtocolError, match=r"Expected runs of lora .* 0\.04, but that of seed 0 has 0\.02"):
        run(settings, tmp_path / "a.jsonl", seeds=[0, 1], **arguments)


def test_a_seed_that_chooses_rates_ends_the_command_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["compare", "--seeds", "1000000", "--output", f"{tmp_path}/a.jsonl"])
    with pytest.raises(SystemExit, match=r"^error: Expected seeds that do not choose learning rates but got 1000000"):
        compare.main()


def test_seeds_that_choose_rates_are_refused(settings: TaskSettings, tmp_path: Path):
    with pytest.raises(ValueError, match="Expected seeds that do not choose learning rates but got 1000001"):
        run(settings, tmp_path / "a.jsonl", seeds=[0, 1_000_001])


def test_runs_on_another_backbone_are_not_added(settings: TaskSettings, tmp_path: Path):
    output = tmp_path / "a.jsonl"
    (first,) = run(settings, output, methods=["head"], seeds=[0])
    weights = torch.load(settings.cache / "digits.pt")
    name = next(iter(weights))
    torch.save({**weights, name: weights[name] + 1}, tmp_path / "digits.pt")
    other = dataclasses.replace(settings, cache=tmp_path)
    with pytest.raises(ProtocolError, match=f"its runs of digits adapt another one, {first['backbone']}"):
        run(other, output, methods=["head"], seeds=[1])
    assert read_records(output) == [first]
    # Records of earlier versions do not tell.
    output.write_text(json.dumps({key: value for key, value in first.items() if key != "backbone"}) + "\n")
    assert len(run(other, output, methods=["head"], seeds=[1])) == 2
    del weights[name]
    torch.save(weights, tmp_path / "digits.pt")
    with pytest.raises(ValueError, match=r"Expected the weights of the backbone of digits in .*; delete this folder"):
        run(other, output, methods=["head"], seeds=[1])


def test_a_method_without_a_rate_is_left_out(
    settings: TaskSettings,
    tmp_path: Path,
    failing: list,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(selection, "SELECTION_SEEDS", (1, 3))
    rates = [0.05, 0.1]
    assert compare.compare(["digits"], ["lora", "head"], [0, 2], rates, settings, tmp_path / "a.jsonl") == 1
    assert failing[:4] == [("lora", seed, rate) for rate in rates for seed in (1, 3)]
    assert {name for name, *_ in failing[4:]} == {"head"}
    errors = capsys.readouterr().err
    assert errors.count("no luck") == 4
    assert errors.count("digits, lora: skipped, because it has no score at any learning rate.") == 1


@pytest.mark.parametrize(("seeds", "status"), [(["0", "2"], 0), (["0", "1"], 1)])
def test_the_exit_status_tells_of_failures(
    seeds: list[str],
    status: int,
    tmp_path: Path,
    failing: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    task = SimpleNamespace(name="digits", settings={}, learning_rate=0.1, backbone=None)
    monkeypatch.setattr(compare, "build_task", lambda name, settings: task)
    arguments = ["--methods", "lora", "--seeds", *seeds, "--learning_rates", "0.1", "--output", f"{tmp_path}/a.jsonl"]
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


def test_a_head_that_is_not_trained_is_not_subtracted(settings: TaskSettings, tmp_path: Path):
    (alone,) = run(settings, tmp_path / "a.jsonl", methods=["lora:rank=1,modules_to_save=[]"], seeds=[0])
    assert alone["trainable_parameters"] == alone["deployed_parameters"] == 12 * 96


def test_projections_that_eva_leaves_out_have_rank_0(
    settings: TaskSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decompose = peft.get_eva_state_dict

    def none_for_the_first(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        first, *others = decompose(*args, **kwargs).items()
        return {first[0]: first[1][:0], **dict(others)}

    monkeypatch.setattr(peft, "get_eva_state_dict", none_for_the_first)
    (eva,) = run(settings, tmp_path / "a.jsonl", methods=["eva:rank=2,rho=1"], seeds=[0])
    # Query and value of six blocks.
    assert sorted(eva["projection_ranks"].values()) == [0] + 11 * [2]
    assert list(eva["ranks"].values()) == [1] + 5 * [2]


def test_a_run_without_a_batch_is_no_run(settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = dataclasses.replace(settings, batch_size=5000)
    (failed,) = run(settings, tmp_path / "a.jsonl", methods=["head"], seeds=[0])
    assert "score" not in failed
    assert "at least one batch of training rows but there is none" in capsys.readouterr().err
