from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch import Tensor, nn

from lalora_lightning.modules.optimization import adamw_with_linear_decay, parameter_groups
from lalora_lightning.modules.task import TaskModule
from tests.helpers.training import loader, new_trainer


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.norm(self.frozen(x.mean(1)))), y)

    def configure_optimizers(self) -> dict:
        return adamw_with_linear_decay(self, learning_rate=1.0, weight_decay=0.1, warmup=0.3)


def test_rate_warms_up_and_falls_to_zero(tmp_path: Path):
    task = Linear()
    new_trainer(tmp_path, max_epochs=2).fit(task, loader(5))
    # 10 steps, of which 3 warm up: 1/4, 2/4, 3/4, then 7/7, 6/7, ..., 1/7.
    assert task.rates == pytest.approx([0.25, 0.5, 0.75, *(k / 7 for k in range(7, 0, -1))])


def test_matrices_decay_and_vectors_do_not():
    task = Linear()
    matrices, vectors = parameter_groups(task, weight_decay=0.1)
    assert matrices["weight_decay"] == 0.1
    assert [p is task.head.weight for p in matrices["params"]] == [True]
    assert vectors["weight_decay"] == 0.0
    assert len(vectors["params"]) == 3
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


def test_a_run_of_unknown_length(tmp_path: Path):
    trainer = new_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="run of known length"):
        trainer.fit(Linear(), loader())


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 500])
def test_warmup_is_a_fraction(warmup: float):
    with pytest.raises(ValueError, match=rf"Expected warmup to be a fraction of the run in \[0, 1\) but got {warmup}"):
        TaskModule(learning_rate=1e-3, weight_decay=0.0, warmup=warmup)
