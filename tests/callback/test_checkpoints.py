"""Checkpoints of a Trainer: resuming, adapter-only checkpoints, damaged ones."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback, add_lora, load_lora_state_dict, lora_layers, merge_lora
from tests.helpers.models import TinyTransformer
from tests.helpers.training import DroppingClassifier, TinyClassifier, loader, new_trainer


@pytest.mark.parametrize("save_adapter_only", [False, True])
@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, contribution: str, save_adapter_only: bool
):
    """Also the rows of a batch, which are drawn at random, and what dropout drops."""

    def start(epochs: int) -> tuple[TinyClassifier, LaLoraCallback, pl.Trainer]:
        torch.manual_seed(1)
        callback = LaLoraCallback(
            rank=4, gamma=3.0, contribution=contribution, save_adapter_only=save_adapter_only, dropout=0.1
        )
        return DroppingClassifier(), callback, new_trainer(tmp_path, callback, max_epochs=epochs)

    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
    whole, whole_callback, trainer = start(4)
    trainer.fit(whole, shuffled, loader(2))

    first, _, trainer = start(2)
    trainer.fit(first, shuffled, loader(2))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert ("model.blocks.0.key.weight" in half["state_dict"]) is not save_adapter_only

    second, second_callback, trainer = start(4)
    trainer.fit(second, shuffled, loader(2), ckpt_path=tmp_path / "half.ckpt")

    assert second_callback.history == whole_callback.history
    assert second_callback.allocator.steps == whole_callback.allocator.steps == 28
    for resumed, uninterrupted in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_a_checkpoint_is_tested_by_a_fresh_module(tmp_path: Path):
    pl.seed_everything(0)
    module = TinyClassifier()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, gamma=3.0, save_adapter_only=True))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.test(module, loader(3), verbose=False)
    pl.seed_everything(0)  # the same backbone again
    got = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True)).test(
        TinyClassifier(), loader(3), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert got == expected


def test_all_keys_an_adapter_checkpoint_lacks_or_has_too_many_are_named(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True), max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    del state["model.blocks.1.value.lora_A"], state["model.head.bias"]
    state["model.blocks.9.value.lora_A"] = torch.zeros(4, 8)
    torch.save(checkpoint, tmp_path / "end.ckpt")
    for method in ("fit", "test"):
        run = getattr(new_trainer(tmp_path, LaLoraCallback(rank=4)), method)
        with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.value\.lora_A.*head\.bias") as error:
            run(TinyClassifier(), loader(), ckpt_path=tmp_path / "end.ckpt")
        assert "blocks.9.value.lora_A" in str(error.value)
        assert "key.weight" not in str(error.value)


def test_a_checkpoint_that_lacks_some_of_the_backbone_is_an_error(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del checkpoint["state_dict"]["model.blocks.1.key.weight"]
    torch.save(checkpoint, tmp_path / "end.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.key\.weight"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True)).test(
            TinyClassifier(), loader(), ckpt_path=tmp_path / "end.ckpt"
        )


@pytest.mark.parametrize("method", ["fit", "test"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, method: str):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = trainer.lightning_module.model.blocks[0].key.weight.detach().numpy().tobytes()
    content = (tmp_path / "end.ckpt").read_bytes()
    (tmp_path / "end.ckpt").write_bytes(content.replace(weights, weights[:-1] + b"\0"))
    with pytest.raises(ValueError, match=r"Expected .*end\.ckpt to be as it was written but it is damaged"):
        getattr(new_trainer(tmp_path, LaLoraCallback(rank=4)), method)(
            TinyClassifier(), loader(), ckpt_path=tmp_path / "end.ckpt"
        )


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("save_adapter_only", [False, True])
def test_a_checkpoint_goes_into_a_plain_module(tmp_path: Path, save_adapter_only: bool, weights_only: bool):
    module = TinyClassifier()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, alpha=5.0, gamma=3.0, save_adapter_only=save_adapter_only))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert ("model.blocks.0.key.weight" in state) is not save_adapter_only
    torch.manual_seed(0)  # the same backbone again
    plain = TinyClassifier()
    load_lora_state_dict(plain, tmp_path / "end.ckpt")
    x = torch.randn(2, 5, 8)
    assert torch.equal(plain.model(x), module.model(x))


def test_a_module_that_adapts_itself_is_loaded_from_an_adapter_checkpoint(tmp_path: Path):
    class Adapted(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = TinyTransformer()
            add_lora(self, rank=4)

    module = Adapted()
    trainer = new_trainer(tmp_path, LaLoraCallback(gamma=3.0, save_adapter_only=True))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Adapted.load_from_checkpoint(tmp_path / "end.ckpt", strict=False)
    for got, expected in zip(loaded.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(got, expected)


def test_a_test_of_an_old_checkpoint_is_no_part_of_the_run(tmp_path: Path):
    """Weights and ranks go back to it, as asked; steps are counted, and rows drawn, as before."""
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer.test(module, loader(1), ckpt_path=tmp_path / "seven.ckpt", verbose=False)
    assert callback.allocator.steps == 7
    trainer.fit_loop.max_epochs = 3
    torch.manual_seed(5)
    expected = torch.rand(1)

    class Draw(pl.Callback):
        def on_fit_start(self, *args: object) -> None:
            self.drawn = torch.rand(1)

    draw = Draw()
    trainer.callbacks.append(draw)
    torch.manual_seed(5)
    trainer.fit(module, loader())
    assert callback.allocator.steps == 7 + 7
    assert torch.equal(draw.drawn, expected)


def test_a_state_given_before_fit_is_taken_up(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).fit(module, loader())
    again = LaLoraCallback(rank=4, gamma=0.0)
    again.load_state_dict(callback.state_dict())
    new_trainer(tmp_path, again, max_epochs=1).fit(module, loader())
    assert again.allocator.steps == 28
    assert again.allocator.budget == callback.allocator.budget


def test_a_step_that_was_saved_before_the_callbacks_turn_is_made_up_for(tmp_path: Path):
    """A callback in front saves a checkpoint after the optimizer step and before the allocator acts, then fails."""

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "ten.ckpt")
                raise InterruptedError

    def start() -> tuple[TinyClassifier, LaLoraCallback]:
        torch.manual_seed(1)
        return TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)

    whole, whole_callback = start()
    new_trainer(tmp_path, whole_callback, max_epochs=1).fit(whole, loader(20))

    module, callback = start()
    with pytest.raises(InterruptedError):
        new_trainer(tmp_path, Saver(), callback, max_epochs=1).fit(module, loader(20))
    assert callback.allocator.steps == 9
    module, callback = start()

    class Stop(pl.Callback):
        def on_train_batch_start(self, *args: object) -> None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        new_trainer(tmp_path, callback, Stop(), max_epochs=1).fit(module, loader(20), ckpt_path=tmp_path / "ten.ckpt")
    assert callback.allocator.steps == 10
    assert callback.history == whole_callback.history[:11]


def test_a_checkpoint_is_restored_into_the_module_that_is_fitted_and_into_no_other(tmp_path: Path):
    first, second = TinyClassifier(), TinyClassifier()
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trained = callback.allocator.state_dict()
    for layer in lora_layers(first).values():
        layer.set_rank(1)

    new_trainer(tmp_path, callback, max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert callback.allocator.ranks.tolist() == trained["ranks"].tolist()
    assert callback.allocator.steps == 14
    assert [int(second.model.blocks[i].query.rank) for i in range(3)] == trained["ranks"].tolist()
    assert all(int(layer.rank) == 1 for layer in lora_layers(first).values())


def test_a_checkpoint_that_was_tested_is_no_part_of_another_modules_fit(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).test(TinyClassifier(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    new_trainer(tmp_path, callback, max_epochs=1).fit(TinyClassifier(), loader())
    assert callback.allocator.steps == 7


class Saver(pl.Callback):
    """A callback of somebody else, with an attribute of our name."""

    save_adapter_only = True


def test_another_callback_with_an_attribute_of_our_name_changes_no_checkpoint(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), Saver(), max_epochs=1)
    trainer.fit(TinyClassifier(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert "model.blocks.0.key.weight" in torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]


def test_a_module_whose_adapters_are_merged_and_removed_is_saved_and_loaded_whole(tmp_path: Path):
    module = TinyClassifier()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True), max_epochs=1)
    trainer.fit(module, loader())
    merge_lora(module, remove=True)
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    state = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == TinyClassifier().state_dict().keys()
    # Its weights stay frozen, and yet none of them may be missing.
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"model.head.weight": state["model.head.weight"]})
