"""La-LoRA, and LoRA with its variants that :func:`lalora_lightning.add_lora` implements."""

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lalora_lightning import LaLoraCallback, add_lora

__all__ = ["adapt_by_lalora", "adapt_by_lora"]


def adapt_by_lalora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    """Return the callback, which adapts the module at the start of training."""
    return [LaLoraCallback(**settings)]


def adapt_by_lora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    """Adapt the module at a fixed rank. PiSSA, MiLoRA and LoRA-FA differ in their settings only."""
    add_lora(module, **settings)
    return []
