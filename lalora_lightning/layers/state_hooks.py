"""State dict hooks of a low-rank layer: checks before saving and loading, and reading the rank mask."""

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from lalora_lightning.layers.rank_masks import mask_problem, replace_ranks

__all__ = [
    "describe_extra_state",
    "replace_mask",
    "require_rank_mask",
    "require_unmerged_to_load",
    "require_unmerged_to_save",
    "warn_of_save_pretrained",
]

# Models whose save_pretrained was warned of.
_warned: "weakref.WeakSet[Any]" = weakref.WeakSet()


def require_unmerged_to_save(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Raise a RuntimeError if the layer is merged; a state dict pre-hook."""
    if layer.merged:
        raise RuntimeError(
            f"Expected {prefix.rstrip('.') or 'the layer'} to be unmerged when its state is saved, because loading it "
            "would add the adapter a second time; call unmerge_lora(model) first."
        )


def warn_of_save_pretrained(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Warn once a model if ``save_pretrained`` gets its state, which ``from_pretrained`` cannot read; a pre-hook.

    ``from_pretrained`` of transformers, sentence-transformers and diffusers builds a model without LoRA layers, where
    the adapted weights have other names, and initializes them at random.
    """
    frame, depth = sys._getframe(), 1
    while frame.f_code.co_name != "save_pretrained":
        if frame.f_back is None:
            return
        frame, depth = frame.f_back, depth + 1
    model = frame.f_locals.get("self")
    if model is None or model in _warned:
        return
    _warned.add(model)
    warnings.warn(
        f"La-LoRA: save_pretrained writes an adapted {type(model).__name__}, whose adapted weights from_pretrained "
        "initializes at random. Use save_peft_adapter(model, folder), or call merge_lora(model, remove=True) first. "
        "What is written now can be read with load_lora_state_dict(base_model, folder).",
        stacklevel=depth + 1,
    )


def require_unmerged_to_load(layer: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Raise a RuntimeError if the layer is merged; a pre-hook of loading a state dict."""
    if layer.merged:
        raise RuntimeError(
            f"Expected {prefix.rstrip('.') or 'the layer'} to be unmerged when a state is loaded, because its base "
            "weight still contains the old adapter; call unmerge_lora(model) first."
        )


def require_rank_mask(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *args: Any,
) -> None:
    """Check the mask in a state that is loaded, and warn once if there is none; a pre-hook.

    A state of version 0.1.0 contains the rank instead, which is replaced by its mask.

    Raises:
        ValueError: The rank or the mask is not one that a layer can have.
    """
    own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    replaced = replace_ranks(own)
    for key in own.keys() - replaced.keys():
        del state_dict[key]
    state_dict.update(replaced)
    key = f"{prefix}rank_mask"
    if key in state_dict:
        problem = mask_problem(key, state_dict[key])
        if problem is not None:
            raise ValueError(f"Cannot load the state: {problem}.")
        state_dict[key] = state_dict[key].float()
    elif f"{prefix}lora_B" in state_dict and not any(missing.endswith("rank_mask") for missing in missing_keys):
        warnings.warn(
            f"La-LoRA: the state has adapters without ranks ({key} is the first that is missing), so the ranks stay as "
            "they are. Save states with lora_state_dict(model), which contains the buffers rank_mask.",
            stacklevel=2,
        )


def replace_mask(layer: Any, incompatible_keys: Any) -> None:
    """Replace the mask with a copy, so that a rank allocator notices that a state was loaded; a post-hook."""
    # A mask that was made in inference mode could not be used in training.
    with torch.inference_mode(False):
        layer.rank_mask = layer.rank_mask.clone()


def describe_extra_state(state: Any) -> str:
    """Return a layer's extra state in words, for an error message."""
    scaling, *edges = state.tolist() if isinstance(state, Tensor) and state.ndim == 1 and len(state) else [state]
    return f"scaling {scaling} on output slices {list(zip(edges[::2], edges[1::2], strict=False))}"
