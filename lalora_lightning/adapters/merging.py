"""Merging adapters into the base weights, undoing it, and trimming adapters to their ranks, for a whole model."""

from torch import nn

from lalora_lightning.adapters.insertion import remove_layers
from lalora_lightning.adapters.inspection import require_lora_layers

__all__ = ["merge_lora", "trim_lora", "unmerge_lora"]


def merge_lora(model: nn.Module, remove: bool = False) -> None:
    """Add every adapter to its base weight, all or none; see :meth:`TruncatedLoRALinear.merge`.

    A merged model needs more memory: each layer keeps a copy of its original base weight, so that
    :func:`unmerge_lora` can restore it. With ``remove=True`` no copies are kept.

    Args:
        model: The adapted model.
        remove: Also put the plain linear modules back, for good: the model then saves and loads as if it had never
            been adapted. Their weights stay frozen.

    Raises:
        ValueError: The model has no LoRA layers, or a merged weight would not be finite.
        RuntimeError: A layer is merged already.
        TypeError: A base weight is quantized.
    """
    layers = require_lora_layers(model)
    if remove and "" in layers:
        raise ValueError(
            "Expected a model with LoRA layers in it but it is one itself; merge it and take its base_layer."
        )
    merged = []
    try:
        for layer in layers.values():
            layer.merge()
            merged.append(layer)
    except Exception:
        for layer in merged:
            layer.unmerge()
        raise
    if remove:
        remove_layers(model, layers)


def unmerge_lora(model: nn.Module) -> None:
    """Restore every base weight bit for bit; see :meth:`TruncatedLoRALinear.unmerge`.

    Raises:
        ValueError: The model has no LoRA layers.
        RuntimeError: A layer is not merged.
    """
    for layer in require_lora_layers(model).values():
        layer.unmerge()


def trim_lora(model: nn.Module) -> None:
    """Cut every adapter to its current rank; see :meth:`TruncatedLoRALinear.trim`.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    for layer in require_lora_layers(model).values():
        layer.trim()
