"""AdaLoRA: its allocator, its penalty, and resuming."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from recipes.comparison.ranks import layer_ranks, projection_ranks, trimmed_parameters
from recipes.methods import METHODS
from recipes.methods.adalora import AdaLoraCallback, orthogonality_penalty
from tests.recipes.methods.models import HEAD, fit, text, vision


@pytest.mark.parametrize("new", [text, vision])
def test_adalora_allocates_after_every_optimizer_step(new: Any):
    module, batch = new()
    (callback,) = METHODS["adalora"].adapt(module, rank=2, init_rank=4)
    assert isinstance(callback, AdaLoraCallback)
    steps = []
    allocate = callback.tuner.update_and_allocate
    callback.tuner.update_and_allocate = lambda step: (steps.append(step), allocate(step))
    fit(module, batch, [callback], steps=20, accumulate_grad_batches=2)

    config = callback.tuner.peft_config["default"]
    assert steps == list(range(1, 21))
    assert (config.total_step, config.tinit, config.tfinal) == (20, 3, 10)
    # Two matrices a block at 2 of 4 triplets on average, as ranks of the blocks 2 + 2.
    ranks = layer_ranks(projection_ranks(module))
    assert len(ranks) == 2
    assert sum(ranks.values()) == 4
    assert trimmed_parameters(module) == HEAD + 8 * (16 + 16 + 1)


def test_the_orthogonality_penalty_is_pefts():
    module, batch = text()
    (callback,) = METHODS["adalora"].adapt(module, rank=2, init_rank=4, orthogonality=0.3)
    tuner = callback.tuner
    plain = module.model(**batch).loss
    # peft's forward pass adds it to the loss of the model inside.
    tuner.model = module.model
    expected = tuner(**batch).loss - plain
    penalty = orthogonality_penalty(dict(module.named_parameters()))
    torch.testing.assert_close(0.3 * penalty, expected, atol=1e-5, rtol=1e-5)


def test_adalora_needs_ranks_to_prune():
    with pytest.raises(ValueError, match="Expected init_rank to be above the final rank of 8 but got 8"):
        METHODS["adalora"].adapt(text()[0], init_rank=8)
    with pytest.raises(ValueError, match=r"leave time to prune between them but got 0\.5 and 0\.5"):
        METHODS["adalora"].adapt(text()[0], initial=0.5)


@pytest.mark.parametrize("stopped", [9, 15])
def test_adalora_resumes_as_if_it_had_never_stopped(stopped: int, tmp_path: Path):
    """While it prunes, steps 3 to 10 of 20, and after."""

    def new(steps: int) -> tuple[pl.LightningModule, pl.Trainer, Any]:
        module, batch = text()
        callbacks = METHODS["adalora"].adapt(module, rank=2, init_rank=4)
        checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stopped, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[*callbacks, checkpoints],
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        return module, trainer, DataLoader([batch] * 100, batch_size=None)

    whole, trainer, data = new(20)
    trainer.fit(whole, data)
    resumed, trainer, data = new(20)
    trainer.fit(resumed, data, ckpt_path=tmp_path / f"step={stopped}.ckpt")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert sum(layer_ranks(projection_ranks(resumed)).values()) == 4
