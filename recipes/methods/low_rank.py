"""La-LoRA, LoRA, and the variants of LoRA in :func:`lalora_lightning.add_lora`."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lalora_lightning import LaLoraCallback, add_lora

__all__ = ["adapt_by_lalora", "adapt_by_lora"]


def adapt_by_lalora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    """Return the callback, which adapts the module at the start of training."""
    return [LaLoraCallback(**settings)]


def adapt_by_lora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    """Adapt the module at a fixed rank; PiSSA, MiLoRA and LoRA-FA only differ in their settings."""
    add_lora(module, **settings)
    return []
