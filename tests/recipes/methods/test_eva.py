"""EVA, compared with peft's own."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.methods import METHODS
from tests.recipes.methods.models import fit, text, vision


def test_directions_and_ranks_are_those_of_peft():
    module, batch = text()
    batch["attention_mask"][:, 5:] = 0
    model = copy.deepcopy(module.model)
    callbacks = METHODS["eva"].adapt(module, rank=2, alpha=8.0, rho=2.0)
    fit(module, batch, callbacks, steps=1)

    targets = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in ("query", "value")]
    config = LoraConfig(
        r=2, lora_alpha=8, init_lora_weights="eva", eva_config=EvaConfig(use_label_mask=False), target_modules=targets
    )
    reference = get_peft_model(model, config)
    initialize_lora_eva_weights(reference, [batch], show_progress_bar=False)
    kept = {name: layer for name, layer in reference.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    assert sum(layer.r["default"] for layer in kept.values()) == 4 * 2
    adapted = {name: layer for name, layer in module.model.named_modules() if hasattr(layer, "lora_A")}
    assert list(adapted) == list(kept)
    for name, layer in adapted.items():
        assert layer.r == kept[name].r
        assert layer.scaling == kept[name].scaling == {"default": 4.0}


class Numbered(Dataset):
    """Images, of which the first value is their number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(index))
        image[0, 0, 0] = index / 40
        return image, torch.tensor(index % 2)


def test_the_order_of_the_batches_is_that_of_other_methods():
    orders = []
    for name in ("lora", "eva"):
        module, _ = vision()
        seen: list[list[float]] = []
        step = module.training_step

        def record(batch: Any, batch_idx: int, step: Any = step, seen: Any = seen) -> Tensor:
            seen.append(batch[0][:, 0, 0, 0].tolist())
            return step(batch, batch_idx)

        module.training_step = record
        callbacks = METHODS[name].adapt(module, rank=2)
        trainer = pl.Trainer(
            max_epochs=2,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        order = torch.Generator().manual_seed(5)
        trainer.fit(module, DataLoader(Numbered(), 8, shuffle=True, generator=order))
        orders.append(seen)
    assert len(orders[0]) == 10
    assert orders[0] == orders[1]


def test_directions_are_those_of_the_inputs():
    """The rows of A span the inputs that vary, before they are trained."""
    module, batch = vision()
    callbacks = METHODS["eva"].adapt(module, rank=2, target_modules="all-linear")
    trainer = fit(module, batch, callbacks, steps=1)
    assert trainer.global_step == 1
    ranks = {name: layer.r["default"] for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    # 2 blocks with query, key, value, projection and two feed-forward layers.
    assert sum(ranks.values()) == 2 * 6 * 2
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 4


def test_a_pooler_is_adapted():
    """Its input is a strided view with a row for each text."""
    module, batch = text()
    fit(module, batch, METHODS["eva"].adapt(module, rank=2, target_modules="all-linear", rho=1.0), steps=1)
    assert module.model.bert.pooler.dense.r == {"default": 2}


@pytest.mark.parametrize(("rank", "rows"), [(2, 3), (10, 8)])
def test_more_directions_than_tokens_or_features_are_refused(rank: int, rows: int):
    """With three texts, the pooler has three rows; the model has 16 features."""
    module, batch = text()
    batch = {key: value[:rows] for key, value in batch.items()}
    targets = "all-linear" if rows == 3 else None
    with pytest.raises(ValueError, match=f"at least {2 * rank} tokens and features at model.bert"):
        fit(module, batch, METHODS["eva"].adapt(module, rank=rank, target_modules=targets), steps=1)
