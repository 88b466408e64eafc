"""Adapters beside a model in half precision, and other default types."""

import functools
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, lora_layers
from tests.helpers.training import BuiltLater, TinyClassifier, loader, new_trainer


class HalfClassifier(TinyClassifier):
    """Casts its inputs itself, as users do without ``precision``."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x.to(self.model.head.weight.dtype)).float(), y)


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for layer in lora_layers(module).values() for tensor in (layer.lora_A, layer.lora_B)}


def fit_quietly(trainer: pl.Trainer, module: pl.LightningModule, **settings: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), **settings)
    return [str(w.message) for w in caught if "La-LoRA" in str(w.message)]


@pytest.mark.parametrize("kind", [TinyClassifier, functools.partial(BuiltLater, rank=4)])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_adapters_stay_in_float32_and_every_entry_moves(
    precision: str, dtype: torch.dtype, kind: type[TinyClassifier], tmp_path: Path
):
    module, callback = kind(), LaLoraCallback(rank=4)
    # The default eps, 1e-8, is 0 in float16, and the head would divide by it.
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-4, eps=1e-4)
    before = {}

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.update({name: layer.lora_A.detach().clone() for name, layer in lora_layers(pl_module).items()})

    trainer = new_trainer(tmp_path, callback, Watch(), precision=precision)
    assert fit_quietly(trainer, module) == []
    assert dtypes(module) == {torch.float32}
    assert module.model.head.weight.dtype == module.model.blocks[0].key.weight.dtype == dtype
    # The first component is in use from the second step on; in bfloat16 most of its entries would stand still.
    assert all((layer.lora_A[0] != before[name][0]).all() for name, layer in lora_layers(module).items())
    trainer.test(module, loader(), verbose=False)
    assert dtypes(module) == {torch.float32}


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_run_in_bfloat16_equals_one_whose_base_model_was_cast_by_hand(init: str, tmp_path: Path):
    states = []
    for precision in ("bf16-true", "32-true"):
        torch.manual_seed(0)
        module = HalfClassifier()
        module.to(torch.bfloat16)
        new_trainer(tmp_path, LaLoraCallback(rank=4, init=init), precision=precision).fit(module, loader())
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_run_in_bfloat16_is_resumed_bit_for_bit(tmp_path: Path):
    def fitted(epochs: int, path: Path | None = None) -> tuple[pl.Trainer, TinyClassifier]:
        torch.manual_seed(0)
        module = TinyClassifier()
        trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, gamma=1.0), precision="bf16-true", max_epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=path)
        return trainer, module

    _, whole = fitted(3)
    fitted(1)[0].save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = fitted(3, tmp_path / "first.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_module_that_is_built_in_bfloat16(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), precision="bf16-true")
    with trainer.init_module():
        module = TinyClassifier()
    assert fit_quietly(trainer, module) == []
    assert module.model.head.weight.dtype == torch.bfloat16
    assert dtypes(module) == {torch.float32}


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "pissa", "milora", "olora"])
def test_a_default_type_of_bfloat16(default_bfloat16: None, init: str, tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, init=init)
    assert module.model.head.weight.dtype == torch.bfloat16
    assert fit_quietly(new_trainer(tmp_path, callback, max_epochs=1), module) == []
    assert dtypes(module) == {torch.float32}
    assert callback.allocator.budget.dtype == torch.float32


def test_the_logged_total_rank_is_exact_with_a_default_type_of_bfloat16(
    default_bfloat16: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bfloat16 has no 259."""
    callback = LaLoraCallback(rank=4)
    monkeypatch.setattr(RankAllocator, "read_steps", lambda self, earlier: ([([86, 86, 87], 259.0)] * 2, 0))
    trainer = new_trainer(tmp_path, callback, max_steps=1)
    trainer.fit(TinyClassifier(), loader())
    assert trainer.progress_bar_metrics["rank/total"] == 259


def test_adapters_in_half_precision_are_spoken_of_once(tmp_path: Path):
    module = HalfClassifier()
    add_lora(module, rank=4)
    module.to(torch.bfloat16)
    said = fit_quietly(new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=2), module)
    assert len(said) == 1
    assert "model.blocks.0.query the first) are in bfloat16, where small updates are rounded away" in said[0]
