"""A callback that measures what training costs."""

import time

import lightning.pytorch as pl
import psutil
import torch


class Costs(pl.Callback):
    """Time and peak memory of training, from its first batch to its last.

    Attributes:
        seconds: Between them.
        mebibytes: On a GPU the most that was allocated there; else the most memory the process held after a batch,
            with all that it held before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.mebibytes = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if pl_module.device.type != "cuda":
            self.mebibytes = max(self.mebibytes, psutil.Process().memory_info().rss / 2**20)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            self.mebibytes = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        self.seconds = time.perf_counter() - self._started
