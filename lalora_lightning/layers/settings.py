"""The settings of a layer: the scaling, and checks of the values."""

import math
from typing import get_args

import torch

from lalora_lightning.initialization import Init

__all__ = [
    "lora_scaling",
    "require_adapter_settings",
    "require_floating_point",
    "require_rank_that_fits",
    "require_slices",
]


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return ``alpha / rank``, or rank-stabilized ``alpha / sqrt(rank)`` (Kalajdzievski, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def require_adapter_settings(rank: int, alpha: float, dropout: float, init: str) -> None:
    """Check the settings of an adapter that do not depend on the layer.

    Raises:
        ValueError: One of them is out of range.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"Expected rank to be an integer of at least 1 but got {rank}.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"Expected alpha to be positive and finite but got {alpha}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout to be in [0, 1) but got {dropout}.")
    if init not in get_args(Init):
        raise ValueError(f"Expected init to be one of {get_args(Init)} but got {init!r}.")


def require_floating_point(compute_dtype: torch.dtype | None) -> None:
    """Raise a ValueError unless ``compute_dtype`` is a floating-point type or None."""
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise ValueError(
            f"Expected compute_dtype to be a type such as torch.float32, or None, but got {compute_dtype!r}."
        )


def require_slices(out_slices: tuple[tuple[int, int], ...], out_features: int) -> None:
    """Raise a ValueError unless the slices are ascending, disjoint ranges of output features."""
    end = 0
    for start, stop in out_slices:
        if not end <= start < stop <= out_features:
            raise ValueError(
                f"Expected out_slices to be ascending, disjoint ranges in [0, {out_features}] but got {out_slices}."
            )
        end = stop


def require_rank_that_fits(rank: int, out_slices: tuple[tuple[int, int], ...], in_features: int) -> None:
    """Raise a ValueError unless the rank is in [1, smaller side of the narrowest adapted weight]."""
    largest = min(in_features, *(stop - start for start, stop in out_slices))
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(
            f"Expected rank to be in [1, {largest}], an integer up to the smaller side of the weight, but got {rank}."
        )
