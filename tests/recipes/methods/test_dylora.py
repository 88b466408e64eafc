"""DyLoRA: the distribution of the ranks, what they are good for, and when they apply."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers
from recipes.benchmarks.operations import SYNCHRONIZING, OperationCounter
from recipes.methods import METHODS
from recipes.methods.dylora import draw_ranks, restore_full_ranks
from tests.helpers.models import TinyTransformer
from tests.recipes.methods.models import text


def test_ranks_are_drawn_uniformly_from_1_to_the_maximum():
    layer = TruncatedLoRALinear(nn.Linear(6, 6), rank=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 6)
    by_rank = []
    for rank in (1, 2, 3):
        layer.set_rank(rank)
        by_rank.append(layer(x))
    seen = []
    for _ in range(600):
        draw_ranks([layer])
        seen.append(int(layer.rank))
        assert int(layer.rank_mask.sum()) == seen[-1]
        torch.testing.assert_close(layer(x), by_rank[seen[-1] - 1])
    assert set(seen) == {1, 2, 3}
    # The expectation is 200 with a standard deviation of 11.5.
    assert all(150 < seen.count(rank) < 250 for rank in (1, 2, 3))
    restore_full_ranks([layer])
    torch.testing.assert_close(layer(x), by_rank[2])


def test_each_layer_has_a_rank_of_its_own(adapted: TinyTransformer):
    layers = list(lora_layers(adapted).values())
    draws = []
    for _ in range(20):
        draw_ranks(layers)
        draws.append([int(layer.rank) for layer in layers])
    assert any(len(set(ranks)) > 1 for ranks in draws)
    assert {rank for ranks in draws for rank in ranks} == {1, 2, 3, 4}


def test_an_adapter_can_be_cut():
    """The first components contribute the most, so that a cut costs less than LoRA's."""
    torch.manual_seed(0)
    target = torch.randn(8, 4) @ torch.randn(4, 8)
    x = torch.randn(256, 8)
    errors = {}
    for random_rank in (False, True):
        torch.manual_seed(1)
        base = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(base.weight)
        layer = TruncatedLoRALinear(base.requires_grad_(False), rank=4)
        optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.02)
        for _ in range(400):
            if random_rank:
                draw_ranks([layer])
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), x @ target.T).backward()
            optimizer.step()
        layer.set_rank(1)
        errors[random_rank] = nn.functional.mse_loss(layer(x), x @ target.T).item()
    assert errors[True] < 0.8 * errors[False]


def test_drawing_does_not_synchronize(adapted: TinyTransformer):
    with OperationCounter() as counter:
        draw_ranks(lora_layers(adapted).values())
        restore_full_ranks(lora_layers(adapted).values())
    assert counter.total > 0
    assert not counter.counts.keys() & set(SYNCHRONIZING)
    # A meta tensor has no values: `item()` or `if tensor` would raise an error.
    with torch.device("meta"):
        model = TinyTransformer()
    add_lora(model, rank=4)
    draw_ranks(lora_layers(model).values())
    assert all(layer.rank.is_meta for layer in lora_layers(model).values())


class Ranks(pl.Callback):
    """Notes the ranks in each forward pass, by stage."""

    def __init__(self) -> None:
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        def note(*args: Any) -> None:
            key = "train" if pl_module.training else "test" if trainer.testing else "val"
            self.seen[key].append([int(layer.rank) for layer in lora_layers(pl_module).values()])

        if stage == "fit":
            pl_module.model.register_forward_hook(note)  # type: ignore[union-attr, operator]


def new_run(folder: Path, *callbacks: pl.Callback) -> tuple[pl.LightningModule, pl.Trainer, DataLoader]:
    module, batch = text()

    def evaluate(batch: Any, batch_idx: int) -> None:
        module.model(**batch)

    module.validation_step = module.test_step = evaluate  # type: ignore[method-assign]
    own = METHODS["dylora"].adapt(module, rank=4)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[*own, *callbacks],
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
    )
    return module, trainer, DataLoader([batch] * 6, batch_size=None)


def saved_ranks(path: Path) -> set[int]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {int(value.sum()) for key, value in state.items() if key.endswith(".rank_mask")}


def test_only_training_is_at_drawn_ranks(tmp_path: Path):
    ranks = Ranks()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module, trainer, data = new_run(tmp_path, ranks, checkpoints)
    trainer.fit(module, data, data)
    trainer.test(module, data, verbose=False)
    assert len(ranks.seen["train"]) == 12
    assert {rank for batch in ranks.seen["train"] for rank in batch} == {1, 2, 3, 4}
    for stage in ("val", "test"):
        assert ranks.seen[stage]
        assert {rank for batch in ranks.seen[stage] for rank in batch} == {4}
    saved = list(tmp_path.glob("step=*.ckpt"))
    assert len(saved) == 12
    assert all(saved_ranks(path) == {4} for path in saved)


def test_an_interrupted_run_is_saved_at_full_rank(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path, "stopped", save_on_exception=True)
    module, trainer, data = new_run(tmp_path, checkpoints)

    step = module.training_step

    def fail(batch: Any, batch_idx: int) -> Tensor:
        if batch_idx < 2:
            return step(batch, batch_idx)
        for layer in lora_layers(module).values():
            layer.set_rank(1)
        raise RuntimeError("stop")

    module.training_step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, data)
    (path,) = tmp_path.glob("*.ckpt")
    assert saved_ranks(path) == {4}
