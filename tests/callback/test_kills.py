"""Training that is killed over and over, at random moments, and resumed each time."""

import multiprocessing
import os
import random
import signal
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
# Of 7 steps in an epoch; in the middle of the kills.
CONDENSE_AT = 7 * 11 + 3
STEP, VALIDATION, WRITING = 1, 2, 3


class Killer(pl.Callback):
    """Kills its own process some time after a phase of training has begun, at the latest when the phase ends.

    The kernel does it, so that the moment does not depend on when another process gets its turn.
    """

    def __init__(self, epochs: int, phase: int, delay: float) -> None:
        self.epochs, self.phase, self.delay = epochs, phase, delay
        self.current, self.is_due = 0, False

    def on_train_batch_start(self, *args: Any) -> None:
        self.enter(STEP)

    def on_validation_start(self, *args: Any) -> None:
        self.enter(VALIDATION)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.epochs -= 1

    def enter(self, phase: int) -> None:
        if self.is_due and phase != self.current:
            os.kill(os.getpid(), signal.SIGKILL)
        self.current = phase
        if self.epochs <= 0 and phase == self.phase and not self.is_due:
            self.is_due = True
            signal.setitimer(signal.ITIMER_REAL, self.delay)


class KillableIO(TorchCheckpointIO):
    def __init__(self, killer: Killer) -> None:
        self.killer = killer

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.killer.enter(WRITING)
        super().save_checkpoint(*args, **kwargs)
        self.killer.enter(0)


def train(folder: Path, killer: Killer) -> None:
    """Start, or go on from the last checkpoint; at the end write weights and history."""
    # The default action on it: the kernel ends the process at once.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.manual_seed(1)
    module = DroppingClassifier()
    callback = LaLoraCallback(rank=4, gamma=0.5, save_adapter_only=True, condense_to=1.5, condense_at=CONDENSE_AT)
    checkpoints = ModelCheckpoint(folder, monitor="val/loss", save_top_k=2, save_last=True)
    trainer = new_trainer(
        folder,
        callback,
        killer,
        checkpoints,
        plugins=[KillableIO(killer)],
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
    trainer.fit(module, shuffled, loader(2), ckpt_path=last if last.exists() else None)
    torch.save({"history": callback.history, "weights": module.state_dict()}, folder / "end.pt")


def run(folder: Path, killer: Killer) -> int:
    """Train in a process of its own; returns its exit code."""
    # Forked: torch need not be imported again.
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, killer))
    process.start()
    process.join(timeout=600)
    process.kill()
    process.join()
    return process.exitcode


def test_a_run_that_was_killed_and_resumed_is_the_run_that_never_was(tmp_path: Path):
    rng = random.Random(0)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    never = Killer(epochs=EPOCHS + 1, phase=STEP, delay=0.0)
    assert run(uninterrupted, never) == 0

    kills = {STEP: 0, VALIDATION: 0, WRITING: 0}
    last = []
    while sum(kills.values()) < KILLS:
        epochs, phase = rng.choice([0, 0, 1, 2, 3]), rng.choice(list(kills))
        exit_code = run(killed, Killer(epochs, phase, delay=rng.uniform(1e-6, 0.002)))
        assert exit_code in (-signal.SIGKILL, -signal.SIGALRM), "the run came to its end before all kills"
        kills[phase] += 1
        for file in killed.glob("*.ckpt"):
            torch.load(file, weights_only=True)
        if (killed / "last.ckpt").exists():
            last.append(torch.load(killed / "last.ckpt", weights_only=True)["global_step"])
    assert sum(step < CONDENSE_AT for step in last) >= 5
    assert sum(step >= CONDENSE_AT for step in last) >= 5
    assert min(kills.values()) >= KILLS // 8
    assert torch.load(killed / "last.ckpt", weights_only=True)["epoch"] > 10

    assert run(killed, never) == 0
    end, expected = (torch.load(folder / "end.pt", weights_only=True) for folder in (killed, uninterrupted))
    assert end["history"] == expected["history"]
    ranks = {step: tuple(ranks) for step, ranks, _ in expected["history"]}
    assert len(set(ranks.values())) > 3
    assert ranks[CONDENSE_AT - 1] != ranks[CONDENSE_AT] == ranks[7 * EPOCHS]
    assert end["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        assert torch.equal(end["weights"][key], value)
