"""LaLoraCallback together with what else a Trainer can do."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback, lora_layers
from tests.helpers.training import TinyClassifier, loader, new_trainer


def ranks_in_force(module: TinyClassifier) -> list[int]:
    layers = lora_layers(module)
    return [int(layers[f"model.blocks.{i}.query"].rank) for i in range(3)]


def fit(
    folder: Path, module: TinyClassifier, *callbacks: pl.Callback, **settings: Any
) -> tuple[LaLoraCallback, pl.Trainer]:
    """Fit with one validation batch; the layers hold what the allocator decided, whatever else happened."""
    callback = LaLoraCallback(rank=4, gamma=1.0)
    trainer = new_trainer(folder, callback, *callbacks, **settings)
    trainer.fit(module, loader(), loader(1))
    assert ranks_in_force(module) == callback.allocator.ranks.tolist()
    return callback, trainer


def test_accumulation_that_changes_during_the_run(tmp_path: Path):
    """7 batches an epoch: 7 steps, then 4 of two batches, then 2 of four."""
    callback, trainer = fit(tmp_path, TinyClassifier(), GradientAccumulationScheduler({1: 2, 2: 4}))
    assert trainer.global_step == callback.allocator.steps == 7 + 4 + 2


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_fisher_average_takes_gradients_before_they_are_clipped(tmp_path: Path, algorithm: str):
    fishers = []
    for clip in (None, 1e-9):
        torch.manual_seed(0)
        callback = LaLoraCallback(rank=4, contribution="fisher")
        trainer = new_trainer(
            tmp_path, callback, gradient_clip_val=clip, gradient_clip_algorithm=algorithm, max_steps=1
        )
        trainer.fit(TinyClassifier(), loader())
        fishers.append(callback.allocator.state_dict()["fisher"])
    assert fishers[0].any()
    assert torch.equal(*fishers)


def test_gradients_may_be_clipped(tmp_path: Path):
    callback, _ = fit(tmp_path, TinyClassifier(), gradient_clip_val=0.1)
    assert callback.allocator.steps == 21


class TwoOptimizers(TinyClassifier):
    """Manual optimization: the adapters at every batch, the head at every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        head = list(self.model.head.parameters())
        others = [p for p in self.parameters() if p.requires_grad and all(p is not q for q in head)]
        return [torch.optim.AdamW(others, lr=0.05), torch.optim.SGD(head, lr=0.1)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers if batch_idx % 2 else optimizers[:1]:
            optimizer.step()
            optimizer.zero_grad()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


def test_several_optimizers_by_hand_are_one_step_a_batch(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    callback, trainer = fit(tmp_path, TwoOptimizers(), logger=logger, log_every_n_steps=5)
    # Lightning counts the steps of both, but not for its loggers.
    assert trainer.global_step == 3 * (7 + 3)
    assert callback.allocator.steps == 21
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["rank/total"]]
    assert {4, 9, 14, 19, 20} <= set(steps) <= set(range(21))


def test_early_stopping_by_the_total_rank(tmp_path: Path):
    stopping = EarlyStopping("rank/total", stopping_threshold=4, mode="max", check_on_train_epoch_end=True)
    callback, trainer = fit(tmp_path, TinyClassifier(), stopping, max_epochs=50)
    assert trainer.current_epoch < 50
    assert int(callback.allocator.ranks.sum()) > 4


def test_the_best_checkpoint_has_the_ranks_of_its_step(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{step}")
    callback, _ = fit(tmp_path, TinyClassifier(), checkpoints, enable_checkpointing=True)
    history = {step: ranks for step, ranks, _ in callback.history}
    assert len(checkpoints.best_k_models) == 3
    for path in checkpoints.best_k_models:
        checkpoint = torch.load(path, weights_only=True)
        state = checkpoint["state_dict"]
        assert [int(state[f"model.blocks.{i}.query.rank_mask"].sum()) for i in range(3)] == history[
            checkpoint["global_step"]
        ]


@pytest.mark.parametrize("position", [0, 1])
def test_the_learning_rate_finder_leaves_no_trace(tmp_path: Path, position: int):
    plain, plain_callback = start()
    new_trainer(tmp_path, plain_callback).fit(plain, loader())

    module, callback = start()
    finder = LearningRateFinder(num_training_steps=10, update_attr=False)
    callbacks = [callback]
    callbacks.insert(position, finder)
    new_trainer(tmp_path, *callbacks).fit(module, loader())
    assert finder.optimal_lr is not None
    assert callback.history == plain_callback.history
    for got, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(got, expected)


def test_the_tuner_finds_a_learning_rate_before_fit(tmp_path: Path):
    module, callback = start()
    trainer = new_trainer(tmp_path, callback)
    found = Tuner(trainer).lr_find(module, loader(40), num_training=40)
    assert module.lr == found.suggestion() != 0.05
    trainer.fit(module, loader())
    assert callback.allocator.steps == 21


def start() -> tuple[TinyClassifier, LaLoraCallback]:
    torch.manual_seed(0)
    return TinyClassifier(), LaLoraCallback(rank=4, gamma=1.0)


def test_the_batch_size_finder_leaves_no_trace(tmp_path: Path):
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(loader().dataset, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    module, callback = start()
    data = Data()
    new_trainer(tmp_path, callback, BatchSizeFinder(steps_per_trial=2, max_trials=2), max_epochs=1).fit(module, data)
    assert data.batch_size == 4
    assert callback.allocator.steps == 7
    assert [step for step, _, _ in callback.history] == list(range(8))
    assert ranks_in_force(module) == callback.allocator.ranks.tolist()


def test_overfit_batches(tmp_path: Path):
    callback, _ = fit(tmp_path, TinyClassifier(), overfit_batches=2, max_epochs=10)
    assert callback.allocator.steps == 20


def test_fast_dev_run(tmp_path: Path):
    callback, _ = fit(tmp_path, TinyClassifier(), fast_dev_run=True)
    assert callback.allocator.steps == 1


def test_validation_inside_an_epoch_changes_nothing(tmp_path: Path):
    module, callback = start()
    new_trainer(tmp_path, callback).fit(module, loader())
    again, often = start()
    new_trainer(tmp_path, often, val_check_interval=2, num_sanity_val_steps=2).fit(again, loader(), loader(2))
    assert often.history == callback.history
    for got, expected in zip(again.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path: Path, precision: str):
    module = TinyClassifier()
    callback, _ = fit(tmp_path, module, precision=precision)
    expected = {"bf16-mixed": torch.float32, "bf16-true": torch.float32, "64-true": torch.float64}
    assert module.model.blocks[0].query.lora_A.dtype == expected[precision]
    assert callback.allocator.ranks.dtype == torch.long
    # Never less: a budget in bfloat16 would stand still.
    assert callback.allocator.budget.dtype in (torch.float32, torch.float64)
    budgets = [budget for *_, budget in callback.history]
    assert budgets[-1] > budgets[0] == 3.0


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_a_gradient_scaler_that_skips_steps(tmp_path: Path, contribution: str):
    """The scale starts so high that the loss overflows until it has been halved a few times."""

    class Large(TinyClassifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return 100 * super().training_step(batch, batch_idx)

    module = Large()
    callback = LaLoraCallback(rank=4, gamma=1.0, contribution=contribution)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler
    before = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            before.setdefault(trainer.global_step, float(pl_module.model.blocks[0].query.lora_B.detach().abs().sum()))

    new_trainer(tmp_path, callback, Watch(), plugins=[plugin]).fit(module, loader())
    skipped = [step for step, change in before.items() if change == 0]
    assert 1 <= len(skipped) < 10
    assert scaler.get_scale() < 2.0**127
    ranks = {step: ranks for step, ranks, _ in callback.history}
    assert all(ranks[step] == [1, 1, 1] for step in skipped)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert int(callback.allocator.skipped) == 0
    assert ranks_in_force(module) == callback.allocator.ranks.tolist() == ranks[21]
    assert sum(ranks[21]) > 3


def test_sanity_checking_needs_no_allocator(tmp_path: Path):
    class Checked(TinyClassifier):
        def on_validation_start(self) -> None:
            seen.append(ranks_in_force(self))

    seen: list[list[int]] = []
    callback, _ = fit(tmp_path, Checked(), num_sanity_val_steps=1, max_epochs=1)
    assert len(seen) == 2
    # A fresh adapter is none at any rank.
    assert seen[1] == callback.history[-1][1]
