"""BaseFinetuning beside adapters: what is unfrozen later is in adapter-only checkpoints."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch.optim import Optimizer

from lalora_lightning import LaLoraCallback, load_lora_state_dict
from tests.helpers.training import TinyClassifier, loader, new_trainer

KEY = "model.blocks.1.key"


class TrainableOnly(TinyClassifier):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Unfreezing(BaseFinetuning):
    """Unfreezes a layer of the backbone at the second epoch, and freezes it again at the third."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        layer = pl_module.model.blocks[1].key
        if epoch == 1:
            self.unfreeze_and_add_param_group(layer, optimizer, lr=0.01)
        if epoch == 2:
            self.freeze(layer)


def classifier(seed: int = 0) -> TrainableOnly:
    torch.manual_seed(seed)
    return TrainableOnly()


def fit(folder: Path, epochs: int, ours_first: bool = True) -> TrainableOnly:
    module = classifier()
    callbacks = [LaLoraCallback(rank=4, save_adapter_only=True), Unfreezing()]
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = new_trainer(
        folder, *callbacks[:: 1 if ours_first else -1], saving, max_epochs=epochs, enable_checkpointing=True
    )
    trainer.fit(module, loader())
    return module


@pytest.mark.parametrize("ours_first", [True, False])
def test_what_was_unfrozen_is_in_the_checkpoint_also_if_it_is_frozen_again(ours_first: bool, tmp_path: Path):
    module = fit(tmp_path, 3, ours_first)
    states = [torch.load(tmp_path / f"epoch={epoch}.ckpt")["state_dict"] for epoch in range(3)]
    assert [f"{KEY}.weight" in state for state in states] == [False, True, True]
    assert all("model.blocks.0.key.weight" not in state for state in states)
    before, (x, _) = classifier(), next(iter(loader()))
    assert not torch.equal(before.model.blocks[1].key.weight, module.model.blocks[1].key.weight)

    # By a Trainer, and without one.
    tested = classifier()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4))
    trainer.test(tested, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    loaded = classifier()
    load_lora_state_dict(loaded, tmp_path / "epoch=2.ckpt")
    for other in (tested, loaded):
        assert torch.equal(other.model(x), module.model(x))


def test_a_run_that_unfroze_something_is_resumed_and_keeps_it(tmp_path: Path):
    fit(tmp_path, 2)
    resumed = classifier()
    # Without the callback that unfroze it: the layer stays frozen, at its trained values.
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True))
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    trained = checkpoint["state_dict"][f"{KEY}.weight"]
    trainer.test(resumed, loader(), ckpt_path=path, verbose=False)
    trainer.fit(resumed, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(torch.load(tmp_path / "last.ckpt")["state_dict"][f"{KEY}.weight"], trained)


def test_a_checkpoint_of_adapters_that_lacks_anything_else_is_an_error(tmp_path: Path):
    fit(tmp_path, 2)
    path = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["state_dict"][f"{KEY}.weight"], checkpoint["state_dict"]["model.blocks.0.query.lora_A"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.query\.lora_A.*blocks\.1\.key\.weight"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).test(classifier(), loader(), ckpt_path=path)


def test_backbone_finetuning_freezes_the_adapters_and_is_refused(tmp_path: Path):
    class WithBackbone(TrainableOnly):
        @property
        def backbone(self) -> torch.nn.Module:
            return self.model.blocks

    with pytest.raises(RuntimeError, match="or a finetuning callback"):
        new_trainer(tmp_path, LaLoraCallback(rank=4), BackboneFinetuning()).fit(WithBackbone(), loader())
