"""Methods whose layers come from the peft library, inserted in place: DoRA, RandLoRA and VeRA."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lalora_lightning.adapters import find_head
from recipes.methods.fused_projections import split_fused
from recipes.methods.projections import find_projections

__all__ = ["add_dora", "add_randlora", "add_vera", "insert_peft_layers", "train_head", "whole_projections"]


def add_dora(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """Train the directions of the weight's columns with LoRA, and their magnitudes (arXiv 2402.09353)."""
    from peft import LoraConfig

    targets = whole_projections(module, target_modules)
    # The type hint of lora_alpha is int, but peft also computes with floats.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_dora=True,
        target_modules=targets,
    )
    insert_peft_layers(module, config, targets)
    return []


def add_randlora(
    module: nn.Module,
    basis_rank: int = 32,
    scaling: float = 20.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """Train diagonal combinations of frozen random bases, which are full-rank updates (arXiv 2502.00987)."""
    from peft import RandLoraConfig

    targets = whole_projections(module, target_modules)
    config = RandLoraConfig(
        r=basis_rank,
        randlora_alpha=scaling * basis_rank,  # type: ignore[arg-type]
        randlora_dropout=dropout,
        projection_prng_key=_seed(),
        target_modules=targets,
    )
    insert_peft_layers(module, config, targets)
    return []


def add_vera(
    module: nn.Module,
    shared_rank: int = 256,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """Train two vectors per projection; all share a pair of frozen random matrices (arXiv 2310.11454)."""
    from peft import VeraConfig
    from peft.tuners.vera import VeraModel

    targets = whole_projections(module, target_modules)
    head = find_head(module, targets)
    # The layers have references to the shared matrices, so peft's wrapper around the model is not needed.
    config = VeraConfig(r=shared_rank, vera_dropout=dropout, projection_prng_key=_seed(), target_modules=targets)
    VeraModel(module, config, "default")
    train_head(module, head)
    return []


def _seed() -> int:
    """Return a seed for peft's random matrices, which follow that of torch; peft's own default is always the same."""
    return torch.initial_seed() % 2**31


def whole_projections(module: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Split fused projections that are adapted in part, and return the names of the linear modules to adapt."""
    projections = find_projections(module, target_modules)
    if projections.fused:
        split_fused(module, projections.fused)
        projections = find_projections(module, target_modules)
    return projections.names


def insert_peft_layers(module: nn.Module, config: Any, targets: Sequence[str]) -> None:
    """Insert peft's layers, and make them and the head trainable.

    Args:
        module: The module.
        config: The config of a peft method.
        targets: Names of projections of the backbone; the head is found by its position relative to them.
    """
    from peft import inject_adapter_in_model

    head = find_head(module, targets)
    inject_adapter_in_model(config, module)
    train_head(module, head)


def train_head(module: nn.Module, head: set[str]) -> None:
    """Make the parameters with these names trainable."""
    for name, parameter in module.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
