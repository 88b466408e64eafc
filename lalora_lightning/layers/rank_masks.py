"""The rank mask of a layer in a state dict: what is valid, and what takes its place in older and partial states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["mask_problem", "rank_mask", "replace_ranks"]


def rank_mask(rank: int | Tensor, max_rank: int, device: torch.device | None = None) -> Tensor:
    """Return ``(max_rank,)`` float32, 1 for the first ``rank`` components and 0 for the others."""
    return (torch.arange(max_rank, device=device) < rank).float()


def mask_problem(key: str, mask: Any) -> str | None:
    """Return what is wrong with a loaded mask, in words, or None.

    A mask keeps the first components of a layer. The values of an average of several masks fall from 1 to 0.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 1 or mask.is_complex():
        return f"expected {key} to be a vector but got {getattr(mask, 'shape', type(mask).__name__)}"
    if mask.is_meta:
        return None
    values = mask.float()
    # Comparisons with NaN are false.
    if not ((values >= 0) & (values <= 1)).all() or not (values.diff() <= 0).all():
        return f"expected {key} to fall from 1 to 0, as in [1, 1, 0, 0] for rank 2, but got {mask.tolist()}"
    return None


def replace_ranks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with a mask for each rank, which the states of version 0.1.0 contain instead.

    Raises:
        ValueError: A rank is not a number from 0 to the maximum rank; the message lists all of them.
    """
    state, problems = dict(state), []
    for key in [key for key in state if str(key).rpartition(".")[2] == "rank"]:
        prefix = key.removesuffix("rank")
        B = state.get(f"{prefix}lora_B")
        if not isinstance(B, Tensor) or B.ndim != 2 or f"{prefix}rank_mask" in state:
            continue
        rank = state.pop(key)
        if not isinstance(rank, Tensor) or rank.numel() != 1 or not (rank.is_meta or 0 <= rank <= B.shape[1]):
            shown = rank.item() if isinstance(rank, Tensor) and rank.numel() == 1 else rank
            problems.append(f"expected {key} to be in [0, {B.shape[1]}] but got {shown!r}")
            continue
        state[f"{prefix}rank_mask"] = rank_mask(rank.reshape(()), B.shape[1], rank.device)
    if problems:
        raise ValueError(f"Cannot load the ranks: {'; '.join(problems)}.")
    return state
