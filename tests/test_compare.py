"""Comparisons of methods: what is run, what is kept, and what is made of it."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from recipes import compare, comparison, tasks
from recipes.comparison import append_record, bootstrap_interval, markdown, read_records, summarize, write_csv
from recipes.digits import new_model
from recipes.tasks import TaskSettings, build_task
from tests.data.test_glue import tokenizer, write  # noqa: F401


@pytest.fixture
def settings(tmp_path: Path) -> TaskSettings:
    """Three steps on the digits, with a backbone that was not pretrained."""
    state = new_model(1e-3).state_dict()
    (tmp_path / "cache").mkdir()
    backbone = {name: value for name, value in state.items() if not name.startswith("model.head.")}
    torch.save(backbone, tmp_path / "cache" / "digits.pt")
    return TaskSettings(steps=3, batch_size=16, cache=tmp_path / "cache")


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


def test_a_method_that_does_not_apply_is_said_and_passed_over(
    settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = run(settings, tmp_path / "a.jsonl", methods=["prefix", "head"], seeds=[0])
    assert [r["method"] for r in records] == ["head"]
    assert "digits, prefix: Method prefix does not apply to this model because" in capsys.readouterr().err


def test_one_seed_gives_one_order(settings: TaskSettings):
    task = build_task("digits", settings)
    orders = [[y.tolist() for _, y in task.loaders(seed)[0]["train_dataloaders"]] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_unknown_tasks_and_methods(settings: TaskSettings, tmp_path: Path):
    with pytest.raises(ValueError, match=r"Expected a task to be one of digits, cifar10, .* but got 'digit'"):
        run(settings, tmp_path / "a.jsonl", tasks=["digit"])
    with pytest.raises(ValueError, match="Expected a method to be one of"):
        run(settings, tmp_path / "a.jsonl", methods=["lorra"])


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


def test_a_picture_of_each_comparison():
    longer = [{**entry, "task_settings": {"steps": 9}} for entry in RECORDS[:2]]
    figures = comparison.pictures(summarize([*RECORDS, *longer]))
    assert len(figures) == len({(row.task, row.task_settings) for row in summarize([*RECORDS, *longer])})
    assert "digits" in figures
    assert "digits-2" in figures
    axes = figures["digits"].axes[0]
    assert axes.get_yticklabels()[0].get_text() == "lora"
    drawn = sorted(value for line in axes.lines[:1] for value in line.get_xdata())
    own = [100 * r["score"] for r in RECORDS if (r["task"], r["method"], r["searched"]) == ("digits", "lora", None)]
    assert drawn == pytest.approx(sorted(own))


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


def test_a_score_that_is_no_number_stops_no_table(tmp_path: Path):
    """As Pearson's of predictions that are all the same."""
    rows = summarize([*RECORDS[:3], record("digits", "lalora", 1, math.nan, (4, 7))])
    assert "| lalora | nan +- nan | +nan (+nan to +nan) | 2 |" in markdown(rows)
    comparison.pictures(rows)["digits"].savefig(tmp_path / "a.png")


def test_settings_that_do_not_fit_are_said_and_the_others_go_on(
    settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = run(settings, tmp_path / "a.jsonl", methods=["lora:rank=64", "head"], seeds=[0])
    assert [r["method"] for r in records] == ["head"]
    assert "digits, lora:rank=64: Cannot adapt model.blocks.0" in capsys.readouterr().err


def test_a_run_without_a_batch_is_no_run(settings: TaskSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = dataclasses.replace(settings, batch_size=5000)
    assert run(settings, tmp_path / "a.jsonl", methods=["head"], seeds=[0]) == []
    assert "at least one batch of training rows but there is none" in capsys.readouterr().err


def test_bootstrap_interval():
    assert bootstrap_interval([1.5, 1.5, 1.5]) == (1.5, 1.5)
    # The mean of two draws from 0 and 1 is 0, 0.5 or 1 with odds 1 : 2 : 1.
    assert bootstrap_interval([0, 1]) == (0, 1)
    # Of many numbers the interval is nearly that of the normal distribution, 1.96 standard errors to each side.
    numbers = torch.randn(400, dtype=torch.float64)
    low, high = bootstrap_interval(numbers.tolist())
    mean, half = float(numbers.mean()), 1.96 * float(numbers.std()) / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)


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
    assert comparison.run_key(json.loads(json.dumps(planned))) == comparison.run_key(planned)


def test_glue(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights that large give predictions that differ enough for torchmetrics before 1.9 to correlate them.
    BertModel(BertConfig(vocab_size=8, initializer_range=0.5, **size)).save_pretrained(tokenizer)
    rows = {"sentence1": ["a b"] * 9, "sentence2": ["c", "d", "a"] * 3, "label": [0.0, 2.5, 5.0] * 3}
    data = write(tmp_path / "glue", "stsb", **rows)
    settings = TaskSettings(glue_path=data, model=tokenizer, epochs=2, batch_size=3, max_train_rows=6)
    (record,) = run(settings, tmp_path / "a.jsonl", tasks=["glue/stsb"], methods=["lora:rank=2"], seeds=[0])
    assert record["metric"] == "test/pearson"
    assert record["steps"] == 4
    assert sorted(record["scores"]) == ["test/pearson", "test/spearman"]
    # Where its folder is does not matter, what is in it does.
    assert record["task_settings"]["model"] == f"{tmp_path.name}/tokenizer"
    assert (record["task_settings"]["train_rows"], record["task_settings"]["test_rows"]) == (6, 9)
    assert record["score"] == record["scores"]["test/pearson"]

    # LoRA at rank 2 on query and value of two blocks of width 16, and RoBERTa's head: a dense layer and the output.
    assert record["trainable_parameters"] == 2 * 2 * 2 * 32 + (16 * 16 + 16) + (16 + 1)

    data_module = build_task("glue/stsb", settings).loaders(0)[0]["datamodule"]
    orders = []
    for seed in (3, 3, 4):
        pl.seed_everything(seed)
        orders.append(list(data_module.train_dataloader().sampler))
    assert orders[0] == orders[1] != orders[2]


def test_cifar10_adapts_to_the_classes_that_were_not_pretrained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "data").mkdir()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        rows = {"img": [Image.new("RGB", (32, 32), (25 * i, 0, 0)) for i in range(10)], "label": list(range(10))}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    seen = []

    def pretrain(model: Any, data: Any, steps: int) -> dict[str, torch.Tensor]:
        seen.append(data.tensors[1].tolist())
        return {name: value for name, value in model.state_dict().items() if not name.startswith("model.head.")}

    monkeypatch.setattr(tasks.digits, "pretrain", pretrain)
    settings = TaskSettings(cifar10_path=str(tmp_path / "data"), steps=2, batch_size=5, cache=tmp_path)
    task = build_task("cifar10", settings)
    build_task("cifar10", settings)
    # Each image and its mirror image, once: the second time the backbone is there.
    assert seen == [[0, 1, 2, 3, 4] * 2]
    (images, labels), *_ = task.loaders(0)[1]["dataloaders"]
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images[:, 0, 0, 0].tolist() == pytest.approx([25 * i / 255 for i in range(5, 10)])
    trained = torch.cat([y for _, y in task.loaders(0)[0]["train_dataloaders"]])
    assert trained.bincount().tolist() == [2, 2, 2, 2, 2]
    backbones = [task.new_module(1e-3).model.blocks[0].attn.qkv.weight for _ in range(2)]
    assert torch.equal(*backbones)
