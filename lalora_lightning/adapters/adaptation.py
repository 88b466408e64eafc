"""add_lora: adapt a model in place."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lalora_lightning.adapters.head import head_parameters, named_head_parameters
from lalora_lightning.adapters.insertion import insert_layers
from lalora_lightning.adapters.inspection import (
    AdapterSummary,
    linear_layers_seen,
    lora_layers,
    named_modules,
    summarize,
)
from lalora_lightning.adapters.remarks import remarks
from lalora_lightning.adapters.targets import (
    ALL_LINEAR,
    Targets,
    find_targets,
    layers_in_blocks,
    match_modules,
    require_untied_weights,
)
from lalora_lightning.initialization import Init
from lalora_lightning.layers import TruncatedLoRALinear, is_linear, linear_shape, lora_scaling
from lalora_lightning.names import parent_name

__all__ = ["add_lora"]


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    init: Init = "kaiming",
    use_rslora: bool = False,
    freeze_A: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> AdapterSummary:
    """Wrap every target in a :class:`TruncatedLoRALinear`, and freeze the rest of the model except for the head.

    Args:
        model: Any module; it is changed in place. It may be on the meta device.
        rank: Maximum rank of a projection.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names of linear modules, or a regular expression that matches whole names. ``"query"`` matches
            every module of this name, and ``"layer.3.query"`` is more specific. These projections are adapted as a
            whole. ``"query-value"``, the default, finds query and value projections by their usual names. Of fused
            projections (``qkv``, ``Wqkv``, ``c_attn``, and ``in_proj`` of ``nn.MultiheadAttention``), it adapts the
            slices of query and value, or the whole projection if it is ordered head by head. ``"all-linear"`` adapts
            all linear layers of the backbone: not the task head, and not the output layer of a language model. In
            fused projections, query, key and value are then slices of their own, which share a rank. Layers that are
            narrower than the rank are left out with a warning. Frozen modules are left alone if other matches are
            trainable.
        modules_to_save: Names of the modules that are trained in full. By default this is the task head: the modules
            next to the adapted backbone that contain a linear layer, and a text classifier's pooler that was never
            trained. Embeddings, output layers of language models and parameters that are already frozen are excepted.
            With an empty list, only the adapters are trained.
        device: Device of the adapters; by default that of the adapted weights.
        dtype: Data type of the adapters' parameters, also if the base model has a lower precision.
        rank_pattern: Maximum ranks for some projections, by a part of their names, such as
            ``{"layer.3": 2, "query": 4}``; the first match is used. The scaling stays ``alpha / rank``. These ranks
            are fixed, because a rank allocator needs the same maximum rank for all projections.
        init: Initialization of the adapters: "kaiming" or "orthogonal" (A random, B zero), "pissa" (largest singular
            values), "milora" (smallest), "olora" (QR). The adapted model always equals the base model initially.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (rank-stabilized LoRA, arXiv 2312.03732).
        freeze_A: Train ``lora_B`` only (LoRA-FA, arXiv 2308.03303).
        compute_dtype: Data type in which the adapters are computed; by default that of their input. With
            ``torch.float32`` over a bfloat16 model, the gradients of the adapters are as accurate as in float32, and a
            training step is slower. Under autocast, its type is used.

    Returns:
        A summary to print: ``print(add_lora(model))``.

    Raises:
        ValueError: The model is already adapted; nothing was found for ``target_modules`` or ``modules_to_save``; with
            ``"all-linear"``, the model has no blocks, so that its head cannot be told from the backbone; a
            target shares its weight with another module or is inside one of ``modules_to_save``; rank, alpha, dropout,
            a rank of the pattern, init or compute_dtype is out of range; or dropout would have no effect in an
            ``nn.MultiheadAttention``. The model is left unchanged.
        TypeError: A target is not a linear module.
    """
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already; add_lora adapts a model once.")
    modules = named_modules(model)
    targets = find_targets(modules, target_modules)
    narrow: list[str] = []
    if target_modules == ALL_LINEAR:
        in_full = match_modules("modules_to_save", modules, modules_to_save or [])
        targets, narrow = _wide_targets(modules, targets, in_full, rank)
    require_untied_weights(model, targets)
    if dropout:
        _require_no_attention(modules, targets)
    ranks = _match_ranks(rank_pattern or {}, targets, rank)
    if modules_to_save is None:
        # A model that consists of adapted layers only needs no head.
        linear = {name for name, module in modules.items() if is_linear(module)}
        whole = target_modules == ALL_LINEAR and set(targets) >= linear
        if whole and not layers_in_blocks(modules, targets):
            raise ValueError(
                "Expected a backbone of several blocks, beside which the task head is found, but found none; name the "
                "modules to train in full with modules_to_save, or set modules_to_save=[] to train adapters only. "
                + linear_layers_seen(modules)
            )
        trained = {} if whole else head_parameters(modules, targets)
    else:
        head = match_modules("modules_to_save", modules, modules_to_save)
        trained = named_head_parameters(modules, head, targets)
    _require_floating_point(trained)
    settings: dict[str, Any] = {
        "dropout": dropout,
        "device": device,
        "dtype": dtype,
        "init": init,
        "freeze_A": freeze_A,
        "compute_dtype": compute_dtype,
    }
    adapted = {}
    for name, out_slices in targets.items():
        base, settings["out_slices"] = modules[name], out_slices
        try:
            if name in ranks:
                scaling = lora_scaling(alpha, rank, use_rslora)
                adapted[name] = TruncatedLoRALinear.with_scaling(base, ranks[name], scaling, **settings)
            else:
                adapted[name] = TruncatedLoRALinear(base, rank, alpha, use_rslora=use_rslora, **settings)
        except ValueError as error:
            raise ValueError(f"Cannot adapt {name}. {error}") from error

    if narrow:
        warnings.warn(
            f"La-LoRA: not adapted, because they are narrower than rank {rank}: {', '.join(narrow)}.", stacklevel=2
        )
    for remark in remarks(modules, targets, target_modules, dropout):
        warnings.warn(f"La-LoRA: {remark}", stacklevel=2)
    insert_layers(model, adapted, trained.values())
    return summarize(model)


def _wide_targets(
    modules: Mapping[str, nn.Module], targets: Targets, in_full: Iterable[str], rank: int
) -> tuple[Targets, list[str]]:
    """Return the targets outside of the modules that are trained in full, and apart the names of too narrow ones."""
    inside = tuple(f"{name}." for name in in_full)
    outside = {name: slices for name, slices in targets.items() if not f"{name}.".startswith(inside)}
    narrow = [name for name in outside if min(linear_shape(modules[name])) < rank]
    return {name: slices for name, slices in outside.items() if name not in narrow}, narrow


def _require_no_attention(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> None:
    for name in targets:
        if isinstance(modules.get(parent_name(name)), nn.MultiheadAttention):
            raise ValueError(
                f"Expected dropout=0 for {name} but got another value: nn.MultiheadAttention reads the weights of its "
                "projections and never calls them, so dropout would have no effect."
            )


def _require_floating_point(trained: Mapping[str, nn.Parameter]) -> None:
    quantized = dict.fromkeys(parent_name(name) for name, p in trained.items() if not p.is_floating_point())
    if quantized:
        raise ValueError(
            f"Expected modules that can be trained in full but {', '.join(quantized)} hold quantized weights; leave "
            "them out of modules_to_save, or out of the quantization."
        )


def _match_ranks(rank_pattern: Mapping[str, int], targets: Iterable[str], rank: int) -> dict[str, int]:
    """Return the maximum rank of each target that the pattern matches."""
    if rank_pattern and rank < 1:
        raise ValueError(f"Expected rank to be at least 1 but got {rank}.")
    ranks = {}
    unmatched = set(rank_pattern)
    for name in targets:
        matching = [part for part in rank_pattern if f".{part}." in f".{name}."]
        unmatched -= set(matching)
        if matching:
            ranks[name] = rank_pattern[matching[0]]
    if unmatched:
        raise ValueError(
            "Expected the keys of rank_pattern to be parts of the names of adapted projections but "
            f"{', '.join(sorted(unmatched))} is in none of {', '.join(targets)}."
        )
    return ranks
