"""DyLoRA (arXiv 2210.07558): training at random ranks, so that the adapter can be cut to any rank afterwards."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers
from lalora_lightning.layers import rank_mask

__all__ = ["DyLoraCallback", "adapt_by_dylora", "draw_ranks", "restore_full_ranks"]


def adapt_by_dylora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    """Adapt the module with the settings of LoRA, and return the callback that draws the ranks."""
    add_lora(module, **settings)
    return [DyLoraCallback()]


class DyLoraCallback(pl.Callback):
    """Draws a random rank for each layer and batch.

    Between batches, all layers have their maximum rank, so validation, tests and checkpoints use the whole adapter.
    There are two differences from the published code: each layer has its own random rank, and the scaling is always
    ``alpha / rank`` with the maximum rank.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the ranks of the batch."""
        draw_ranks(lora_layers(pl_module).values())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore the maximum ranks."""
        restore_full_ranks(lora_layers(pl_module).values())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the maximum ranks before a checkpoint of the interrupted run is saved."""
        restore_full_ranks(lora_layers(pl_module).values())


@torch.no_grad()
def draw_ranks(layers: Iterable[TruncatedLoRALinear]) -> None:
    """Set the rank of each layer to a random integer from 1 to its maximum rank.

    The ranks are drawn on the layer's device, without synchronization.
    """
    for layer in layers:
        device = layer.rank_mask.device
        rank = torch.randint(1, layer.max_rank + 1, (), device=device)
        layer.rank_mask = rank_mask(rank, layer.max_rank, device)


def restore_full_ranks(layers: Iterable[TruncatedLoRALinear]) -> None:
    """Set the rank of each layer to its maximum rank."""
    for layer in layers:
        layer.set_rank(layer.max_rank)
