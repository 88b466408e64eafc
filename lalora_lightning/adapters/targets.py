"""Finding the layers to adapt: query and value projections, or the layers that ``target_modules`` names."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lalora_lightning.adapters.inspection import linear_layers_seen, named_parameters
from lalora_lightning.layers import IN_PROJ, is_linear, linear_shape
from lalora_lightning.names import parent_name

__all__ = ["FUSED_NAMES", "QUERY_VALUE_NAMES", "Targets", "find_targets", "match_modules", "require_untied_weights"]

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

    Args:
        modules: All modules of the model by name, see :func:`lalora_lightning.adapters.named_modules`.
        target_modules: As in :func:`add_lora`; by default query and value.

    Returns:
        The names of the modules, with the slices to adapt.

    Raises:
        ValueError: Nothing was found.
        TypeError: A target is not a linear module.
    """
    if target_modules is None:
        targets = _query_and_value(modules)
        if not targets:
            raise ValueError(
                "Expected to find query and value projections by the usual names but found none; name the layers to "
                f"adapt with target_modules. {linear_layers_seen(modules)}"
            )
        return targets
    matched = match_modules("target_modules", modules, target_modules)
    wrong = [f"{name} ({type(modules[name]).__name__})" for name in matched if not is_linear(modules[name])]
    if wrong:
        raise TypeError(f"Expected target_modules to match nn.Linear or Conv1D only but they match {', '.join(wrong)}.")
    return dict.fromkeys(matched)


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
        raise ValueError(
            f"Expected {argument} to match modules but nothing matches {', '.join(map(repr, missing))}. "
            + linear_layers_seen(modules)
        )
    return matched


def require_untied_weights(model: nn.Module, targets: Iterable[str]) -> None:
    """Check that no target shares its weight with another module.

    Raises:
        ValueError: A target shares its weight.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        parent, _, key = name.rpartition(".")
        owner = f"{parent}.{IN_PROJ}".lstrip(".") if key.startswith("in_proj_") else parent
        owners.setdefault(id(parameter), []).append(owner)
    for names in owners.values():
        if len(names) > 1 and not set(names).isdisjoint(targets):
            raise ValueError(
                f"Expected the weights of targets to be their own but {' and '.join(names)} share one; "
                "leave them out of target_modules or untie them."
            )


def _query_and_value(modules: Mapping[str, nn.Module]) -> Targets:
    linear = {name for name, module in modules.items() if is_linear(module)}
    targets: Targets = {}
    for name in filter(linear.__contains__, modules):
        prefix, dot, child = name.rpartition(".")
        if child in FUSED_NAMES or (child == IN_PROJ and isinstance(modules[prefix], nn.MultiheadAttention)):
            out_features, in_features = linear_shape(modules[name])
            # Other proportions mean something else: GPT-2's cross-attention fuses key and value only.
            if out_features == 3 * in_features:
                interleaved = _interleaves_heads(modules[parent_name(name)])
                targets[name] = None if interleaved else [(0, in_features), (2 * in_features, 3 * in_features)]
        elif any(child in pair and all(prefix + dot + other in linear for other in pair) for pair in QUERY_VALUE_NAMES):
            targets[name] = None
    return targets


def _interleaves_heads(attention: nn.Module) -> bool:
    """Return whether a fused projection interleaves query, key and value head by head."""
    # timm's MaxViT and CoAtNet; GPTBigCode with multi_query=False. With True, its projection has other proportions.
    return getattr(attention, "head_first", False) or hasattr(attention, "multi_query")
