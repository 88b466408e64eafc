"""Runs that condense their adapters once, in the Trainers of Lightning and of transformers."""

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, lora_layers, trim_lora
from lalora_lightning.allocator import RankHistory
from lalora_lightning.runs import read_run
from recipes.benchmarks.operations import SYNCHRONIZING, OperationCounter
from tests.helpers.models import TinyTransformer
from tests.helpers.processes import STEPS, ShardedClassifier, batches, in_processes, strategy_of
from tests.helpers.training import DroppingClassifier, TinyClassifier, loader, new_trainer

# Of 21 steps.
AT = 10


class Recorder(pl.Callback):
    """What a run looks like after each optimizer step, to be placed before or after the callback that condenses."""

    def __init__(self) -> None:
        self.increments: dict[int, dict[str, Tensor]] = {}
        self.ranks: dict[int, list[int]] = {}
        self.states: dict[int, list[bool]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        layers = lora_layers(pl_module)
        step = trainer.global_step
        if step == 0 or step in self.ranks:
            return
        self.increments[step] = {name: layer.increment().detach() for name, layer in layers.items()}
        self.ranks[step] = [int(layer.rank) for layer in layers.values()]
        adapters = {p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
        self.states[step] = [
            any(bool(value.any()) for p in adapters for value in opt.state.get(p, {}).values())
            for opt in trainer.optimizers
        ]


def best_ranks(increments: list[list[Tensor]], average_rank: float, min_rank: int) -> list[int]:
    """Of all ranks that cost no more, those of the largest energy, by trying the steps from the smallest ranks on."""
    # All projections of the small model cost the same.
    squares = [sum(torch.linalg.svdvals(each.double()).square() for each in group) for group in increments]
    costs = [len(group) for group in increments]
    ranks, left = [min_rank] * len(increments), average_rank * sum(costs) - min_rank * sum(costs)
    while True:
        gains = [float(square[rank]) / cost for square, rank, cost in zip(squares, ranks, costs, strict=True)]
        best = max(range(len(gains)), key=gains.__getitem__)
        if costs[best] > left or gains[best] < 1e-12:
            return ranks
        ranks[best] += 1
        left -= costs[best]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group_by": "block"},
        {"group_by": "kind"},
        pytest.param({"group_by": lambda name: name.rpartition(".")[2]}, id="group_by a function"),
        {"freeze_after": 5},
        {"freeze_after": 0.9},
        {"interval": 4},
        {"contribution": "fisher"},
        {"gradual_budget": False},
        {"gradual_budget": False, "average_rank": 3.0},
        {"fixed_ranks": True},
        {"fixed_ranks": True, "contribution": "fisher"},
        {"fixed_ranks": True, "min_rank": 0, "condense_to": 0.7},
        {"min_rank": 0},
        {"min_rank": 0, "condense_to": 0.5},
        {"freeze_A": True},
        {"dropout": 0.1, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"save_adapter_only": True},
        {"growth": "stored", "contribution_scale": "absolute"},
    ],
    ids=str,
)
def test_the_largest_components_at_the_step_are_kept_and_trained_on(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    before, after, module = Recorder(), Recorder(), TinyClassifier()
    found: dict[str, Tensor] = {}
    condense = RankAllocator.condense

    def recorded(self: RankAllocator, *args: Any) -> Any:
        # At the ranks of this step.
        found.update((name, layer.increment().detach()) for name, layer in lora_layers(module).items())
        return condense(self, *args)

    monkeypatch.setattr(RankAllocator, "condense", recorded)
    settings = {"rank": 4, "gamma": 20.0, "group_by": "module", "condense_to": 1.5, "condense_at": 0.5, **settings}
    callback = LaLoraCallback(**settings)
    trainer = new_trainer(tmp_path, before, callback, after, log_every_n_steps=50)
    trainer.fit(module, loader())
    allocator = callback.allocator
    assert allocator.condensed
    assert (before.states[AT], after.states[AT], after.states[AT + 1]) == ([True], [False], [True])

    groups = list(allocator._groups.values())
    increments = [[found[name] for name in names] for names in groups]
    expected = best_ranks(increments, settings["condense_to"], settings.get("min_rank", 1))
    assert allocator.ranks.tolist() == expected
    for names, rank in zip(groups, expected, strict=True):
        for name in names:
            U, S, Vh = torch.linalg.svd(found[name])
            nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
            torch.testing.assert_close(after.increments[AT][name], nearest, rtol=1e-4, atol=1e-5)
            assert rank == 0 or not torch.equal(after.increments[21][name], after.increments[AT][name])
    # Ranks of all steps at their true steps, although nothing was logged before the end.
    steps, ranks, budgets = zip(*callback.history, strict=True)
    assert steps == tuple(range(22))
    assert all(then == expected for then in ranks[AT:])
    by_layer = {name: i for i, names in enumerate(groups) for name in names}
    for step in range(1, 22):
        assert after.ranks[step] == [ranks[step][by_layer[name]] for name in lora_layers(module)]
    assert budgets[-1] == pytest.approx(
        sum(rank * cost for rank, cost in zip(expected, allocator.costs.tolist(), strict=True))
    )
    if settings.get("fixed_ranks"):
        assert all(set(then) == {4} for then in ranks[1:AT])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = LaLoraCallback(**settings)
    new_trainer(tmp_path, again, max_epochs=4).fit(TinyClassifier(), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert again.allocator.ranks.tolist() == expected
    trim_lora(module)


def test_gradients_that_accumulate_are_counted_once(tmp_path: Path):
    recorder = Recorder()
    callback = LaLoraCallback(rank=4, condense_to=1.5, condense_at=0.5)
    trainer = new_trainer(tmp_path, callback, recorder, accumulate_grad_batches=3)
    trainer.fit(TinyClassifier(), loader())
    # Of 7 batches in each of 3 epochs: 9 steps.
    assert trainer.global_step == 9
    assert [step for step, states in recorder.states.items() if states == [False]] == [4]


class ByHand(TinyClassifier):
    """Two optimizers, each of some of the adapters, and one of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        layers = list(lora_layers(self).values())
        groups = [[p for layer in part for p in layer.parameters()] for part in (layers[::2], layers[1::2])]
        kinds = [torch.optim.Adagrad, functools.partial(torch.optim.SGD, momentum=0.9, fused=True)]
        return [
            *(kind([p for p in group if p.requires_grad], lr=0.05) for kind, group in zip(kinds, groups, strict=True)),
            torch.optim.Adam(self.model.head.parameters(), lr=0.01),
        ]


def test_several_optimizers_by_hand(tmp_path: Path):
    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.counts: list[tuple[bool, list[float]]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            adagrad, _, adam = trainer.optimizers
            first = adagrad.param_groups[0]["params"][0]
            head = adam.param_groups[0]["params"][0]
            self.counts.append([float(adagrad.state[first]["step"]), float(adam.state[head]["step"])])

    steps, callback = Steps(), LaLoraCallback(rank=4, condense_to=1.5, condense_at=0.5)
    new_trainer(tmp_path, callback, steps).fit(ByHand(), loader())
    # Each batch is a step of the run. The head's optimizer goes on, the others begin anew.
    assert steps.counts[8:12] == [[9, 9], [0, 10], [1, 11], [2, 12]]
    ranks = [ranks for _, ranks, _ in callback.history]
    assert ranks[AT - 1] != ranks[AT] == ranks[-1]
    assert all(then == ranks[AT] for then in ranks[AT:])


def other_optimizer(kind: Any, **settings: Any) -> type[pl.LightningModule]:
    class Other(DroppingClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return kind(self.parameters(), lr=0.05, **settings)

    return Other


class Saving(pl.Callback):
    """Saves checkpoints after some steps; beside a callback that condenses, before or after it does."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"save_adapter_only": True, "min_rank": 0, "condense_to": 0.5}),
        (torch.optim.Adagrad, {"fixed_ranks": True}),
        (functools.partial(torch.optim.SGD, momentum=0.9, fused=True), {"contribution": "fisher"}),
        (functools.partial(torch.optim.Adam, fused=True, amsgrad=True), {"freeze_after": 0.3, "interval": 2}),
    ],
    ids=["AdamW", "nothing", "Adagrad", "SGD", "Adam"],
)
def test_a_run_is_resumed_before_at_and_after(tmp_path: Path, kind: Any, settings: dict[str, Any]):
    module = other_optimizer(kind)
    settings = {"rank": 4, "gamma": 20.0, "condense_to": 1.5, "condense_at": 0.5, **settings}
    # The ends of epochs; elsewhere, a loader does not know where it was.
    steps = [7, 14, 21]

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[nn.Module, LaLoraCallback, pl.Trainer]:
        torch.manual_seed(1)
        task, callback = module(), LaLoraCallback(**settings)
        before, after = Saving(tmp_path / "before", steps), Saving(tmp_path / "after", steps)
        saving = () if ckpt_path else (before, after)
        callbacks = [*saving[:1], callback, *saving[1:]]
        trainer = new_trainer(folder, *callbacks, log_every_n_steps=50, max_epochs=4)
        trainer.fit(task, DataLoader(loader().dataset, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        return task, callback, trainer

    whole, whole_callback, whole_trainer = run(tmp_path)
    for path in [*tmp_path.glob("before/*.ckpt"), *tmp_path.glob("after/*.ckpt")]:
        resumed, callback, trainer = run(tmp_path / "resumed", path)
        assert callback.history == whole_callback.history, path
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (path, name)
        for optimizer, expected in zip(trainer.optimizers, whole_trainer.optimizers, strict=True):
            torch.testing.assert_close(optimizer.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert len(list(tmp_path.glob("*/*.ckpt"))) == 6


def test_logs_of_a_resumed_run_lack_no_step(tmp_path: Path):
    """Steps between the last logging step and the checkpoint are logged by the run that goes on."""

    def run(name: str, *callbacks: pl.Callback, **settings: Any) -> dict[int, list[int]]:
        torch.manual_seed(0)
        logger = CSVLogger(tmp_path, name=name)
        callback = LaLoraCallback(rank=4, gamma=4.0, group_by="module", condense_to=1.5, condense_at=0.8)
        trainer = new_trainer(tmp_path, callback, *callbacks, logger=logger, log_every_n_steps=9)
        try:
            trainer.fit(TinyClassifier(), loader(), **settings)
        except InterruptedError:
            return {}
        logger.save()
        run = read_run(Path(logger.log_dir))
        return dict(zip(run.steps, map(list, run.ranks), strict=True))

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 16:
                raise InterruptedError

    whole = run("whole")
    assert run("stopped", Saving(tmp_path, [14]), Stop()) == {}
    resumed = run("resumed", ckpt_path=tmp_path / "14.ckpt")
    # The ninth and the eighteenth are logging steps.
    assert min(resumed) == 10
    assert resumed == {step: ranks for step, ranks in whole.items() if step > 9}


def test_logs_have_every_change_at_its_step(tmp_path: Path):
    """With the Trainer's default of logging every 50 steps, a budget that fills in 20 is no flat line."""
    logger = CSVLogger(tmp_path)
    callback = LaLoraCallback(rank=8, gamma=1.0, group_by="module", condense_to=2, condense_at=130)
    trainer = new_trainer(tmp_path, callback, logger=logger, log_every_n_steps=50, max_epochs=10)
    trainer.fit(TinyClassifier(), loader(17))
    history = {step: ranks for step, ranks, _ in callback.history}
    assert list(history) == list(range(171))
    changes = [step for step in range(2, 171) if history[step] != history[step - 1]]
    assert len(changes) >= 40
    assert 130 in changes
    logger.save()
    run = read_run(Path(logger.log_dir))
    logged = dict(zip(run.steps, map(list, run.ranks), strict=True))
    assert set(changes) <= logged.keys()
    assert all(history[step] == ranks for step, ranks in logged.items())
    callback.plot()


@pytest.mark.parametrize("settings", [{}, {"min_rank": 0, "group_by": "module"}, {"contribution": "fisher"}], ids=str)
def test_no_step_waits_for_the_device(settings: dict[str, Any]):
    """The meta device has no values, so whatever asks for one is an error."""
    with torch.device("meta"):
        model = TinyTransformer()
        add_lora(model, rank=4)
        allocator, history = RankAllocator(model, **settings), RankHistory()
        for step in range(1, 4):
            allocator.observe_gradients()
            allocator.step()
            history.note(step, step - 1, allocator)
        with pytest.raises(NotImplementedError, match="meta"):
            history.read(allocator)


def test_only_logging_steps_wait_for_the_device(tmp_path: Path):
    """A copy from the device, of everything at once, and no operation that waits for it."""
    counts: dict[int, int] = {}

    class Counted(LaLoraCallback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            with OperationCounter() as counter:
                super().on_train_batch_end(trainer, *args)
            counts[trainer.global_step] = sum(counter.counts[name] for name in SYNCHRONIZING)

    callback = Counted(rank=4, condense_to=1.5, condense_at=12)
    new_trainer(tmp_path, callback, log_every_n_steps=9, max_steps=20, max_epochs=-1).fit(TinyClassifier(), loader())
    assert {step for step, count in counts.items() if count} == {12}


def test_memory_stays_bounded_without_logging_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lalora_lightning.allocator.history.MAX_READINGS", 40)
    monkeypatch.setattr("lalora_lightning.allocator.history.MAX_PENDING", 20)
    sizes: list[list[int]] = []

    class Sizes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            history = callback._history
            sizes.append([len(history._pending), len(history._unlogged), len(history.readings)])

    callback, logger = LaLoraCallback(rank=4, group_by="module"), CSVLogger(tmp_path)
    saving = Saving(tmp_path, list(range(70, 140)))
    trainer = new_trainer(tmp_path, callback, Sizes(), saving, logger=logger, log_every_n_steps=0, max_epochs=20)
    trainer.fit(TinyClassifier(), loader())
    assert [max(each) for each in zip(*sizes, strict=True)] <= [21, 41, 41]
    steps = [step for step, *_ in callback.history]
    assert (steps[0], steps[-1]) == (0, 140)
    assert callback.history[-1][1] == callback.allocator.ranks.tolist()


def test_a_run_that_failed_leaves_nothing_to_the_next_module(tmp_path: Path):
    """Its last steps are still on the device, and belong to another number of layers."""

    class Failing(TinyClassifier):
        def on_train_batch_start(self, *args: Any) -> None:
            if self.global_step == 5:
                raise InterruptedError

    class Shallow(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyTransformer(depth=2)

    callback = LaLoraCallback(rank=4, condense_to=1.5)
    with pytest.raises(InterruptedError):
        new_trainer(tmp_path, callback, log_every_n_steps=50).fit(Failing(), loader())
    new_trainer(tmp_path, callback, log_every_n_steps=50).fit(Shallow(), loader())
    assert [step for step, *_ in callback.history] == list(range(22))
    assert {len(ranks) for _, ranks, _ in callback.history} == {2}


@pytest.mark.parametrize(("at", "step"), [(1, 1), (13, 13), (0.7, 14), (1.0, 21), (1e-9, 1), (0.25, 5)])
def test_when_it_condenses(tmp_path: Path, at: float, step: int):
    recorder, callback = Recorder(), LaLoraCallback(rank=4, condense_to=1.5, condense_at=at)
    new_trainer(tmp_path, callback, recorder).fit(TinyClassifier(), loader())
    assert [step for step, states in recorder.states.items() if states == [False]] == [step]


def test_a_run_that_ends_before_is_told(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, condense_to=1.5, condense_at=22)
    with pytest.warns(UserWarning, match="not condensed, because the run ended at step 21, before step 22"):
        new_trainer(tmp_path, callback).fit(module, loader())
    # EarlyStopping, too.
    stopping = EarlyStopping("rank/total", stopping_threshold=13.0, mode="max", check_on_train_epoch_end=True)
    callback = LaLoraCallback(rank=4, gamma=20.0, condense_to=1.5, condense_at=0.9)
    with pytest.warns(UserWarning, match=r"ended at step \d+, before step 63"):
        new_trainer(tmp_path, callback, stopping, max_epochs=10).fit(TinyClassifier(), loader())


def test_a_trial_of_one_step_is_no_run_that_is_too_short(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="La-LoRA")
        callback = LaLoraCallback(rank=4, condense_to=1.5, condense_at=100)
        new_trainer(tmp_path, callback, fast_dev_run=True).fit(TinyClassifier(), loader(), loader(2))


def test_a_run_of_unknown_length_needs_a_number_of_steps(tmp_path: Path):
    callback = LaLoraCallback(rank=4, condense_to=1.5)
    with pytest.raises(ValueError, match=r"known length for condense_at=0\.7"):
        new_trainer(tmp_path, callback, max_epochs=-1).fit(TinyClassifier(), loader())
    callback = LaLoraCallback(rank=4, condense_to=1.5, condense_at=8)
    new_trainer(tmp_path, callback, max_epochs=-1, max_time={"seconds": 1}).fit(TinyClassifier(), loader())
    assert callback.allocator.condensed


def test_fit_called_again(tmp_path: Path):
    """A first run that was too short, a second one that condenses, and a third one at the same ranks."""
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, condense_to=1.5, condense_at=15)
    with pytest.warns(UserWarning, match="ended at step 7, before step 15"):
        new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    new_trainer(tmp_path, callback).fit(module, loader())
    ranks = [ranks for _, ranks, _ in callback.history]
    # The 15th step of the second run.
    assert callback.allocator.steps == 7 + 21
    assert all(then == ranks[15] for then in ranks[15:])
    assert callback.allocator.condensed
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="La-LoRA")
        new_trainer(tmp_path, callback).fit(module, loader())
    assert all(then == ranks[15] for _, then, _ in callback.history)
    # Another module begins anew.
    new_trainer(tmp_path, callback, max_epochs=3).fit(TinyClassifier(), loader())
    assert callback.allocator.steps == 21
    assert len({tuple(ranks) for _, ranks, _ in callback.history}) > 1


def test_what_fixed_ranks_found_stays_in_the_next_run(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, fixed_ranks=True, condense_to=1.5)
    for _ in range(2):
        new_trainer(tmp_path, callback).fit(module, loader())
    ranks = callback.allocator.ranks.tolist()
    assert sum(ranks) <= 4.5
    assert [int(block.query.rank) for block in module.model.blocks] == ranks


def test_the_learning_rate_finder_and_sanity_checks_leave_no_trace(tmp_path: Path):
    def run(search: bool) -> tuple[nn.Module, LaLoraCallback]:
        torch.manual_seed(0)
        module, callback = TinyClassifier(), LaLoraCallback(rank=4, condense_to=1.5, condense_at=0.5)
        finder = [pl.callbacks.LearningRateFinder(num_training_steps=12, update_attr=False)] if search else []
        new_trainer(tmp_path, callback, *finder, enable_checkpointing=search).fit(module, loader(), loader(2))
        return module, callback

    plain, plain_callback = run(search=False)
    searched, callback = run(search=True)
    assert callback.history == plain_callback.history
    for name, value in plain.state_dict().items():
        assert torch.equal(value, searched.state_dict()[name]), name


@pytest.mark.parametrize(
    "averaging", [lambda: WeightAveraging(use_buffers=True), lambda: StochasticWeightAveraging(swa_lrs=0.01)]
)
def test_averages_are_refused(tmp_path: Path, averaging: Any):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, condense_to=1.5)
    with pytest.raises(ValueError, match=r"condense_to=None with .*WeightAveraging.* call condense_lora"):
        new_trainer(tmp_path, callback, averaging()).fit(module, loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condense_to": 0.5}, r"at least min_rank=1 but got 0\.5"),
        ({"condense_to": 0.0, "min_rank": 0}, "positive average rank"),
        ({"condense_to": -1.0}, "positive average rank"),
        ({"condense_to": float("nan")}, "positive average rank"),
        ({"condense_to": 2, "condense_at": 0}, "condense_at"),
        ({"condense_to": 2, "condense_at": 1.5}, "condense_at"),
        ({"condense_to": 2, "condense_at": True}, "condense_at"),
        ({"condense_to": 2, "fixed_ranks": {"blocks.1": 2}}, "fixed_ranks=True"),
        ({"condense_to": 2, "min_rank": 2}, "min_rank to be 0 or 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LaLoraCallback(rank=4, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4, "condense_to": 4}, "below the maximum rank 4 but got 4"),
        ({"rank": 4, "condense_to": 0.1, "min_rank": 0, "group_by": "module"}, "at least 16 parameters"),
        ({"rank": 4, "condense_to": 2, "init": "pissa"}, r"Cannot condense model\.blocks\.0\.query\. .* init='pissa'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path: Path, settings: dict[str, Any], message: str):
    module, callback = TinyClassifier(), LaLoraCallback(**settings)
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, callback).fit(module, loader())
    assert module.optimizer_steps == 0


def test_the_rank_report_of_fixed_ranks_has_no_contributions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    callback = LaLoraCallback(rank=4, fixed_ranks=True, condense_to=1.5)
    new_trainer(tmp_path, callback, enable_model_summary=True).fit(TinyClassifier(), loader())
    out = capsys.readouterr().out
    assert "nan" not in out
    ranks = callback.allocator.ranks.tolist()
    assert [line.split()[:4] for line in out.splitlines() if "█" in line] == [
        [str(i), str(rank), "-", "-"] for i, rank in enumerate(ranks)
    ]


@pytest.mark.parametrize("min_rank", [0, 1])
def test_the_rank_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], min_rank: int):
    callback = LaLoraCallback(rank=4, group_by="module", condense_to=1.0, condense_at=0.5, min_rank=min_rank)
    trainer = new_trainer(tmp_path, callback, enable_model_summary=True)
    trainer.fit(TinyClassifier(), loader())
    out = capsys.readouterr().out
    assert "total rank 6 of LoRA's 24 (25%), budget 6.0" in out
    # The budget is as small as it was asked to be.
    assert "increase gamma" not in out
    ranks = callback.allocator.ranks.tolist()
    # Blocks by kind of projection: block, query, value.
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert [int(rank) for row in rows for rank in row[1:]] == ranks
    assert (min(ranks) == 0) == (min_rank == 0)


def test_a_layer_of_rank_0_comes_back():
    """Its factors stay, so that the allocator can give it a rank again."""
    model = TinyTransformer()
    add_lora(model, rank=4)
    allocator = RankAllocator(model, gamma=0.0, min_rank=0)
    for block, scale in zip(model.blocks, (1.0, 1e-3, 1e-3), strict=True):
        nn.init.normal_(block.query.lora_B, std=scale)
        nn.init.normal_(block.value.lora_B, std=scale)
        for layer in (block.query, block.value):
            layer.lora_A.data.mul_(scale)
    allocator.step()
    assert allocator.ranks.tolist()[0] > 1
    assert 0 in allocator.ranks.tolist()
    state = copy.deepcopy(allocator.state_dict())
    again = copy.deepcopy(model)
    other = RankAllocator(again, gamma=0.0, min_rank=0)
    other.load_state_dict(state)
    assert other.ranks.tolist() == allocator.ranks.tolist()
    assert [int(block.value.rank) for block in again.blocks] == allocator.ranks.tolist()
    for layer in lora_layers(model).values():
        nn.init.ones_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
    for _ in range(3):
        allocator.step()
    assert allocator.ranks.tolist() == [1, 1, 1]


def condensed_run(
    folder: Path, world: int, strategy: Any, epochs: int = 2, ckpt_path: Path | None = None, **settings: Any
) -> tuple[list[tuple[int, list[int], float]], dict[str, Tensor], pl.Trainer]:
    """Fit; returns the history, and the increments and whole factors."""
    torch.manual_seed(0)
    module = ShardedClassifier() if isinstance(strategy, ModelParallelStrategy) else TinyClassifier()
    settings = {"rank": 4, "gamma": 20.0, "group_by": "module", "condense_to": 1.5, "condense_at": STEPS, **settings}
    callback = LaLoraCallback(**settings)
    trainer = new_trainer(folder, callback, strategy=strategy, devices=world, max_epochs=epochs)
    trainer.fit(module, batches(world), ckpt_path=ckpt_path)
    layers = lora_layers(module)
    tensors = {name: layer.increment().detach() for name, layer in layers.items()}
    for name, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            factor = getattr(layer, key).detach()
            tensors[f"{name}.{key}"] = factor.full_tensor() if hasattr(factor, "full_tensor") else factor.clone()
    return callback.history, tensors, trainer


@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("ddp", 2, {"fixed_ranks": True}),
        ("ddp", 4, {"contribution": "fisher"}),
        ("fsdp2", 2, {"min_rank": 0, "condense_to": 0.7}),
        ("fsdp2", 4, {"group_by": "kind"}),
    ],
)
def test_several_processes_condense_alike(
    tmp_path: Path, name: str, world: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def work() -> Any:
        return condensed_run(tmp_path, world, strategy_of(name, world), **settings)[:2]

    results = in_processes(world, tmp_path, work)
    history, tensors, _ = condensed_run(tmp_path, 1, "auto", **settings)
    assert history[STEPS][1] != history[STEPS - 1][1]
    for theirs, their_tensors in results:
        assert theirs == results[0][0]
        assert [(step, ranks) for step, ranks, _ in theirs] == [(step, ranks) for step, ranks, _ in history]
        for key, value in their_tensors.items():
            assert torch.equal(value, results[0][1][key])
            # Singular vectors may have the other sign.
            if "lora_" not in key:
                torch.testing.assert_close(value, tensors[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("epochs", [1, 2], ids=["at", "after"])
@pytest.mark.parametrize("in_one_file", [True, False])
def test_a_sharded_run_is_resumed(tmp_path: Path, epochs: int, in_one_file: bool, monkeypatch: pytest.MonkeyPatch):
    """Right after condensing, the optimizer has no state for the adapters."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    run = functools.partial(condensed_run, tmp_path, 2, save_adapter_only=in_one_file)

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=not in_one_file)

    def work() -> Any:
        whole = run(strategy(), epochs=3)[:2]
        *_, trainer = run(strategy(), epochs=epochs)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return whole, run(strategy(), epochs=3, ckpt_path=tmp_path / "half.ckpt")[:2]

    for (whole, tensors), (resumed, same) in in_processes(2, tmp_path, work):
        assert resumed == whole
        for key, value in tensors.items():
            assert torch.equal(same[key], value), key


def test_a_run_is_drawn_after_layers_of_rank_0_were_trimmed_away(tmp_path: Path):
    def group_by(name: str) -> str:
        """The value projections share a rank, which costs three times as much as that of a query projection."""
        return name if name.endswith("query") else "values"

    module, callback = TinyClassifier(), LaLoraCallback(rank=4, min_rank=0, group_by=group_by)
    new_trainer(tmp_path, callback).fit(module, loader())
    module.model.blocks[0].query.set_rank(0)
    trim_lora(module)
    assert len(lora_layers(module)) == 5
    assert callback.plot().axes
