"""Lightning's ModelPruning and torch's pruning beside adapters."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrize, prune

from lalora_lightning import LaLoraCallback, add_lora, lora_layers
from tests.helpers.training import TinyClassifier, loader, new_trainer


def share_of_zeros(tensor: torch.Tensor) -> float:
    return float((tensor == 0).float().mean())


@pytest.mark.parametrize("lottery", [False, True])
@pytest.mark.parametrize("ours_first", [True, False])
def test_model_pruning_prunes_the_base_model_and_leaves_the_adapters_alone(
    ours_first: bool, lottery: bool, tmp_path: Path
):
    torch.manual_seed(0)
    module = TinyClassifier()
    query = module.model.blocks[0].query
    before = query.weight.detach().clone()
    callback = LaLoraCallback(rank=4)
    pruning = ModelPruning(
        "l1_unstructured", use_global_unstructured=False, amount=0.5, use_lottery_ticket_hypothesis=lottery
    )
    trainer = new_trainer(tmp_path, *([callback, pruning] if ours_first else [pruning, callback]), max_epochs=1)
    trainer.fit(module, loader())
    layers = lora_layers(module)
    assert callback.allocator.steps == 7
    assert layers["model.blocks.0.query"].base_layer is query
    assert share_of_zeros(query.weight) == share_of_zeros(module.model.blocks[0].key.weight) == 0.5
    assert torch.equal(query.weight[query.weight != 0], before[query.weight != 0])
    for layer in layers.values():
        assert share_of_zeros(layer.lora_A) == 0
        assert layer.lora_B.any()

    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    other = TinyClassifier()
    new_trainer(tmp_path, LaLoraCallback(rank=4)).test(
        other, loader(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False
    )
    x = torch.randn(2, 5, 8)
    assert torch.equal(other.model(x), module.model(x))


def test_a_run_with_pruning_saves_checkpoints_while_it_prunes(tmp_path: Path):
    """ModelPruning takes every key of a state that ends in ``_mask`` for one of its own, also that of a rank."""

    class Saving(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    pruning = ModelPruning("l1_unstructured", amount=0.5)
    new_trainer(tmp_path, LaLoraCallback(rank=4), pruning, Saving(), max_epochs=2).fit(TinyClassifier(), loader())
    first, second = (torch.load(tmp_path / f"{epoch}.ckpt")["state_dict"] for epoch in range(2))
    assert first.keys() == second.keys()
    key = "model.blocks.0.query.base_layer.weight"
    assert share_of_zeros(first[key]) == 0 < share_of_zeros(second[key])
    assert second["model.blocks.0.query.rank_mask"].tolist() == [1, 1, 1, 1]


def test_pruning_that_makes_no_sense_beside_adapters_is_refused(tmp_path: Path):
    def fit(pruning: ModelPruning, module: TinyClassifier, ours_first: bool = True, **settings: bool) -> None:
        callbacks = [LaLoraCallback(rank=4, **settings), pruning]
        new_trainer(tmp_path, *callbacks[:: 1 if ours_first else -1]).fit(module, loader())

    with pytest.raises(ValueError, match="save_adapter_only=False with ModelPruning, which changes the frozen"):
        fit(ModelPruning("l1_unstructured"), TinyClassifier(), save_adapter_only=True)
    with pytest.raises(ValueError, match="resample_parameters=False for ModelPruning"):
        fit(ModelPruning("l1_unstructured", resample_parameters=True), TinyClassifier())
    adapted = TinyClassifier()
    add_lora(adapted, rank=4)
    layer = adapted.model.blocks[1].value
    with pytest.raises(ValueError, match=r"has lora_A of the adapted layer model\.blocks\.1\.value; name"):
        fit(ModelPruning("l1_unstructured", [(layer, "lora_A")]), adapted)
    with pytest.raises(ValueError, match=r"has bias of the adapted layer .* let it come after LaLoraCallback"):
        fit(ModelPruning("l1_unstructured"), adapted, ours_first=False)


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_adapters_that_are_pruned_by_hand_are_refused(how: str, tmp_path: Path):
    module = TinyClassifier()
    add_lora(module, rank=4)
    layer = module.model.blocks[1].value
    if how == "pruned":
        prune.l1_unstructured(layer, "lora_B", amount=0.5)
    else:
        parametrize.register_parametrization(layer, "lora_B", nn.Identity())
    with pytest.raises(ValueError, match=r"model\.blocks\.1\.value\.lora_B to be a parameter but it is pruned or"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(module, loader())


@pytest.mark.parametrize("after", [False, True])
def test_a_base_model_that_is_pruned_by_hand_stays_pruned(after: bool, tmp_path: Path):
    torch.manual_seed(0)
    module = TinyClassifier()
    query, x = module.model.blocks[1].query, torch.randn(2, 5, 8)
    if after:
        add_lora(module, rank=4)
    prune.l1_unstructured(query, "weight", amount=0.5)
    prune.l1_unstructured(module.model.head, "weight", amount=0.5)
    expected, frozen = module.model(x), query.weight.detach().clone()
    if not after:
        add_lora(module, rank=4)
    assert torch.equal(module.model(x), expected)
    callback = LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert torch.equal(query.weight, frozen)
    assert share_of_zeros(module.model.head.weight) == 0.5
    assert all(layer.lora_B.any() for layer in lora_layers(module).values())
