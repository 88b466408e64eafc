"""The report of a run, from CSV logs, TensorBoard's and a checkpoint, and the table printed after fit."""

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, condense_lora, lora_layers
from lalora_lightning.report import main, write_report
from lalora_lightning.report.console import rank_report, rank_rows, rank_totals
from lalora_lightning.runs import read_run, trimmed_bytes
from lalora_lightning.sparsity import layer_sparsity
from tests.helpers.models import TinyTransformer
from tests.helpers.processes import ShardedClassifier, batches, in_processes, strategy_of
from tests.helpers.training import TinyClassifier, loader, new_trainer


class Saved(TinyClassifier):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LaLoraCallback, pl.LightningModule]:
    """A run with both loggers and a checkpoint: ``csv/``, ``tb/`` and ``last.ckpt`` in one folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    callback, module = LaLoraCallback(rank=4, gamma=3.0, log_sparsity=True), Saved()
    new_trainer(
        folder,
        callback,
        ModelCheckpoint(folder, "best", monitor="val/loss", save_top_k=-1, save_last=True),
        enable_checkpointing=True,
        logger=[CSVLogger(folder, "", "csv"), TensorBoardLogger(folder, "", "tb")],
        log_every_n_steps=5,
    ).fit(module, loader(), loader(2))
    return folder, callback, module


@pytest.mark.parametrize("logs", ["csv", "tb"])
def test_a_run_is_read_from_its_logs(fitted: tuple, logs: str):
    folder, callback, module = fitted
    run = read_run(folder / logs)
    # All logging steps, and those in between where ranks changed.
    assert {5, 10, 15, 20, 21} <= set(run.steps)
    history = {step: (ranks, budget) for step, ranks, budget in callback.history}
    assert [list(row) for row in run.ranks] == [history[step][0] for step in run.steps]
    assert run.budgets == pytest.approx([history[step][1] for step in run.steps])
    assert list(run.layer_names) == callback.allocator.layer_names
    assert run.max_rank == run.settings["lalora.rank"] == 4
    assert run.settings["lr"] == 0.05
    assert run.settings["lalora.adapter_parameters"] == 6 * 2 * 8 * 4
    assert run.sparsity[21] == pytest.approx(layer_sparsity(module).tolist())
    assert [step for step, _ in run.scores["val/loss"]] == [7, 14, 21]
    assert 0 < run.summary["seconds"] < 60
    assert run.summary["peak_memory_mib"] > 50


def test_a_checkpoint_alone(fitted: tuple, tmp_path: Path):
    folder, callback, _ = fitted
    run = read_run(folder / "last.ckpt")
    step, ranks, budget = callback.history[-1]
    assert (run.steps[-1], list(run.ranks[-1]), run.budgets[-1]) == (step, ranks, pytest.approx(budget))
    assert run.summary["adapter parameters"] == 384
    # Two projections a layer, each 8 x r' and r' x 8 in float32.
    assert run.summary["trimmed adapter, KiB"] == sum(ranks) * 2 * 16 * 4 / 1024
    assert run.settings["lr"] == 0.05
    assert "best val/loss" in run.summary
    main([str(folder / "last.ckpt"), "--output", str(tmp_path)])
    size = sum(ranks) * 2 * 16 * 4 / 1024
    assert f"<td>trimmed adapter, KiB</td><td>{size:.5g}</td>" in (tmp_path / "report.html").read_text()


def test_the_command(fitted: tuple, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, callback, _ = fitted
    (folder / "csv" / "report.json").write_text(json.dumps({"test/accuracy": 0.75, "note": "a|b <i>"}))
    main([str(folder / "csv"), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    total = sum(callback.history[-1][1])
    assert f"<td>total rank</td><td>{total} of LoRA&#x27;s 12 ({total / 12:.0%})</td>" in page
    assert "<td>lalora.gamma</td><td>3</td>" in page
    assert "<td>test/accuracy</td><td>0.75</td>" in page
    assert "a|b &lt;i&gt;" in page
    for i, rank in enumerate(callback.history[-1][1]):
        assert f"<td>model.blocks.{i}</td><td>{rank}</td>" in page
    # Self-contained: nothing is loaded from elsewhere.
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 4
    assert "http" not in page
    assert {path.name for path in tmp_path.glob("report/*")} == {
        "report.html",
        "rank-trajectories.png",
        "rank-lines.png",
        "sparsity.png",
        "sparsity-and-rank.png",
    }


def test_reading_logs_loads_neither_torch_nor_the_layers(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("step,rank/x.0,rank/budget\n4,1,1\n")
    code = (
        "import importlib.util, sys, types;"
        "package = types.ModuleType('lalora_lightning');"
        "package.__path__ = importlib.util.find_spec('lalora_lightning').submodule_search_locations;"
        "sys.modules['lalora_lightning'] = package;"
        "import lalora_lightning.report, lalora_lightning.runs;"
        f"run = lalora_lightning.runs.read_run({str(tmp_path)!r});"
        "print(run.ranks, [name for name in ('torch', 'lightning', 'lalora_lightning.layers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[[1]] []"


def test_layers_from_csv_logs_are_in_order_of_depth(tmp_path: Path):
    names = [f"encoder.layer.{i}" for i in range(12)]
    logger = CSVLogger(tmp_path, "", "")
    logger.log_metrics({f"rank/{name}": float(i) for i, name in enumerate(names)} | {"rank/budget": 66.0}, step=0)
    logger.save()
    run = read_run(tmp_path)
    assert run.layer_names == names
    assert run.ranks == [list(range(12))]


def test_errors_say_what_to_do(tmp_path: Path):
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        return str(stop.value)

    assert "to be a folder of logs or a checkpoint but it does not exist" in error(tmp_path / "nowhere")
    assert "found neither; give the folder of a logger or a checkpoint" in error(tmp_path)

    for version in ("a", "b"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text("step,train/loss\n4,0.5\n")
    assert f"Expected the logs of one run in {tmp_path} but found 2; give one of {tmp_path}/a" in error(tmp_path)
    assert "to hold rank/<layer> and rank/budget, which LaLoraCallback logs, but got train/loss" in error(
        tmp_path / "a"
    )

    metrics = tmp_path / "a" / "metrics.csv"
    metrics.write_text("step,rank/x.0,rank/budget\n4,1,1\n9,2,oops\n")
    assert f"Expected numbers in line 3 of {metrics} but it is damaged" in error(tmp_path / "a")
    metrics.write_text("rank/x.0\n1\n")
    assert "to have a column named step" in error(tmp_path / "a")
    metrics.write_text("step,rank/x.0,rank/budget\n4,1,1\n")
    (tmp_path / "a" / "hparams.yaml").write_text("a: [")
    assert "hparams.yaml to be YAML but it cannot be read" in error(tmp_path / "a")
    (tmp_path / "a" / "hparams.yaml").write_text("x: !!python/object:pathlib.Path {}\ny: !!python/name:os.getcwd\n")
    assert read_run(tmp_path / "a").settings["y"] == "os.getcwd"
    (tmp_path / "a" / "report.json").write_text("[1]")
    assert "report.json to hold names and values but it holds a list" in error(tmp_path / "a")

    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert "to be a checkpoint of a Trainer but it cannot be read" in error(tmp_path / "text.ckpt")
    state = {"allocator": {}, "history": [], "last_step": None}
    torch.save({"callbacks": {"LaLoraCallback": state}}, tmp_path / "early.ckpt")
    assert "but it was saved before the first step" in error(tmp_path / "early.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    assert "to hold the state of a LaLoraCallback but it has none" in error(tmp_path / "plain.ckpt")


def test_sparsity_is_that_of_the_increment_not_of_the_initial_factors():
    model = TinyTransformer()
    add_lora(model, rank=4, init="pissa")
    assert layer_sparsity(model).tolist() == [1.0, 1.0, 1.0]
    model.blocks[0].query.lora_B.data += 1
    assert layer_sparsity(model)[0] < 1


def test_sparsity_of_a_layer_counts_all_its_projections(adapted: TinyTransformer):
    layers = lora_layers(adapted)
    with torch.no_grad():
        layers["blocks.0.query"].lora_B.zero_()
        layers["blocks.1.query"].lora_B[:2].zero_()
    # Half of the first layer's entries, a quarter of one of the second's two matrices.
    assert layer_sparsity(adapted).tolist() == pytest.approx([0.5, 0.125, 0.0], abs=0.02)


def test_tensorboard_opens_with_charts_and_results(fitted: tuple):
    folder, _, _ = fitted
    events = EventAccumulator(str(folder / "tb")).Reload()
    layout = layout_pb2.Layout()
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout.ParseFromString(content)
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert list(charts) == ["rank of each layer", "total rank and budget", "sparsity of each layer"]

    summaries = events.summary_metadata
    results = metadata.parse_experiment_plugin_data(summaries[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert {info.name.tag for info in results.metric_infos} == {"val/loss", "rank/total", "rank/budget"}
    start = metadata.parse_session_start_info_plugin_data(
        summaries[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    assert start.hparams["lalora/gamma"].number_value == 3.0
    assert start.hparams["lr"].number_value == 0.05
    assert "hp_metric" not in events.Tags()["scalars"]
    assert "rank/trajectories" in events.Tags()["images"]


def test_the_ranks_are_printed_after_fit(tmp_path: Path, capsys: pytest.CaptureFixture):
    callback = LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback, max_epochs=1).fit(TinyClassifier(), loader())
    assert capsys.readouterr().out == ""
    callback = LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback, max_epochs=1, enable_model_summary=True).fit(TinyClassifier(), loader())
    out = capsys.readouterr().out
    assert "of model.blocks.*" in out
    assert f"total rank {sum(callback.history[-1][1])} of LoRA's 12" in " ".join(out.split())


def test_the_rank_report(adapted: TinyTransformer, capsys: pytest.CaptureFixture):
    allocator = RankAllocator(adapted, gamma=3.0)
    assert allocator.contributions.isnan().all()
    assert allocator.growth_rates.isnan().all()
    assert "contributions" not in allocator.state_dict()
    with torch.no_grad():
        for layer in lora_layers(adapted).values():
            layer.lora_B.mul_(2)
    allocator.step()
    assert allocator.contributions.mean() == pytest.approx(1)
    assert (allocator.growth_rates > 0).all()
    rows = rank_rows(allocator)
    assert [row[:3] for row in rows] == [
        [f"blocks.{i}", str(rank), f"{share:.3f}"]
        for i, (rank, share) in enumerate(zip(allocator.ranks.tolist(), allocator.contributions.tolist(), strict=True))
    ]
    assert [row[4] for row in rows] == ["█" * 4 * rank + "·" * 4 * (4 - rank) for rank in allocator.ranks.tolist()]
    trimmed = int(allocator.ranks.sum()) * 2 * 16 * 4 / 1024
    totals, sizes, condensed, *advice = rank_totals(allocator, adapted).splitlines()
    assert totals.startswith(f"total rank {int(allocator.ranks.sum())} of LoRA's 12 (")
    assert sizes == f"adapters 1.5 KiB, trimmed to these ranks {trimmed:.1f} KiB"
    assert bool(advice) == (float(allocator.budget) < 0.9 * 12)
    kept = [
        condense_lora(copy.deepcopy(adapted), energy=energy, group_by="block").parameters for energy in (0.99, 0.95)
    ]
    assert condensed == f"condense_lora would keep 99% of the energy in {kept[0]} parameters, 95% in {kept[1]}"
    assert trimmed_bytes(torch.empty(4, 8), torch.empty(6, 4), rank=3) == 3 * 14 * 4

    print(rank_report(allocator, adapted))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "La-LoRA ranks of blocks.*, maximum 4"
    assert lines[2].split() == ["layer", "rank", "contribution", "growth,", "%/step", "share", "of", "maximum"]
    assert lines[4].split() == ["0", *rows[0][1:]]
    assert "\n".join(lines[7:]) == rank_totals(allocator, adapted)


class Blocks(nn.Module):
    """Projections of several kinds, whose ranks have different costs."""

    def __init__(self, blocks: int, kinds: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({f"a_rather_long_name_{i}": nn.Linear(4, 4 + 4 * i) for i in range(kinds)})
            for _ in range(blocks)
        )


@pytest.mark.parametrize(("blocks", "kinds"), [(2, 2), (12, 7)])
def test_the_rank_report_of_many_projections_is_a_table_of_blocks_by_kind(
    capsys: pytest.CaptureFixture, blocks: int, kinds: int
):
    torch.manual_seed(0)
    model = Blocks(blocks, kinds)
    add_lora(model, rank=4, target_modules="all-linear", modules_to_save=[])
    allocator = RankAllocator(model, group_by="module", gradual_budget=False, average_rank=2)
    layers = lora_layers(model)
    print(rank_report(allocator, model))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = {}
    for line in lines:
        cells = line.split()
        if cells and cells[0] == "block":
            kinds_shown = cells[1:]
        elif cells and cells[0].isdigit():
            shown |= {f"blocks.{cells[0]}.{kind}": int(rank) for kind, rank in zip(kinds_shown, cells[1:], strict=True)}
    assert shown == {name: int(layer.rank) for name, layer in layers.items()}
    costs = [4 + 4 + 4 * (i % kinds) for i in range(blocks * kinds)]
    total = sum(cost * int(layer.rank) for cost, layer in zip(costs, layers.values(), strict=True))
    share = total / (4 * sum(costs))
    line = f"adapter parameters {total:,} of LoRA's {4 * sum(costs):,} ({share:.0%}), budget {2 * sum(costs):,}"
    assert line in lines
    allocator.condense(1)
    assert f"(25%), budget {sum(costs):,}" in rank_totals(allocator, model)


def test_initial_factors_have_no_condensed_size():
    model = TinyTransformer()
    add_lora(model, rank=4, init="pissa")
    assert "condense_lora" not in rank_totals(RankAllocator(model), model)


def test_a_run_of_all_projections(tmp_path: Path):
    callback = LaLoraCallback(rank=4, group_by="module", target_modules=["query", "value"])
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    logger = TensorBoardLogger(tmp_path, "", "tb")
    trainer = new_trainer(tmp_path, callback, checkpoint, enable_checkpointing=True, logger=logger, max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"rank/trajectories", "rank/map"} <= set(events.Tags()["images"])
    run = read_run(tmp_path / "last.ckpt")
    assert (run.unit, run.totals[-1]) == ("rank", sum(run.ranks[-1]))
    main([str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<tr><th>block</th><th>query</th><th>value</th></tr>" in page
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"rank-trajectories", "rank-map"}


class Unequal(nn.Module):
    """A rank of `wide` costs 24 parameters, one of `narrow` 20."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.narrow(self.wide(x)).mean(1))


