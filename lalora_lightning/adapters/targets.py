"""Finding the layers to adapt: query and value, all linear layers, or those that ``target_modules`` names."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lalora_lightning.adapters.fused import interleaved_projections
from lalora_lightning.adapters.head import head_modules, output_layers
from lalora_lightning.adapters.inspection import expert_parameters, is_metric, linear_layers_seen
from lalora_lightning.layers import IN_PROJ, is_linear, linear_shape
from lalora_lightning.names import parent_name, state_name

__all__ = [
    "ALL_LINEAR",
    "FUSED_NAMES",
    "QUERY_VALUE",
    "QUERY_VALUE_NAMES",
    "Targets",
    "find_targets",
    "layers_in_blocks",
    "match_modules",
    "require_untied_weights",
]

ALL_LINEAR = "all-linear"
"""Value of ``target_modules`` for all linear layers of the backbone, the word that PEFT uses, too."""

QUERY_VALUE = "query-value"
"""Value of ``target_modules`` for the query and value projections, as in the paper; None means the same."""

Targets = dict[str, list[tuple[int, int]] | None]
"""Names of linear modules, with the adapted slices of their outputs; None for the whole output."""

QUERY_VALUE_NAMES = (
    ("query", "value"),  # RoBERTa, BERT, ALBERT, ELECTRA
    ("q_proj", "v_proj"),  # LLaMA, ViT, CLIP, Whisper, OPT
    ("q", "v"),  # T5
    ("query_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("q_lin", "v_lin"),  # DistilBERT
)
"""Names of query and value projections in common model families."""

FUSED_NAMES = ("qkv", "Wqkv", "c_attn")
"""Names of fused query, key and value projections, in this order: timm's ViTs, ModernBERT, GPT-2."""


def find_targets(modules: Mapping[str, nn.Module], target_modules: Sequence[str] | str | None = None) -> Targets:
    """Find the linear modules that :func:`add_lora` adapts.

    Where some of them are trainable and others frozen, the frozen ones are left alone: they belong to a teacher, a
    momentum encoder or a loss. Modules inside of metrics are left alone, too.

    Args:
        modules: All modules of the model by name, see :func:`lalora_lightning.adapters.named_modules`.
        target_modules: As in :func:`add_lora`.

    Returns:
        The names of the modules, with the slices to adapt.

    Raises:
        ValueError: Nothing was found.
        TypeError: A target is not a linear module.
    """
    if target_modules is None or target_modules == QUERY_VALUE:
        targets = _query_and_value(modules)
        if not targets:
            raise ValueError(
                "Expected to find query and value projections by the usual names but found none; name the layers to "
                f"adapt with target_modules. {linear_layers_seen(modules)}"
            )
    elif target_modules == ALL_LINEAR:
        targets = _all_linear(modules)
    else:
        matched = match_modules("target_modules", modules, target_modules)
        wrong = [f"{name} ({type(modules[name]).__name__})" for name in matched if not is_linear(modules[name])]
        if wrong:
            raise TypeError(
                f"Expected target_modules to match nn.Linear or Conv1D only but they match {', '.join(wrong)}."
            )
        targets = dict.fromkeys(matched)
    trained = _among_what_is_trained(modules, targets)
    return _without_slices_across_heads(modules, {n: slices for n, slices in targets.items() if n in trained})


def match_modules(argument: str, modules: Mapping[str, nn.Module], wanted: Sequence[str] | str) -> list[str]:
    """Return the module names that match a regular expression in full, or that end in one of the given names.

    Args:
        argument: Name of the argument that ``wanted`` was given as, for the error message.
        modules: All modules of the model by name.
        wanted: A regular expression or names.

    Raises:
        ValueError: The expression, or one of the names, matches nothing.
    """
    if isinstance(wanted, str):
        matched = [name for name in modules if re.fullmatch(wanted, name)]
        missing = [] if matched else [wanted]
    else:
        matched = [name for name in modules if any(("." + name).endswith("." + end) for end in wanted)]
        missing = [end for end in wanted if not any(("." + name).endswith("." + end) for name in matched)]
    if missing:
        experts = expert_parameters(modules, wanted if isinstance(wanted, str) else missing)
        raise ValueError(
            f"Expected {argument} to match modules but nothing matches {', '.join(map(repr, missing))}. "
            + (f"{experts[0]} is a 3-D parameter, which cannot be adapted. " if experts else "")
            + linear_layers_seen(modules)
        )
    return matched


def layers_in_blocks(modules: Mapping[str, nn.Module], linear: Iterable[str]) -> list[str]:
    """Return the linear layers that mark the blocks of a backbone, beside which the task head is found.

    These are query and value projections, or else names that occur in several blocks, such as ``blocks.0.mlp.fc1``.

    Args:
        modules: All modules of the model by name.
        linear: Names of its linear layers.
    """
    return list(_query_and_value(modules)) or _in_repeated_blocks(linear)


