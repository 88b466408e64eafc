"""Initializations of ``lora_A`` and ``lora_B`` from the base weight: one pure function for each factorization."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["FACTORIZATIONS", "Init", "milora", "olora", "pissa"]

Init = Literal["kaiming", "orthogonal", "pissa", "milora", "olora"]


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors from the ``r`` largest singular values, the largest first (PiSSA, arXiv 2404.02948).

    Args:
        weight: ``W_0``, ``(m, d)``.
        rank: ``r``.
        scaling: Factor of ``B A`` in the layer; ``scaling * B A`` is the best approximation of the weight at rank r.

    Returns:
        A ``(r, d)`` and B ``(m, r)`` in float32, with the singular values divided evenly between them.
    """
    return _singular_factors(weight, slice(rank), scaling)


def milora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors from the ``r`` smallest singular values, the smallest first (MiLoRA, arXiv 2406.09044).

    Arguments and shapes as in :func:`pissa`.
    """
    A, B = _singular_factors(weight, slice(min(weight.shape) - rank, None), scaling)
    return A.flip(0), B.flip(1)


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return rows of R and columns of Q of the weight's QR decomposition (OLoRA, arXiv 2406.01775).

    Arguments and shapes as in :func:`pissa`; the scaling is not used.
    """
    Q, R = torch.linalg.qr(weight.float())
    return R[:rank], Q[:, :rank]


FACTORIZATIONS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}
"""The initializations with a nonzero ``B A``, by name."""


def _singular_factors(weight: Tensor, components: slice, scaling: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[components] / scaling).sqrt()
    return root[:, None] * Vh[components], U[:, components] * root
