"""A long run of a tiny model with all values logged at every step, to check that memory does not grow.

python -m recipes.benchmarks.soak --steps 20000
"""

import math
import statistics
import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import LaLoraCallback
from lalora_lightning.memory import resident_mib
from lalora_lightning.tables import text_table
from recipes.console import quiet

__all__ = ["WINDOW", "SignClassifier", "Watch", "main"]

WINDOW = 1000


def main(steps: int = 20_000, epoch: int = 100) -> None:
    """Train, validate and save checkpoints; print memory and ranks of the second and the last 1,000 steps.

    Args:
        steps: Optimizer steps.
        epoch: Batches in an epoch.
    """
    quiet()
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    callback = LaLoraCallback(rank=4, gamma=2.0)
    watch = Watch(callback)
    x = torch.randn(4 * epoch, 5, 8)
    data = DataLoader(TensorDataset(x, (x.mean((1, 2)) > 0).long()), batch_size=4, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=steps,
            log_every_n_steps=1,
            limit_val_batches=2,
            callbacks=[callback, watch],
            logger=[CSVLogger(folder), TensorBoardLogger(folder)],
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(SignClassifier(), data, data)
    rows = [
        [name, f"{statistics.mean(memory):.1f}", f"{max(memory):.1f}", f"{min(ranks)} to {max(ranks)}"]
        for name, memory, ranks in (
            # During the first 1,000 steps, memory is still being allocated.
            ("second 1,000 steps", watch.memory[WINDOW : 2 * WINDOW], watch.totals[WINDOW : 2 * WINDOW]),
            ("last 1,000 steps", watch.memory[-WINDOW:], watch.totals[-WINDOW:]),
        )
    ]
    print(f"\n{len(watch.memory):,} steps, {len(callback.history):,} entries in the history\n")
    print(text_table(["", "MiB, mean", "MiB, maximum", "total rank of 3 layers"], rows))


class Watch(pl.Callback):
    """Measures memory and ranks after every step.

    Args:
        callback: The callback whose ranks are checked.

    Attributes:
        memory: Resident memory after each step, in MiB.
        totals: Total rank after each step.

    Raises:
        RuntimeError: A rank is not in [1, r], or the total rank exceeds the budget.
    """

    def __init__(self, callback: LaLoraCallback) -> None:
        self.callback = callback
        self.memory: list[float] = []
        self.totals: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Measure and check."""
        self.memory.append(resident_mib() or math.nan)
        allocator = self.callback.allocator
        assert allocator is not None
        ranks = allocator.ranks.tolist()
        if not all(1 <= rank <= allocator.max_rank for rank in ranks) or sum(ranks) > allocator.budget:
            raise RuntimeError(f"Expected ranks in [1, {allocator.max_rank}] and within the budget but got {ranks}.")
        self.totals.append(sum(ranks))


class SignClassifier(pl.LightningModule):
    """Three attention blocks of width 8 and a head that predict the sign of the mean of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")}) for _ in range(3)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, 8)`` to logits ``(N, 2)``."""
        for block in self.blocks:
            query, key, value = (block[name](x) for name in ("query", "key", "value"))  # type: ignore[index]
            x = x + nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(x.mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss and log it."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
