"""A callback that measures the peak memory of a run."""

import lightning.pytorch as pl
import psutil
import torch


class PeakMemory(pl.Callback):
    """Peak memory of training.

    Attributes:
        mebibytes: On a GPU the most that was allocated there; else the most memory the process held after a batch,
            with all that it held before.
    """

    def __init__(self) -> None:
        self.mebibytes = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if pl_module.device.type != "cuda":
            self.mebibytes = max(self.mebibytes, psutil.Process().memory_info().rss / 2**20)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            self.mebibytes = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