def require_untied_weights(model: nn.Module, targets: Iterable[str]) -> None:
    """Check that no target shares its weight with another module; one module under two names is one module.

    Raises:
        ValueError: A target shares its weight.
    """
    # Of each parameter, the modules that own it, with their first names.
    owners: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            owner = f"{name}.{IN_PROJ}" if key.startswith("in_proj_") else name
            owners.setdefault(id(parameter), {}).setdefault(id(module), state_name(owner).lstrip("."))
    for names in (list(modules.values()) for modules in owners.values()):
        if len(names) > 1 and not set(names).isdisjoint(targets):
            raise ValueError(
                f"Expected the weights of targets to be their own but {' and '.join(names)} share one; "
                "leave them out of target_modules or untie them."
            )


def _among_what_is_trained(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> set[str]:
    """Return the targets that are trainable, or all of them if none is; without those inside of metrics."""
    metrics = tuple(f"{name}." for name, module in modules.items() if name and is_metric(module))
    outside = {name for name in targets if not name.startswith(metrics)} or set(targets)
    trainable = {name for name in outside if any(p.requires_grad for p in modules[name].parameters())}
    return trainable or outside


def _query_and_value(modules: Mapping[str, nn.Module]) -> Targets:
    targets: Targets = {}
    for name in [name for name, module in modules.items() if is_linear(module)]:
        child = name.rpartition(".")[2]
        if _is_fused(modules, name):
            # Other proportions mean something else: GPT-2's cross-attention fuses key and value only. Where the width
            # of a hierarchical model changes, the outputs are wider than the inputs (Hiera, MViT).
            if thirds := _thirds(modules[name]):
                targets[name] = [thirds[0], thirds[2]]
        elif any(child in pair and _has_linear(modules[parent_name(name)], pair) for pair in QUERY_VALUE_NAMES):
            targets[name] = None
    return targets


def _all_linear(modules: Mapping[str, nn.Module]) -> Targets:
    """Return all linear layers of the backbone: without the task head and the output layers of language models."""
    outputs = output_layers(modules)
    linear = [name for name, module in modules.items() if is_linear(module) and name not in outputs]
    head = _head_beside(modules, _among_what_is_trained(modules, layers_in_blocks(modules, linear)), outputs)
    backbone = [name for name in linear if not any(f"{name}.".startswith(f"{module}.") for module in head)]
    targets = {name: _thirds(modules[name]) if _is_fused(modules, name) else None for name in backbone}
    if not targets:
        raise ValueError(f"Expected a backbone with linear layers but found none. {linear_layers_seen(modules)}")
    return targets


def _head_beside(modules: Mapping[str, nn.Module], blocks: Iterable[str], outputs: set[str]) -> list[str]:
    """Return the modules of the task head, beside the layers of the blocks; none if the model has no head."""
    if not blocks:
        return []
    try:
        return head_modules(modules, blocks, outputs)
    except ValueError:
        return []


def _in_repeated_blocks(names: Iterable[str]) -> list[str]:
    """Return the names that occur in several blocks, such as ``blocks.0.mlp.fc1``; not those of a Sequential."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        if re.search(r"\.\d+\..", name):
            kinds.setdefault(re.sub(r"\.\d+", ".*", name), []).append(name)
    return [name for members in kinds.values() if len(members) > 1 for name in members]


def _is_fused(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether a linear layer has the name of a fused query, key and value projection."""
    prefix, _, child = name.rpartition(".")
    return child in FUSED_NAMES or (child == IN_PROJ and isinstance(modules[prefix], nn.MultiheadAttention))


def _thirds(layer: nn.Module) -> list[tuple[int, int]] | None:
    """Return the slices of query, key and value; None if the output does not consist of three equal parts."""
    out_features, in_features = linear_shape(layer)
    if out_features % (3 * in_features) != 0:
        return None
    third = out_features // 3
    return [(0, third), (third, 2 * third), (2 * third, 3 * third)]


def _without_slices_across_heads(modules: Mapping[str, nn.Module], targets: Targets) -> Targets:
    """Return the targets, with fused projections that are ordered head by head as a whole."""
    fused = [name for name, slices in targets.items() if slices is not None]
    interleaved = interleaved_projections(modules, fused)
    return {name: None if interleaved.get(name) else slices for name, slices in targets.items()}


def _has_linear(parent: nn.Module, names: Iterable[str]) -> bool:
    """Return whether a module has linear children of all these names, which may have other names elsewhere, too."""
    children = [getattr(parent, name, None) for name in names]
    return all(isinstance(child, nn.Module) and is_linear(child) for child in children)
