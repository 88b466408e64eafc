"""Sparsity (Eq. 1) of every layer's weight increment."""

import torch
from torch import Tensor, nn

from lalora_lightning import functional
from lalora_lightning.adapters import GroupBy, group_names, require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear, whole


@torch.no_grad()
def layer_sparsity(model: nn.Module, group_by: GroupBy = "block") -> Tensor:
    """Share of each layer's increment ``P = scaling * B_r' A_r'`` that is as good as zero (Eq. 1).

    Counted over all adapted entries of the layer's projections; of a fused projection, over the adapted slices only.
    Sharded adapters are gathered, so every process has to call this.

    Args:
        model: With LoRA layers.
        group_by: Which projections make a layer, see :func:`lalora_lightning.adapters.group_names`.

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
    """Sparsity and number of entries of each adapted slice."""
    increments = _products(layer, whole(layer.lora_A), whole(layer.lora_B))
    if layer.start_A is not None and layer.start_B is not None:
        starts = _products(layer, layer.start_A, layer.start_B)
        increments = [own - start for own, start in zip(increments, starts, strict=True)]
    return [(functional.sparsity(layer.scaling * increment), increment.numel()) for increment in increments]


def _products(layer: TruncatedLoRALinear, A: Tensor, B: Tensor) -> list[Tensor]:
    return [(B_i.float() * layer.rank_mask) @ A_i.float() for A_i, B_i in layer.split(A, B)]
