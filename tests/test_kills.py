"""Training that is killed over and over, at random moments, and resumed each time."""

import multiprocessing
import random
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback
from tests.test_callback import Dropping, loader, new_trainer

EPOCHS, KILLS = 60, 24
STEP, VALIDATION, WRITING = 1, 2, 3


class Phase(pl.Callback):
    """Tells the process that kills what is going on."""

    def __init__(self, phase: Synchronized) -> None:
        self.phase = phase

    def on_train_batch_start(self, *args: Any) -> None:
        self.phase.value = STEP

    def on_validation_start(self, *args: Any) -> None:
        self.phase.value = VALIDATION


class PhaseIO(TorchCheckpointIO):
    def __init__(self, phase: Synchronized) -> None:
        self.phase = phase

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.phase.value = WRITING
        super().save_checkpoint(*args, **kwargs)


def train(folder: Path, phase: Synchronized) -> None:
    """Start, or go on from the last checkpoint; at the end write weights and history."""
    torch.manual_seed(1)
    module, callback = Dropping(), LaLoraCallback(rank=4, gamma=0.5, save_adapter_only=True)
    checkpoints = ModelCheckpoint(folder, monitor="val/loss", save_top_k=2, save_last=True)
    trainer = new_trainer(
        folder,
        callback,
        Phase(phase),
        checkpoints,
        plugins=[PhaseIO(phase)],
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
    trainer.fit(module, shuffled, loader(2), ckpt_path=last if last.exists() else None)
    torch.save({"history": callback.history, "weights": module.state_dict()}, folder / "end.pt")


def start(folder: Path) -> tuple[Any, Synchronized]:
    # Forked: torch need not be imported again.
    context = multiprocessing.get_context("fork")
    phase = context.Value("i", 0)
    process = context.Process(target=train, args=(folder, phase))
    process.start()
    return process, phase


def test_a_run_that_was_killed_and_resumed_is_the_run_that_never_was(tmp_path: Path):
    rng = random.Random(0)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    process, _ = start(uninterrupted)
    process.join(timeout=120)
    assert process.exitcode == 0

    kills = {STEP: 0, VALIDATION: 0, WRITING: 0}
    while sum(kills.values()) < KILLS:
        process, phase = start(killed)
        wanted = rng.choice(list(kills))
        # In one of the first epochs after resuming, so that there are epochs left for all kills.
        deadline = time.monotonic() + rng.uniform(0.0, 0.15)
        while process.is_alive() and (time.monotonic() < deadline or phase.value != wanted):
            time.sleep(0.0001)
        time.sleep(rng.uniform(0.0, 0.002))
        seen = phase.value
        process.kill()
        process.join()
        assert process.exitcode == -9, "the run came to its end before all kills"
        kills[seen] += 1
        for file in killed.glob("*.ckpt"):
            torch.load(file, weights_only=True)
    assert min(kills.values()) >= KILLS // 8

    process, _ = start(killed)
    process.join(timeout=120)
    assert process.exitcode == 0
    end, expected = (torch.load(folder / "end.pt", weights_only=True) for folder in (killed, uninterrupted))
    assert end["history"] == expected["history"]
    assert len({tuple(ranks) for _, ranks, _ in expected["history"]}) > 3
    assert end["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        assert torch.equal(end["weights"][key], value)
