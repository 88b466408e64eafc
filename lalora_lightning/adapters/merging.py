"""Merging, unmerging and trimming all adapters of a model."""

from torch import nn

from lalora_lightning.adapters.insertion import remove_layers
from lalora_lightning.adapters.inspection import require_lora_layers

__all__ = ["merge_lora", "trim_lora", "unmerge_lora"]


def merge_lora(model: nn.Module, remove: bool = False) -> None:
    """Add every adapter to its base weight; see :meth:`TruncatedLoRALinear.merge`.

    A merged model needs more memory, because each layer keeps a copy of its original base weight for
    :func:`unmerge_lora`. With ``remove=True`` no copies are kept. If a layer cannot be merged, none are.

    Args:
        model: The adapted model.
        remove: Also replace the LoRA layers with plain linear modules, permanently. The model can then be saved and
            loaded as if it had never been adapted. The merged weights stay frozen.

    Raises:
        ValueError: The model has no LoRA layers, or a merged weight would not be finite.
        RuntimeError: A layer is merged already.
        TypeError: A base weight is quantized.
    """
    layers = require_lora_layers(model)
    if remove and "" in layers:
        raise ValueError(
            "Expected a model that contains LoRA layers but it is one itself; merge it and use its base_layer."
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

    Where the rank is 0, the plain linear module returns.

    Raises:
        ValueError: The model has no LoRA layers, or is itself one of rank 0.
    """
    layers = require_lora_layers(model)
    empty = {name: layer for name, layer in layers.items() if layer.rank == 0}
    if "" in empty:
        raise ValueError(
            "Expected a model that contains LoRA layers but it is one itself, of rank 0; use its base_layer."
        )
    for name in layers.keys() - empty.keys():
        layers[name].trim()
    remove_layers(model, empty)
