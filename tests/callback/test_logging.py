"""What a run logs and keeps as its history."""

import csv
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, merge_lora
from lalora_lightning.runs import read_run
from tests.helpers.training import BuiltLater, TinyClassifier, loader, new_trainer


def test_two_loggers_hold_the_keys(tmp_path: Path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback, logger=loggers, log_every_n_steps=5).fit(TinyClassifier(), loader())
    keys = {f"rank/model.blocks.{i}" for i in range(3)} | {"rank/total", "rank/budget"}

    with open(Path(loggers[0].log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert keys <= set(rows[0])
    # 21 steps, counted from zero as Lightning does: every fifth, the last, and those where ranks changed in between.
    steps = [int(row["step"]) for row in rows]
    assert {4, 9, 14, 19, 20} < set(steps)
    assert steps == sorted(steps)
    history = {step: (ranks, budget) for step, ranks, budget in callback.history}
    assert list(history) == list(range(22))
    assert {step for step in range(1, 22) if history[step][0] != history[step - 1][0]} <= {step + 1 for step in steps}
    for row in rows:
        ranks, budget = history[int(row["step"]) + 1]
        assert [float(row[f"rank/model.blocks.{i}"]) for i in range(3)] == ranks
        assert float(row["rank/total"]) == sum(ranks)
        assert float(row["rank/budget"]) == pytest.approx(budget)

    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert keys <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("rank/total")] == steps
    assert "rank/trajectories" in events.Tags()["images"]


class StepLogger(Logger):
    """Keeps the steps and keys that it is given."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, set[str]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, set(metrics)))

    def log_hyperparams(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("condense_at", [10, 14])
def test_no_step_is_logged_before_an_earlier_one(tmp_path: Path, condense_at: int):
    """Some loggers drop such steps. Condensing comes with and between the logs."""
    logger, callback = StepLogger(), LaLoraCallback(rank=4, gamma=3.0, condense_to=1.5, condense_at=condense_at)
    new_trainer(tmp_path, callback, logger=logger, log_every_n_steps=10).fit(TinyClassifier(), loader())
    steps = [step for step, _ in logger.logged]
    assert len(steps) > 5
    assert steps == sorted(steps)
    energy = [(step, "rank/total" in keys) for step, keys in logger.logged if "fit/energy_kept" in keys]
    assert energy == [(condense_at - 1, True)]


def test_steps_of_an_interrupted_fit_are_not_logged_in_the_next(tmp_path: Path):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 7:
                raise ZeroDivisionError

    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    with pytest.raises(ZeroDivisionError):
        new_trainer(tmp_path, callback, Interrupt(), log_every_n_steps=5).fit(module, loader())
    logger = StepLogger()
    new_trainer(tmp_path, callback, logger=logger, log_every_n_steps=5).fit(module, loader())
    steps = [step for step, keys in logger.logged if "rank/total" in keys]
    assert steps == sorted(set(steps))


def test_the_total_rank_is_in_the_progress_bar(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback)
    trainer.fit(TinyClassifier(), loader())
    assert trainer.progress_bar_metrics["rank/total"] == sum(callback.history[-1][1])


def test_numbers_are_asked_from_the_device_at_logging_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callback = LaLoraCallback(rank=4)
    read = RankAllocator.read_steps
    reads = []
    monkeypatch.setattr(RankAllocator, "read_steps", lambda *args: reads.append(callback._last_step) or read(*args))
    new_trainer(tmp_path, callback, log_every_n_steps=10).fit(TinyClassifier(), loader())
    # At the start, every tenth step, and the last.
    assert reads == [0, 10, 20, 21]


def test_weights_that_are_not_finite_are_reported_and_change_no_rank(tmp_path: Path):
    class Diverging(TinyClassifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.global_step >= 10:
                self.model.blocks[0].query.lora_B.grad.fill_(float("nan"))

    module, callback = Diverging(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, log_every_n_steps=7)
    with pytest.warns(UserWarning, match="4 optimizer steps since the last report left weights that are NaN or Inf"):
        trainer.fit(module, loader())
    steps, ranks, budgets = zip(*callback.history, strict=True)
    assert steps == tuple(range(22))
    assert ranks[9] != ranks[0]
    assert all(then == ranks[10] for then in ranks[11:])
    assert all(then == budgets[10] for then in budgets[11:])
    assert callback.allocator.skipped == 11
    trainer.save_checkpoint(tmp_path / "diverged.ckpt")
    again = LaLoraCallback(rank=4)
    new_trainer(tmp_path, again, max_epochs=4).fit(TinyClassifier(), loader(), ckpt_path=tmp_path / "diverged.ckpt")
    assert again.allocator.ranks.tolist() == ranks[-1]


def test_history_stays_short_and_keeps_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lalora_lightning.allocator.history.MAX_READINGS", 10)
    callback = LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback).fit(TinyClassifier(), loader())
    steps = [step for step, _, _ in callback.history]
    assert len(steps) <= 10
    assert steps[0] == 0
    assert steps[-1] == 21
    assert steps == sorted(steps)


def test_plot_before_fit():
    with pytest.raises(RuntimeError, match="fit has not started"):
        LaLoraCallback().plot()


def test_settings_are_those_of_the_layers_where_the_module_adapted_itself(tmp_path: Path):
    module = TinyClassifier()
    add_lora(module, rank=2, alpha=6.0, dropout=0.1, init="orthogonal", target_modules=["key"], freeze_A=True)
    logger = CSVLogger(tmp_path)
    callback = LaLoraCallback(rank=8, dropout=0.3, init="pissa", target_modules=["query"], gamma=3.0)
    new_trainer(tmp_path, callback, logger=logger, max_epochs=1).fit(module, loader())
    logged = logger.experiment.hparams["lalora"]
    assert (logged["rank"], logged["scaling"], logged["dropout"], logged["freeze_A"]) == (2, 3.0, 0.1, True)
    assert logged["gamma"] == 3.0
    # Nothing tells these of a module that adapted itself; the callback's own did not apply.
    assert not {"init", "target_modules", "modules_to_save", "use_rslora"} & logged.keys()


def test_settings_are_the_callbacks_where_it_adapted_the_module(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    callback = LaLoraCallback(rank=4, dropout=0.3, init="orthogonal", target_modules=["key"], use_rslora=True)
    trainer = new_trainer(tmp_path, callback, logger=logger, max_epochs=1)
    module = TinyClassifier()
    trainer.fit(module, loader())
    logged = logger.experiment.hparams["lalora"]
    assert (logged["rank"], logged["scaling"], logged["dropout"]) == (4, 8.0, 0.3)
    assert (logged["init"], logged["target_modules"], logged["use_rslora"]) == ("orthogonal", ["key"], True)
    assert logged["adapter_parameters"] == 3 * 4 * 16
    # Fit called again: the module is the same, and so are its settings.
    trainer.fit(module, loader())
    assert logger.experiment.hparams["lalora"]["init"] == "orthogonal"


def test_settings_of_a_module_that_builds_its_model_later(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    new_trainer(tmp_path, LaLoraCallback(rank=7), logger=logger, max_epochs=1).fit(
        BuiltLater(rank=3, alpha=6.0), loader()
    )
    logged = logger.experiment.hparams["lalora"]
    assert (logged["rank"], logged["scaling"], logged["adapter_parameters"]) == (3, 2.0, 6 * 3 * 16)
    assert "init" not in logged
    assert read_run(tmp_path).max_rank == 3


def test_settings_follow_the_layers_when_they_are_removed_and_inserted_again(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, init="orthogonal")

    def logged() -> dict:
        logger = CSVLogger(tmp_path)
        new_trainer(tmp_path, callback, logger=logger, max_epochs=1).fit(module, loader())
        return logger.experiment.hparams["lalora"]

    first = logged()
    assert (first["rank"], first["init"]) == (4, "orthogonal")
    merge_lora(module, remove=True)
    module.requires_grad_(True)
    # Inserted by the callback again, in the same run and in the next.
    assert logged() == logged() == first
    merge_lora(module, remove=True)
    module.requires_grad_(True)
    add_lora(module, rank=2)
    assert logged()["rank"] == 2
    assert "init" not in logged()


class RefusingLogger(CSVLogger):
    """Refuses a parameter with another value, as MLflow does, or everything."""

    def __init__(self, folder: Path, everything: bool = False) -> None:
        super().__init__(folder)
        self.params: dict[str, object] = {}
        self.everything = everything

    def log_hyperparams(self, params: dict) -> None:
        for key, value in params.get("lalora", params).items():
            if self.everything or self.params.setdefault(key, value) != value:
                raise ValueError(f"Changing param values is not allowed: {key}\nmore lines")

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        if self.everything:
            raise ConnectionError("no route to host")
        super().log_metrics(metrics, step)


def warnings_of(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader())
    return [str(w.message) for w in caught if "La-LoRA" in str(w.message)]


def test_a_logger_that_refuses_a_changed_setting_ends_no_run(tmp_path: Path):
    module, logger = TinyClassifier(), RefusingLogger(tmp_path)
    assert warnings_of(new_trainer(tmp_path, LaLoraCallback(rank=4), logger=logger), module) == []
    callback = LaLoraCallback(rank=4, gamma=2.0)
    said = warnings_of(new_trainer(tmp_path, callback, logger=logger, max_epochs=1), module)
    assert callback.allocator.steps == 7
    assert [line for line in said if "RefusingLogger" in line] == [
        "La-LoRA: RefusingLogger did not log all settings lalora/...; the run goes on. Its reason: Changing param "
        "values is not allowed: gamma"
    ]


def test_a_logger_that_refuses_everything_is_reported_once_and_others_log_on(tmp_path: Path):
    other, callback = CSVLogger(tmp_path, name="other"), LaLoraCallback(rank=4)
    loggers = [RefusingLogger(tmp_path, everything=True), other]
    said = warnings_of(new_trainer(tmp_path, callback, logger=loggers), TinyClassifier())
    assert callback.allocator.steps == 21
    assert [line.split(";")[0] for line in said] == [
        "La-LoRA: RefusingLogger did not log all settings lalora/...",
        "La-LoRA: RefusingLogger did not log all ranks, times and memory",
    ]
    with open(Path(other.log_dir) / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["rank/total"]] == [str(step) for step in range(21)]