@pytest.mark.parametrize(("kind", "freeze_A"), [(CSVLogger, False), (CSVLogger, True), (TensorBoardLogger, False)])
def test_parameters_and_energy_are_read_from_logs(tmp_path: Path, kind: Any, freeze_A: bool):
    """Also by page and figures, as from the callback itself."""
    logger = kind(tmp_path, "", "logs")
    settings: Any = {"target_modules": ["wide", "narrow"], "modules_to_save": ["head"], "group_by": "module"}
    callback = LaLoraCallback(rank=4, condense_to=1.5, condense_at=5, fixed_ranks=True, freeze_A=freeze_A, **settings)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = new_trainer(
        tmp_path, callback, checkpoint, enable_checkpointing=True, logger=logger, max_epochs=2, log_every_n_steps=3
    )
    module = TinyClassifier()
    module.model = Unequal()
    trainer.fit(module, loader())
    run, saved = read_run(tmp_path / "logs"), read_run(tmp_path / "last.ckpt")
    ranks = dict(zip(run.layer_names, run.ranks[-1], strict=True))
    narrow, wide = (ranks[name] for name in sorted(ranks))
    assert 24 * wide + 20 * narrow <= 1.5 * 44
    assert (run.unit, run.totals[-1], run.full) == ("adapter parameters", 24 * wide + 20 * narrow, 4 * 44)
    assert (saved.totals[-1], saved.full) == (run.totals[-1], run.full)
    assert run.total_budgets[-1] == pytest.approx(run.totals[-1])
    assert 0 < run.summary["energy_kept"] < 1
    page = write_report(tmp_path / "logs", tmp_path / "report").read_text()
    assert f"<td>adapter parameters</td><td>{run.describe_total()}</td>".replace("'", "&#x27;") in page
    assert "<td>energy_kept</td>" in page


