"""Sparsity (Eq. 1) of every layer's weight increment."""

import torch
from torch import Tensor, nn

from lalora_lightning import functional
from lalora_lightning.adapters import require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.names import GroupBy, group_names

__all__ = ["layer_sparsity"]


@torch.no_grad()
def layer_sparsity(model: nn.Module, group_by: GroupBy = "block") -> Tensor:
    """Return the share of nearly zero entries in each layer's increment ``P = scaling * B_r' A_r'`` (Eq. 1).

    All adapted entries of the layer's projections count; in a fused projection, only those of the adapted slices.
    Sharded adapters are gathered, so every process has to call this.

    Args:
        model: A model with LoRA layers.
        group_by: Which projections form a layer, see :func:`lalora_lightning.names.group_names`.

    Returns:
        ``(L,)`` in [0, 1], in the order of ``RankAllocator.layer_names``; 1 before training, when ``lora_B`` is zero.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = require_lora_layers(model)
    sparsities = []
    for names in group_names(layers, group_by).values():
        parts = [part for name in names for part in _slice_sparsities(layers[name])]
        entries = sum(size for _, size in parts)
        sparsities.append(torch.stack([sparsity * (size / entries) for sparsity, size in parts]).sum())
    return torch.stack(sparsities)


def _slice_sparsities(layer: TruncatedLoRALinear) -> list[tuple[Tensor, int]]:
    """Return the sparsity and the number of entries of each adapted slice."""
    increment = layer.increment()
    slices = [increment[start:stop] for start, stop in layer.out_slices]
    return [(functional.sparsity(part), part.numel()) for part in slices]
