"""Fit called again, with other Trainers, modules and layers."""

from pathlib import Path

import lightning.pytorch as pl
import pytest

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, load_lora_state_dict, merge_lora
from tests.helpers.training import TinyClassifier, loader, new_trainer


def test_fit_called_twice_goes_on(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader())
    allocator = callback.allocator
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.allocator is allocator
    assert allocator.steps == 14
    assert [step for step, _, _ in callback.history] == list(range(15))


def test_another_module_gets_its_own_allocator(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback, max_epochs=1).fit(TinyClassifier(), loader())
    first = callback.allocator
    new_trainer(tmp_path, callback, max_epochs=1).fit(TinyClassifier(), loader())
    assert callback.allocator is not first
    assert callback.allocator.steps == 7
    assert [step for step, _, _ in callback.history] == list(range(8))


def test_layers_put_in_anew_get_their_own_allocator(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).fit(module, loader())
    merge_lora(module, remove=True)
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.allocator.steps == 7
    assert callback.history[0] == (0, [1, 1, 1], 3.0)
    assert [int(module.model.blocks[i].value.rank) for i in range(3)] == callback.allocator.ranks.tolist()


@pytest.mark.parametrize("fixed_ranks", [False, True])
def test_merged_adapters_are_not_trained(fixed_ranks: bool, tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, fixed_ranks=fixed_ranks)
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    merge_lora(module)
    with pytest.raises(RuntimeError, match=r"model\.blocks\.0\.query is merged.*call unmerge_lora"):
        new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    with pytest.raises(RuntimeError, match=r"model\.blocks\.0\.query is merged.*call unmerge_lora"):
        RankAllocator(module)


def test_ranks_of_an_earlier_run_are_not_lost_in_silence(tmp_path: Path):
    module = TinyClassifier()
    add_lora(module, rank=4)
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(ValueError, match=r"lora\.ckpt to be of a run with LaLoraCallback but it has none of its state"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(TinyClassifier(), loader(), ckpt_path=tmp_path / "lora.ckpt")

    module = TinyClassifier()
    load_lora_state_dict(module, tmp_path / "lora.ckpt")
    with pytest.warns(UserWarning, match="trained already, and their ranks are reset"):
        new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1).fit(module, loader())


def test_a_second_fit_by_another_trainer_draws_one_rising_history(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4)
    for _ in range(2):
        new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert [step for step, _, _ in callback.history] == list(range(8))
    # Another Trainer counts from zero: its first batches are no step, though the last step acted on was the seventh.
    new_trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=3).fit(module, loader())
    assert callback.allocator.steps == 7 + 7 + 3


def test_freezing_after_a_fraction_follows_each_run(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, freeze_after=0.5)
    frozen_after = []

    def fit(trainer: pl.Trainer, path: Path | None = None) -> pl.Trainer:
        trainer.fit(module, loader(), ckpt_path=path)
        frozen_after.append(callback.allocator.settings.freeze_after)
        return trainer

    first = fit(new_trainer(tmp_path, callback, max_epochs=2))
    # The same Trainer goes on: half of all its 28 steps.
    first.fit_loop.max_epochs = 4
    fit(first)
    # Another Trainer, after 28 steps: half of its own 14.
    second = fit(new_trainer(tmp_path, callback, max_epochs=2))
    second.save_checkpoint(tmp_path / "second.ckpt")
    # That run is resumed and made longer: half of its 42 steps, after the 28 of the run before.
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, freeze_after=0.5)
    fit(new_trainer(tmp_path, callback, max_epochs=6), tmp_path / "second.ckpt")
    assert frozen_after == [7, 14, 28 + 7, 28 + 21]
    assert callback.allocator.steps == 28 + 42


def test_ranks_that_were_frozen_at_the_end_of_a_run_move_in_the_next_one(tmp_path: Path):
    module, callback = TinyClassifier(lr=1e-3), LaLoraCallback(rank=4, gamma=1.0, freeze_after=0.5)
    new_trainer(tmp_path, callback, max_epochs=2).fit(module, loader())
    assert callback.allocator.frozen
    budget = float(callback.allocator.budget)
    new_trainer(tmp_path, callback, max_epochs=2).fit(module, loader())
    budgets = [reading[2] for reading in callback.history if reading[0] > 0]
    assert budgets[6] > budget
    assert budgets[7:] == budgets[7:8] * 7
