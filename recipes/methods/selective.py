"""Methods that train some of the model's own parameters: all of them, the biases (BitFit), the head only."""

from collections.abc import Callable

import lightning.pytorch as pl
from torch import nn

from lalora_lightning.adapters import find_head
from recipes.methods.projections import NotApplicableError, find_projections

__all__ = ["freeze_backbone", "train_all", "train_biases", "train_head_only"]


def train_all(module: nn.Module) -> list[pl.Callback]:
    """Leave the module as it is: full fine-tuning."""
    return []


def train_head_only(module: nn.Module) -> list[pl.Callback]:
    """Train the head on the features of the frozen backbone: linear probing."""
    freeze_backbone(module)
    return []


def train_biases(module: nn.Module) -> list[pl.Callback]:
    """Train all biases and the head (BitFit, arXiv 2106.10199)."""
    freeze_backbone(module, keep=lambda name: name.rpartition(".")[2] == "bias")
    return []


def freeze_backbone(module: nn.Module, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Freeze all parameters except the head's and those that are selected by name.

    Args:
        module: The module; its head is found in the same way as for La-LoRA.
        keep: A function that returns whether a parameter of this name stays trainable. Parameters that are already
            frozen stay frozen.

    Raises:
        NotApplicableError: There is no such parameter.
    """
    head = find_head(module, find_projections(module).names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in head or (parameter.requires_grad and keep(name)))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise NotApplicableError("it has no parameters of this kind, such as a new task head")
