"""combine_lora: one adapter that adds several ones."""

import copy
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.adapters import (
    AdapterSummary,
    insert_layers,
    lora_layers,
    named_modules,
    named_parameters,
    summarize,
)
from lalora_lightning.functional import singular_factors
from lalora_lightning.layers import TruncatedLoRALinear, linear_shape
from lalora_lightning.names import endings, state_name
from lalora_lightning.saving.peft_folder import CONFIG_FILE, read_folder
from lalora_lightning.saving.peft_import import adapt_as_in_peft
from lalora_lightning.saving.state import load_by_name, load_lora_state_dict, read_state
from lalora_lightning.saving.wrappers import model_itself

__all__ = ["combine_lora"]

_Source = str | os.PathLike[str] | Mapping[str, Any]


@torch.no_grad()
def combine_lora(model: nn.Module, adapters: Mapping[str, float] | Iterable[tuple[_Source, float]]) -> AdapterSummary:
    """Adapt a model with a weighted sum of adapters: ``combine_lora(model, {"a.pt": 0.7, "b": 0.3})``.

    The increment of each layer is the weighted sum of the increments, exactly: the factors are concatenated, so the
    ranks add up. Lower them with :func:`lalora_lightning.condense_lora`. Modules that were trained in full, such as a
    task head, become the weighted mean.

    A model has one set of adapters. To switch between adapters, load each of them into a copy of the model. To train
    another adapter after the first, merge that one (``merge_lora(model, remove=True)``) and adapt the model again.

    Args:
        model: The base model, without LoRA layers.
        adapters: Weight of each adapter. An adapter is what :func:`lalora_lightning.load_lora_state_dict` reads, or a
            folder of :func:`lalora_lightning.save_peft_adapter` or PEFT. States in memory are given as pairs.

    Returns:
        A summary to print.

    Raises:
        ValueError: There are no adapters, or all their ranks are 0; a weight is not finite; an adapter does not fit the
            model; or modules were trained in full and the weights add up to zero. The model is left unchanged.
        FileNotFoundError: There is no such file.
    """
    model = model_itself(model)
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already.")
    weighted = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    if not weighted or not all(math.isfinite(weight) for _, weight in weighted):
        raise ValueError(f"Expected adapters with finite weights but got {[weight for _, weight in weighted]}.")
    was_trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        loaded = [_load(model, source) for source, _ in weighted]
    finally:
        for parameter, trainable in was_trainable:
            parameter.requires_grad_(trainable)

    weights = [weight for _, weight in weighted]
    values = _means(weights, [others for _, others in loaded])
    modules = named_modules(model)
    layers = {}
    for name in dict.fromkeys(name for factors, _ in loaded for name in factors):
        parts = [(w, *factors[name]) for w, (factors, _) in zip(weights, loaded, strict=True) if name in factors]
        layers[name] = _layer(modules[name], torch.cat([A for _, A, _ in parts]), [w * B for w, _, B in parts])
    if not layers:
        raise ValueError("Expected adapters with ranks above 0 but all ranks are 0.")
    trained = [p for name, p in named_parameters(model) if name in values]
    insert_layers(model, layers, trained)
    load_by_name(model, values)
    return summarize(model)


def _load(model: nn.Module, source: _Source) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return the folded factors of an adapter by layer, and all other values that it contains."""
    if not isinstance(source, Mapping) and (Path(source) / CONFIG_FILE).exists():
        config, tensors = read_folder(Path(source))
        twin = _twin(model, tensors)
        adapt_as_in_peft(twin, config, tensors, source)
    else:
        state = source if isinstance(source, Mapping) else read_state(source)
        twin = _twin(model, state)
        load_lora_state_dict(twin, state)
    layers = lora_layers(twin)
    factors = {f"{name}.{key}".lstrip(".") for name, layer in layers.items() for key, _ in _own_values(layer)}
    trainable = {name for name, p in named_parameters(twin) if p.requires_grad} | {n for n, _ in twin.named_buffers()}
    others = {key: value for key, value in twin.state_dict().items() if key in trainable and key not in factors}
    return {name: layer.folded() for name, layer in layers.items() if layer.rank > 0}, others


def _own_values(layer: TruncatedLoRALinear) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _twin(model: nn.Module, state: Iterable[str]) -> nn.Module:
    """Return a copy of a model that shares all values but those that a state with these keys may change."""
    # The names in a state may have further parts in front.
    changed = {ending for key in state for ending in endings(state_name(str(key)))}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return copy.deepcopy(model, {id(value): value for name, value in named if state_name(name) not in changed})


def _means(weights: list[float], values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weighted mean of each value; a counter is that of the first, and equal values stay as they are."""
    means = {}
    for key in dict.fromkeys(key for each in values for key in each):
        parts = [(weight, each[key]) for weight, each in zip(weights, values, strict=True) if key in each]
        total, first = sum(weight for weight, _ in parts), parts[0][1]
        if not first.is_floating_point() or all(torch.equal(value, first) for _, value in parts):
            means[key] = first
        elif total == 0:
            raise ValueError(f"Expected weights that do not add up to 0, to average {key}, but got {weights}.")
        else:
            dtype = torch.promote_types(first.dtype, torch.float32)
            zeros = torch.zeros_like(first, dtype=dtype)
            means[key] = sum((weight / total * value.to(dtype) for weight, value in parts), zeros).to(first.dtype)
    return means


def _layer(base_layer: nn.Module, A: Tensor, parts_of_B: list[Tensor]) -> TruncatedLoRALinear:
    """Return a layer with the factors ``A (R, d)`` and ``B (m, R)``, of a rank that the weight can have."""
    B = torch.cat(parts_of_B, dim=1)
    largest = min(linear_shape(base_layer))
    if len(A) > largest:
        A, B, _ = singular_factors(A, B)
        A, B = A[:largest], B[:, :largest]
    layer = TruncatedLoRALinear.with_scaling(base_layer, len(A), 1.0, dtype=A.dtype)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    return layer
