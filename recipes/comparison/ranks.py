"""Ranks and trimmed parameter counts of low-rank layers, both this package's and peft's."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lalora_lightning import lora_layers
from lalora_lightning.names import group_names
from lalora_lightning.runs import component_size

__all__ = ["adapter_parameters", "layer_ranks", "projection_ranks", "trimmed_parameters"]


def layer_ranks(ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the rank of each transformer block: the mean over its projections, given the rank of each by name."""
    return {block: sum(ranks[name] for name in names) / len(names) for block, names in group_names(ranks).items()}


def projection_ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each low-rank layer by name."""
    ranks = {name: int(layer.rank) for name, layer in lora_layers(model).items()}
    for name, layer in _peft_layers(model).items():
        ranks[name] = _kept_triplets(layer) if hasattr(layer, "lora_E") else layer.r["default"]
    return ranks


def adapter_parameters(model: nn.Module) -> int:
    """Return the parameters of this package's adapters, cut to their current ranks."""
    layers = lora_layers(model).values()
    return sum(component_size(layer.lora_A, layer.lora_B) * int(layer.rank) for layer in layers)


def trimmed_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters after cutting every low-rank layer to its current rank."""
    total = float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    for layer in lora_layers(model).values():
        own = sum(p.numel() for p in (layer.lora_A, layer.lora_B) if p.requires_grad)
        total -= own * (1 - int(layer.rank) / layer.max_rank)
    for peft_layer in _peft_layers(model).values():
        if hasattr(peft_layer, "lora_E"):
            own = sum(getattr(peft_layer, name)["default"].numel() for name in ("lora_A", "lora_B", "lora_E"))
            total -= own * (1 - _kept_triplets(peft_layer) / peft_layer.r["default"])
    return round(total)


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    """Return peft's layers with matrices A and B, recognized by their containers, without importing peft."""
    containers = (nn.ModuleDict, nn.ParameterDict)
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, "lora_A", None), containers)}


def _kept_triplets(layer: Any) -> int:
    """Count the singular triplets of an AdaLoRA layer that are not pruned, that is, not zero."""
    return int(layer.lora_E["default"].count_nonzero())
