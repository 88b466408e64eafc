"""What is to learn, learns, or the run says that it does not."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lalora_lightning import LaLoraCallback, lora_layers
from tests.helpers.training import TinyClassifier, loader, new_trainer


class Freezing(TinyClassifier):
    """Freezes its backbone in one of its hooks, as code for linear probing does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def freeze(self, where: str) -> None:
        if where == self.where:
            self.model.blocks.requires_grad_(False)

    def setup(self, stage: str) -> None:
        self.freeze("setup")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.freeze("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.freeze("on_fit_start")


@pytest.mark.parametrize("where", ["setup", "configure_optimizers", "on_fit_start"])
def test_adapters_that_the_module_freezes_are_an_error(where: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"12 of 12 factors are frozen, the first model\.blocks\.0\.query\.lora_B"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(Freezing(where), loader())


class FreezingCallback(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.model.blocks)

    def finetune_function(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("fixed_ranks", [False, True])
def test_adapters_that_another_callback_freezes_are_an_error(fixed_ranks: bool, tmp_path: Path):
    callbacks = LaLoraCallback(rank=4, fixed_ranks=fixed_ranks), FreezingCallback()
    with pytest.raises(RuntimeError, match="or a finetuning callback"):
        new_trainer(tmp_path, *callbacks).fit(TinyClassifier(), loader())


class Detached(TinyClassifier):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def features(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.how == "reentrant" else block(x)
        return x.mean(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.features(x)
        else:
            features = self.features(x)
        features = features.detach() if self.how == "detached" else features
        return nn.functional.cross_entropy(self.model.head(features), y)


@pytest.mark.parametrize("how", ["no_grad", "detached", "reentrant"])
def test_adapters_without_gradients_are_named_once(how: str, tmp_path: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(Detached(how), loader())
    (message,) = [str(w.message) for w in caught if "La-LoRA" in str(w.message)]
    assert message.startswith(
        "La-LoRA: 6 of 6 adapters get no gradient, so that they do not learn: model.blocks.0.query"
    )
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_a_run_that_learns_says_nothing_and_keeps_no_hook(settings: dict, tmp_path: Path):
    module = TinyClassifier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new_trainer(tmp_path, LaLoraCallback(rank=4), **settings).fit(module, loader())
    assert not [w for w in caught if "La-LoRA" in str(w.message)]
    assert not any(layer._forward_pre_hooks for layer in lora_layers(module).values())


class Adversarial(TinyClassifier):
    """Two optimizers in turn; the adapters belong to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(8, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        critic, generator = self.optimizers()
        for optimizer, logits in ((critic, lambda: self.critic(x.mean(1))), (generator, lambda: self.model(x))):
            self.toggle_optimizer(optimizer)
            self.manual_backward(nn.functional.cross_entropy(logits(), y))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.critic.parameters()), torch.optim.Adam(self.model.parameters())]


def test_optimizers_in_turn_are_no_fault(tmp_path: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = LaLoraCallback(rank=4, modules_to_save=["model.head", "critic"])
        new_trainer(tmp_path, callback).fit(Adversarial(), loader())
    assert not [w for w in caught if "La-LoRA" in str(w.message)]
