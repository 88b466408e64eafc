"""Runs at fixed ranks."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback, add_lora, lora_layers, trim_lora
from tests.helpers.training import TinyClassifier, loader, new_trainer


@pytest.mark.parametrize(
    ("fixed_ranks", "ranks"), [(True, [4, 4, 4]), ({"blocks.0": 1, "blocks.2": 3}, [1, 4, 3])], ids=["LoRA", "pattern"]
)
def test_fixed_ranks_train_and_are_never_touched(fixed_ranks, ranks, tmp_path):
    task, callback = TinyClassifier(), LaLoraCallback(rank=4, fixed_ranks=fixed_ranks, save_adapter_only=True)
    trainer = new_trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    trainer.fit(task, loader())
    assert callback.allocator is None
    assert [int(task.model.blocks[i].query.rank) for i in range(3)] == ranks
    assert [task.model.blocks[i].query.max_rank for i in range(3)] == ranks
    assert all(layer.lora_B.any() for layer in lora_layers(task).values())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")

    resumed = TinyClassifier()
    again = LaLoraCallback(rank=4, fixed_ranks=fixed_ranks)
    new_trainer(tmp_path / "resumed", again, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "whole.ckpt")
    assert [int(resumed.model.blocks[i].query.rank) for i in range(3)] == ranks


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
def test_a_run_at_fixed_ranks_resumes_as_if_it_had_never_stopped(settings, tmp_path):
    def run(folder, epochs, ckpt_path=None):
        torch.manual_seed(0)
        task, callback = TinyClassifier(), LaLoraCallback(rank=4, fixed_ranks=True, **settings)
        trainer = new_trainer(folder, callback, max_epochs=epochs)
        trainer.fit(task, DataLoader(loader().dataset, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        return trainer, task

    _, whole = run(tmp_path, 4)
    trainer, _ = run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path, 4, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_fixed_ranks_are_the_maximum_after_a_run_at_adaptive_ones(tmp_path):
    task = TinyClassifier()
    new_trainer(tmp_path, LaLoraCallback(rank=4, gamma=0.0)).fit(task, loader())
    assert {int(layer.rank) for layer in lora_layers(task).values()} == {1}
    trimmed = copy.deepcopy(task)
    callback = LaLoraCallback(rank=4, fixed_ranks=True)
    with pytest.warns(UserWarning, match=r"model\.blocks\.0\.query the first\) are raised to the maximum rank"):
        new_trainer(tmp_path, callback).fit(task, loader())
    assert {int(layer.rank) for layer in lora_layers(task).values()} == {4}
    trim_lora(trimmed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="La-LoRA")
        new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=True)).fit(trimmed, loader())
    assert {int(layer.rank) for layer in lora_layers(trimmed).values()} == {1}
    with pytest.raises(RuntimeError, match="its ranks are fixed"):
        callback.plot()


@pytest.mark.parametrize("fixed", [False, True])
def test_a_checkpoint_of_adaptive_ranks_is_none_of_fixed_ones(fixed, tmp_path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=not fixed))
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="set fixed_ranks as in that run"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=fixed)).fit(
            TinyClassifier(), loader(), ckpt_path=tmp_path / "other.ckpt"
        )


def test_a_pattern_needs_a_module_that_is_not_adapted_yet(tmp_path):
    task = TinyClassifier()
    add_lora(task, rank=4)
    with pytest.raises(ValueError, match="pass the ranks to add_lora as rank_pattern"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks={"blocks.1": 2})).fit(task, loader())
    callback = LaLoraCallback(rank=4, fixed_ranks={"blocks.1": 2})
    task = TinyClassifier()
    for _ in range(2):
        # Its own layers are no other's.
        new_trainer(tmp_path, callback).fit(task, loader())
    assert task.model.blocks[1].query.max_rank == 2