@pytest.mark.parametrize(("length", "bar"), [(20, True), (40, False), (90, False)])
def test_the_rank_report_fits_80_columns(capsys: pytest.CaptureFixture, length: int, bar: bool):
    model = nn.Module()
    names = [f"{i}_projection".rjust(length, "_") for i in (10, 11)]
    model.encoder = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    add_lora(model, rank=4, target_modules=names, modules_to_save=[])
    allocator = RankAllocator(model, group_by="module", gamma=0.0)
    allocator.step()
    print(rank_report(allocator, model))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, line in zip(names, lines[4:6], strict=True):
        assert line.split()[0] == (name if length < 44 else "..." + name[-41:])
        assert ("█" in line) is bar
    assert lines[-1] == "The budget ended below its maximum of 8; increase gamma or train longer."


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_log_and_print_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def train(world: int, strategy: object) -> str:
        torch.manual_seed(0)
        logger = CSVLogger(tmp_path, "", f"{world}")
        settings = {"strategy": strategy, "devices": world, "logger": logger, "enable_model_summary": True}
        module = TinyClassifier() if world == 1 or name == "ddp" else ShardedClassifier()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            callback = LaLoraCallback(rank=4, gamma=1.0, log_sparsity=True)
            new_trainer(tmp_path, callback, max_epochs=1, **settings).fit(module, batches(world))
        return out.getvalue()

    outputs = in_processes(2, tmp_path, lambda: train(2, strategy_of(name, 2)))
    assert ["total rank" in out for out in outputs] == [True, False]
    train(1, "auto")
    one, two = read_run(tmp_path / "1"), read_run(tmp_path / "2")
    assert one.ranks == two.ranks
    assert list(one.sparsity) == list(two.sparsity) == [1, 2, 3, 4, 5, 6]
    for step, sparsity in one.sparsity.items():
        # An entry near the threshold may fall on either side.
        assert two.sparsity[step] == pytest.approx(sparsity, abs=0.02)


def test_a_checkpoint_of_fixed_ranks_has_no_trajectories(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=True), max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "fixed.ckpt")
    with pytest.raises(ValueError, match="of a run with adaptive ranks but its ranks were fixed"):
        read_run(tmp_path / "fixed.ckpt")
