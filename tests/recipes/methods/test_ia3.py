"""(IA)^3: its factors are not decayed, whatever the optimizer's groups and schedule."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lalora_lightning.modules.task import TaskModule
from recipes.methods import METHODS
from recipes.methods.ia3 import exempt_from_decay
from tests.recipes.methods.models import vision
from tests.recipes.methods.test_methods import COUNTS


def new_run(steps: int, *callbacks: pl.Callback) -> tuple[TaskModule, pl.Trainer, DataLoader]:
    module, batch = vision()
    module.weight_decay = 0.1
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*METHODS["ia3"].adapt(module), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    return module, trainer, DataLoader([batch] * 100, batch_size=None)


def test_factors_are_not_decayed():
    module, trainer, data = new_run(10)
    trainer.fit(module, data)
    decayed, spared = trainer.optimizers[0].param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 16)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in spared["params"]) == COUNTS["ia3"] + 2
    # In the order of the model, as if the optimizer had been built with these groups.
    ids = {id(p) for p in spared["params"]}
    assert all(a is b for a, b in zip(spared["params"], [p for p in module.parameters() if id(p) in ids], strict=True))


def test_the_schedule_applies_to_all_factors():
    rates: list[list[float]] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    module, trainer, data = new_run(4, Rates())
    trainer.fit(module, data)
    assert rates == [pytest.approx([2e-2 * (4 - step) / 4] * 2) for step in range(4)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    whole, trainer, data = new_run(10, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    trainer.fit(whole, data)
    resumed, trainer, data = new_run(10)
    trainer.fit(resumed, data, ckpt_path=tmp_path / "step=5.ckpt")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_groups(optimizer_class: Any):
    a, b, factor, other = (nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    # All of a group: the group is not decayed any more.
    optimizer = optimizer_class([{"params": [a]}, {"params": [factor]}], lr=0.1, weight_decay=0.1)
    exempt_from_decay(optimizer, [factor], [a, factor])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    # Of two groups without decay, the one with the same learning rate.
    spared = {"weight_decay": 0.0}
    groups = [{"params": [factor, a]}, {"params": [other], "lr": 1.0, **spared}, {"params": [b], **spared}]
    optimizer = optimizer_class(groups, lr=0.1, weight_decay=0.1)
    exempt_from_decay(optimizer, [factor], [a, factor, b, other])
    names = {id(a): "a", id(b): "b", id(factor): "factor", id(other): "other"}
    grouped = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert grouped == [["a"], ["other"], ["factor", "b"]]
    # There is none.
    optimizer = optimizer_class([factor, a], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="Expected the optimizer to have a parameter group without weight decay"):
        exempt_from_decay(optimizer, [factor], [a, factor])
