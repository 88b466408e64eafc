"""Callbacks of Lightning that average weights."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lalora_lightning import LaLoraCallback
from tests.helpers.training import TinyClassifier, loader, new_trainer


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaging_leaves_the_ranks_of_the_run_alone(tmp_path: Path, use_buffers: bool):
    class LastRanks(pl.Callback):
        """The average replaces the module when training ends."""

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
        ) -> None:
            self.masks = [block.query.rank_mask.tolist() for block in pl_module.model.blocks]

    module, callback, last = TinyClassifier(), LaLoraCallback(rank=4, gamma=1.0), LastRanks()
    averaging = WeightAveraging(use_buffers=use_buffers)
    new_trainer(tmp_path, callback, last, averaging).fit(module, loader(), loader(2))
    ranks = callback.allocator.ranks.tolist()
    assert sum(ranks) > 3
    assert [int(module.model.blocks[i].query.rank) for i in range(3)] == ranks
    assert last.masks == [[float(k < rank) for k in range(4)] for rank in ranks]
    averaged = [block.query.rank_mask.tolist() for block in module.model.blocks]
    if use_buffers:
        # Of the 21 steps, those with the component.
        histories = [[ranks[i] for step, ranks, _ in callback.history if step > 0] for i in range(3)]
        expected = [[sum(rank > k for rank in ranks) / 21 for k in range(4)] for ranks in histories]
        torch.testing.assert_close(torch.tensor(averaged), torch.tensor(expected))
    else:
        assert averaged == last.masks


def test_the_average_is_saved_after_the_run(tmp_path: Path):
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=1.0)
    trainer = new_trainer(tmp_path, callback, WeightAveraging())
    trainer.fit(module, loader())
    masks = {key: value.clone() for key, value in module.state_dict().items() if key.endswith("rank_mask")}
    assert any(0 < value < 1 for mask in masks.values() for value in mask.tolist())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    for key, mask in masks.items():
        assert torch.equal(saved[key], mask)
        assert torch.equal(module.state_dict()[key], mask)


def test_stochastic_weight_averaging_averages_the_adapters(tmp_path: Path):
    class Recorder(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(pl_module.model.blocks[0].query.lora_B.detach().clone())

    module, callback, recorder = TinyClassifier(), LaLoraCallback(rank=4, gamma=3.0), Recorder()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    new_trainer(tmp_path, callback, recorder, averaging, max_epochs=3).fit(module, loader())
    # It takes the weights at the start of the second and the third epoch.
    average = (recorder.seen[0] + recorder.seen[1]) / 2
    torch.testing.assert_close(module.model.blocks[0].query.lora_B.detach(), average)
    assert [int(module.model.blocks[i].query.rank) for i in range(3)] == callback.allocator.ranks.tolist()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([WeightAveraging(use_buffers=False), LaLoraCallback(rank=4)], "to come after LaLoraCallback"),
        ([StochasticWeightAveraging(1e-3), LaLoraCallback(rank=4)], "to come after LaLoraCallback"),
        (
            [LaLoraCallback(rank=4, save_adapter_only=True), WeightAveraging(use_buffers=False)],
            "Expected save_adapter_only=False with WeightAveraging",
        ),
    ],
)
def test_averaging_that_cannot_work_is_refused(tmp_path: Path, callbacks: list[pl.Callback], message: str):
    module = TinyClassifier()
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, *callbacks).fit(module, loader())
