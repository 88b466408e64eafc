"""How ``lora_A`` and ``lora_B`` may start from the base weight: one pure function for each factorisation."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Init = Literal["kaiming", "orthogonal", "pissa", "milora", "olora"]


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The ``r`` largest singular values and their vectors (PiSSA: Meng et al., 2024), the largest first.

    Args:
        weight: ``W_0``, ``(m, d)``.
        rank: ``r``.
        scaling: What ``B A`` will be multiplied by; ``scaling * B A`` is the weight's best approximation of rank r.

    Returns:
        A ``(r, d)`` and B ``(m, r)``, in float32; the singular values are divided evenly between them.
    """
    return _singular(weight, slice(rank), scaling)


def milora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The ``r`` smallest singular values and their vectors (MiLoRA: Wang et al., 2024), the smallest first.

    Arguments and shapes as of :func:`pissa`.
    """
    A, B = _singular(weight, slice(min(weight.shape) - rank, None), scaling)
    return A.flip(0), B.flip(1)


def olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Rows of R and columns of Q of the weight's QR decomposition (OLoRA: Büyükakyüz, 2024), whatever the scaling.

    Arguments and shapes as of :func:`pissa`.
    """
    Q, R = torch.linalg.qr(weight.float())
    return R[:rank], Q[:, :rank]


FACTORIZATIONS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}


def _singular(weight: Tensor, which: slice, scaling: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[which] / scaling).sqrt()
    return root[:, None] * Vh[which], U[:, which] * root
