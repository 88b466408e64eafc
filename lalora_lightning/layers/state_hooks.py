"""State dict hooks of a low-rank layer: checks before saving and loading, and updating the mask."""

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "describe_extra_state",
    "require_unmerged_to_load",
    "require_unmerged_to_save",
    "update_mask",
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


def update_mask(layer: Any, incompatible_keys: Any) -> None:
    """Update the mask for the loaded rank; a post-hook of loading a state dict.

    Raises:
        ValueError: The loaded rank is not in [1, max_rank].
    """
    if not layer.rank.is_meta and not 1 <= layer.rank <= layer.max_rank:
        raise ValueError(f"Expected the loaded rank to be in [1, {layer.max_rank}] but got {int(layer.rank)}.")
    rank_mask = torch.arange(layer.max_rank, device=layer.rank.device) < layer.rank
    if layer.rank_mask.device == rank_mask.device:
        layer.rank_mask.copy_(rank_mask)
    else:
        layer.rank_mask = rank_mask


def describe_extra_state(state: Any) -> str:
    """Return a layer's extra state in words, for an error message."""
    scaling, *edges = state.tolist() if isinstance(state, Tensor) and state.ndim == 1 and len(state) else [state]
    return f"scaling {scaling} on output slices {list(zip(edges[::2], edges[1::2], strict=False))}"
