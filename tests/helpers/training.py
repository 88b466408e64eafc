"""A small LightningModule, its data, and a quiet Trainer."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import add_lora
from tests.helpers.models import TinyTransformer


class TinyClassifier(pl.LightningModule):
    """What a user brings: a model, a loss, an optimizer; nothing of La-LoRA."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.model = TinyTransformer()
        self.lr = lr
        self.optimizer_steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        self.optimizer_steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class BuiltLater(TinyClassifier):
    """Builds its model in ``configure_model`` and adapts it there, with these settings of ``add_lora``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = None
        self.settings = settings

    def configure_model(self) -> None:
        if self.model is None:
            self.model = TinyTransformer()
            add_lora(self, **self.settings)


class DroppingClassifier(TinyClassifier):
    """With dropout, as most backbones have it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step([nn.functional.dropout(x, 0.2), y], batch_idx)


def loader(batches: int = 7) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * batches, 5, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2)) > 0).long()), batch_size=4)


def new_trainer(folder: Path, *callbacks: pl.Callback, **settings: object) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )
