"""Size of a trimmed adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["component_size", "trimmed_bytes"]


def component_size(lora_A: Tensor, lora_B: Tensor) -> int:
    """Return the parameters of one rank of an adapter; with slices, of one rank of all of them.

    Args:
        lora_A: ``(r, d)``.
        lora_B: ``(m, r)``.
    """
    return (lora_A.numel() + lora_B.numel()) // lora_B.shape[1]


def trimmed_bytes(lora_A: Tensor, lora_B: Tensor, rank: int) -> int:
    """Return the bytes of an adapter that is trimmed to a rank.

    Args:
        lora_A: ``(r, d)``.
        lora_B: ``(m, r)``.
        rank: At most r.
    """
    return component_size(lora_A, lora_B) * lora_A.element_size() * rank
