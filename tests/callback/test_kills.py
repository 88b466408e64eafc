"""Training that is killed over and over, at random moments, and resumed each time."""

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback
from tests.helpers.training import DroppingClassifier, loader, new_trainer

EPOCHS, KILLS = 70, 24
STEP, VALIDATION, WRITING = 1, 2, 3


class Progress:
    """What the process that trains tells the one that kills it."""

    def __init__(self, context: Any) -> None:
        self.phase, self.epochs = context.Value("i", 0), context.Value("i", 0)


class Reporter(pl.Callback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_start(self, *args: Any) -> None:
        self.progress.phase.value = STEP

    def on_validation_start(self, *args: Any) -> None:
        self.progress.phase.value = VALIDATION

    def on_train_epoch_end(self, *args: Any) -> None:
        self.progress.epochs.value += 1


class ReportingIO(TorchCheckpointIO):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.progress.phase.value = WRITING
        super().save_checkpoint(*args, **kwargs)


def train(folder: Path, progress: Progress) -> None:
    """Start, or go on from the last checkpoint; at the end write weights and history."""
    torch.manual_seed(1)
    module, callback = DroppingClassifier(), LaLoraCallback(rank=4, gamma=0.5, save_adapter_only=True)
    checkpoints = ModelCheckpoint(folder, monitor="val/loss", save_top_k=2, save_last=True)
    trainer = new_trainer(
        folder,
        callback,
        Reporter(progress),
        checkpoints,
        plugins=[ReportingIO(progress)],
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
    trainer.fit(module, shuffled, loader(2), ckpt_path=last if last.exists() else None)
    torch.save({"history": callback.history, "weights": module.state_dict()}, folder / "end.pt")


def start(folder: Path) -> tuple[Any, Progress]:
    # Forked: torch need not be imported again.
    context = multiprocessing.get_context("fork")
    progress = Progress(context)
    process = context.Process(target=train, args=(folder, progress))
    process.start()
    return process, progress


def test_a_run_that_was_killed_and_resumed_is_the_run_that_never_was(tmp_path: Path):
    rng = random.Random(0)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    process, _ = start(uninterrupted)
    process.join(timeout=120)
    assert process.exitcode == 0

    kills = {STEP: 0, VALIDATION: 0, WRITING: 0}
    while sum(kills.values()) < KILLS:
        process, progress = start(killed)
        epochs, phase = rng.choice([0, 0, 1, 2, 3]), rng.choice(list(kills))
        while process.is_alive() and (progress.epochs.value < epochs or progress.phase.value != phase):
            time.sleep(0.0001)
        time.sleep(rng.uniform(0.0, 0.002))
        phase = progress.phase.value
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run came to its end before all kills"
        kills[phase] += 1
        for file in killed.glob("*.ckpt"):
            torch.load(file, weights_only=True)
    assert min(kills.values()) >= KILLS // 8
    assert torch.load(killed / "last.ckpt", weights_only=True)["epoch"] > 10

    process, _ = start(killed)
    process.join(timeout=120)
    assert process.exitcode == 0
    end, expected = (torch.load(folder / "end.pt", weights_only=True) for folder in (killed, uninterrupted))
    assert end["history"] == expected["history"]
    assert len({tuple(ranks) for _, ranks, _ in expected["history"]}) > 3
    assert end["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        assert torch.equal(end["weights"][key], value)
