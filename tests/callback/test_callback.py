"""LaLoraCallback in whole Trainer runs: setup, steps, arguments."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lalora_lightning import LaLoraCallback, add_lora, lora_layers
from tests.helpers.models import TinyTransformer
from tests.helpers.training import BuiltLater, TinyClassifier, loader, new_trainer


def test_the_callback_alone_is_all_it_takes(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0)
    frozen = module.model.blocks[0].key.weight.clone()
    head = module.model.head.weight.clone()
    new_trainer(tmp_path, callback).fit(module, loader(), loader(2))
    layers = lora_layers(module)
    assert len(layers) == 6
    assert all(layer.lora_B.any() for layer in layers.values())
    assert torch.equal(module.model.blocks[0].key.weight, frozen)
    assert not torch.equal(module.model.head.weight, head)
    # The budget grows from one rank a layer, and the layers hold what the allocator decided.
    assert callback.history[0] == (0, [1, 1, 1], 3.0)
    step, ranks, budget = callback.history[-1]
    assert step == 21
    assert sum(ranks) > 3
    assert sum(ranks) <= budget <= 12
    assert [int(layers[f"model.blocks.{i}.value"].rank) for i in range(3)] == ranks


def test_it_acts_once_per_optimizer_step_when_gradients_accumulate(tmp_path: Path):
    """7 batches with accumulation over 3 are 3 optimizer steps an epoch: after batches 3, 6 and, short, 7."""
    module, callback = TinyClassifier(), LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback, accumulate_grad_batches=3, max_epochs=2).fit(module, loader(7))
    assert module.optimizer_steps == 6
    assert callback.allocator.steps == 6
    assert [step for step, _, _ in callback.history] == list(range(7))


def test_a_training_step_that_returns_none_changes_no_rank(tmp_path: Path):
    """Lightning counts such a batch as a step, with which the optimizer does nothing."""

    class Skipping(TinyClassifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx > 3 else super().training_step(batch, batch_idx)

    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(Skipping(), loader(7))
    assert callback.allocator.steps == trainer.global_step == 7
    decisions = [(ranks, budget) for _, ranks, budget in callback.history]
    assert len(set(map(str, decisions[:5]))) == 5
    assert decisions[4] == decisions[5] == decisions[6] == decisions[7]


def test_layers_that_are_there_already_are_used(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback()
    add_lora(module, rank=2, target_modules=["key"])
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.allocator.max_rank == 2
    assert list(lora_layers(module)) == [f"model.blocks.{i}.key" for i in range(3)]


def test_a_model_built_in_configure_model_is_adapted_there(tmp_path: Path):
    module = BuiltLater(rank=4, modules_to_save=["head"])
    module.probe = nn.Linear(3, 3)
    new_trainer(tmp_path, LaLoraCallback(), max_epochs=1).fit(module, loader())
    callback = LaLoraCallback()
    new_trainer(tmp_path, callback, max_epochs=1).fit(BuiltLater(rank=4), loader())
    assert callback.allocator.steps == 7

    class TooLate(BuiltLater):
        def configure_model(self) -> None:
            self.model = TinyTransformer()

    with pytest.raises(RuntimeError, match=r"add_lora\(self\) at the end.* seen: model\.blocks\.0\.query to "):
        new_trainer(tmp_path, LaLoraCallback()).fit(TooLate(), loader())


def test_adapters_that_no_optimizer_holds_are_an_error(tmp_path: Path):
    class HeadOnly(TinyClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"lack 12, model\.blocks\.0\.query\.lora_A the first"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(HeadOnly(), loader())


def test_a_strategy_that_trains_copies_in_other_processes_needs_an_adapted_module(tmp_path: Path):
    module = TinyClassifier()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match=r"call add_lora\(module\) before fit"):
        trainer.fit(module, loader())


def test_a_fitted_module_can_be_copied_and_pickled(tmp_path: Path):
    module = TinyClassifier()
    new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True), max_epochs=1).fit(module, loader())
    torch.save(module, tmp_path / "module")
    x = torch.randn(2, 5, 8)
    for copied in (copy.deepcopy(module), torch.load(tmp_path / "module", weights_only=False)):
        assert torch.equal(copied.model(x), module.model(x))
        assert copied.on_save_checkpoint.args[0] is copied
        copied._trainer = None
        copied.on_save_checkpoint({})


def test_freeze_after_a_fraction_of_the_run(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0, freeze_after=0.5)
    new_trainer(tmp_path, callback, max_epochs=2).fit(TinyClassifier(), loader())
    assert callback.allocator.settings.freeze_after == 7
    ranks = [ranks for _, ranks, _ in callback.history]
    assert ranks[7:] == [ranks[7]] * 8
    with pytest.raises(ValueError, match="run of known length"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, freeze_after=0.5), max_epochs=-1, max_time="00:00:00:01").fit(
            TinyClassifier(), loader()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"growth": "letter"}, "growth"),
        ({"contribution": "fisher", "contribution_scale": "absolute"}, "contribution_scale"),
        ({"freeze_after": 1.5}, r"a fraction in \[0, 1\] but got 1.5"),
        ({"interval": 0}, "interval"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LaLoraCallback(**arguments)


def test_a_module_without_targets_is_refused_before_training(tmp_path: Path):
    class Plain(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(40, 2))

    with pytest.raises(ValueError, match=r"Linear layers seen: model\.1\."):
        new_trainer(tmp_path, LaLoraCallback()).fit(Plain(), loader())


def test_variants_reach_the_layers(tmp_path):
    task = TinyClassifier()
    callback = LaLoraCallback(rank=4, init="pissa", use_rslora=True, freeze_A=True)
    new_trainer(tmp_path, callback).fit(task, loader())
    layer = task.model.blocks[0].query
    assert (layer.init, layer.scaling) == ("pissa", 8.0)
    assert torch.equal(layer.lora_A, layer.start_A)
    assert not torch.equal(layer.lora_B, layer.start_B)
