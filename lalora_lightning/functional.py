"""The equations of La-LoRA, one pure function each: tensors in, tensors out, nothing stored.

Source: Gu, Yuan, Cai, Zhou, Fan, "La-LoRA: Parameter-efficient fine-tuning with layer-wise adaptive low-rank
adaptation", Neural Networks 194 (2025) 108095.

Shapes used throughout: ``L`` layers that get a rank each, at most ``K`` adapted weight matrices in a layer, ``r``
rank components in a matrix. Norms of both factors are stored together along a leading dimension of size 2: index 0 is
``lora_A``, index 1 is ``lora_B``. A layer with fewer than ``K`` matrices is padded with zero norms, which add nothing.

No function copies a value from the device, so none causes a synchronization. Where an equation divides zero by zero,
the result is the value that docs/method.md defines instead of NaN. The caller has to check for norms that are NaN or
Inf.
"""

import torch
from torch import Tensor

__all__ = [
    "allocate_ranks",
    "component_norms",
    "contributions",
    "fidelities",
    "growth_rates",
    "norms_by_rank",
    "relative_contributions",
    "sparsity",
    "truncated_norms",
    "update_budget",
    "values",
]

_ROUNDING_TOLERANCE = 1e-3


def sparsity(increment: Tensor, threshold: float = 1e-4) -> Tensor:
    """Return the share of an increment's entries that are nearly zero (Eq. 1).

    Args:
        increment: The weight increment ``P = scaling * B @ A`` at the current rank, of any shape.
        threshold: Entries with a smaller absolute value count as zero.

    Returns:
        A scalar in [0, 1].

    >>> sparsity(torch.tensor([[0.5, 0.0], [9e-5, -0.2]]))
    tensor(0.5000)
    """
    return (increment.abs() < threshold).float().mean()


def component_norms(factors: Tensor, dim: int) -> Tensor:
    """Return the norm of each rank component of a stack of factors, in float32 or wider.

    Args:
        factors: ``(n, r, d)`` stacked ``lora_A`` or ``(n, m, r)`` stacked ``lora_B``.
        dim: The dimension that a component extends over: -1 for ``lora_A``, -2 for ``lora_B``.

    Returns:
        ``(n, r)``.

    >>> component_norms(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), dim=-1)
    tensor([[5., 2.]])
    """
    return torch.linalg.vector_norm(factors, dim=dim, dtype=torch.promote_types(factors.dtype, torch.float32))


def norms_by_rank(squares: Tensor) -> Tensor:
    """Return the Frobenius norm of a factor truncated to rank 1, 2, ..., r.

    Args:
        squares: ``(..., r)`` squared norm of each rank component.

    Returns:
        ``(..., r)``; entry ``k`` is the norm of the first ``k + 1`` components.

    >>> norms_by_rank(torch.tensor([9.0, 16.0, 0.0]))
    tensor([3., 5., 5.])
    """
    return squares.cumsum(-1).sqrt()


def truncated_norms(norms: Tensor, ranks: Tensor) -> Tensor:
    """Return the norms at the current rank, ``|A|_r'`` and ``|B|_r'``.

    Args:
        norms: ``(2, L, K, r)`` from :func:`norms_by_rank`.
        ranks: ``(L,)`` integers in [1, r].

    Returns:
        ``(2, L, K)``.
    """
    index = (ranks - 1).view(1, -1, 1, 1).expand(*norms.shape[:-1], 1)
    return norms.gather(-1, index).squeeze(-1)


def values(truncated: Tensor, ranks: Tensor) -> Tensor:
    """Return the value of each layer: ``s_i = (1 / r'_i) * sum over matrices (|B|_r' + |A|_r')`` (Eq. 7).

    Args:
        truncated: ``(2, L, K)`` norms at the current rank.
        ranks: ``(L,)`` current ranks.

    Returns:
        ``(L,)``.

    >>> values(torch.tensor([[[3.0]], [[1.0]]]), torch.tensor([2]))
    tensor([2.])
    """
    return truncated.sum((0, 2)) / ranks


def growth_rates(value: Tensor, value_before: Tensor) -> Tensor:
    """Return the relative growth of each layer's value: ``IR_i = (s_i - s_i_before) / s_i_before`` (Eq. 6).

    If the previous value is zero, the growth rate is zero (difference 5 from the paper).

    Args:
        value: ``(L,)``.
        value_before: ``(L,)``.

    Returns:
        ``(L,)``.

    >>> growth_rates(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    return ((value - value_before) / value_before).nan_to_num(nan=0.0, posinf=0.0)


def update_budget(budget: Tensor, growth: Tensor, gamma: float, minimum: float, maximum: float) -> Tensor:
    """Return the dynamic contribution-driven parameter budget, ``clamp(DCDPB * (1 + gamma * mean_i IR_i))`` (Eq. 5).

    Args:
        budget: Scalar, the current budget.
        growth: ``(L,)`` growth rates.
        gamma: How strongly growth of the values increases the budget.
        minimum: Lower bound, one rank for every layer: ``L``.
        maximum: Upper bound, ``r * L`` in the paper.

    Returns:
        Scalar in [minimum, maximum].

    >>> update_budget(torch.tensor(10.0), torch.tensor([0.1, 0.3]), gamma=2.0, minimum=2, maximum=16)
    tensor(14.)
    """
    return (budget * (1 + gamma * growth.mean())).clamp(minimum, maximum)


def fidelities(truncated: Tensor, full: Tensor) -> Tensor:
    """Return the share of a factor's norm that truncation keeps: ``f = |.|_r' / |.|`` (Eq. 10); 1 for a zero factor.

    Args:
        truncated: ``(2, L, K)`` norms at the current rank.
        full: ``(2, L, K)`` norms at the maximum rank.

    Returns:
        ``(2, L, K)`` in [0, 1].

    >>> fidelities(torch.tensor([3.0, 0.0]), torch.tensor([5.0, 0.0]))
    tensor([0.6000, 1.0000])
    """
    return (truncated / full).nan_to_num(nan=1.0)


def contributions(truncated: Tensor, fidelity: Tensor) -> Tensor:
    """Return the contribution of each layer: ``c_i = sum over matrices (f_A |B|_r' + f_B |A|_r')`` (Eq. 9).

    Args:
        truncated: ``(2, L, K)`` norms at the current rank.
        fidelity: ``(2, L, K)`` from :func:`fidelities`, or ones (Table 11's ablation).

    Returns:
        ``(L,)``.

    >>> contributions(torch.tensor([[[3.0]], [[2.0]]]), torch.tensor([[[0.5]], [[1.0]]]))
    tensor([4.])
    """
    return (fidelity.flip(0) * truncated).sum((0, 2))


def relative_contributions(contribution: Tensor, matrices: Tensor) -> Tensor:
    """Return the mean contribution of a layer's matrices, divided by the mean of all layers (difference 2).

    Args:
        contribution: ``(L,)`` sums over the layer's matrices (Eq. 9).
        matrices: ``(L,)`` number of matrices in each layer.

    Returns:
        ``(L,)`` with mean 1; ones if nothing contributes at all.

    >>> relative_contributions(torch.tensor([2.0, 12.0]), torch.tensor([2, 4]))
    tensor([0.5000, 1.5000])
    """
    mean = contribution / matrices
    return (mean / mean.mean()).nan_to_num(nan=1.0)


def allocate_ranks(contribution: Tensor, budget: Tensor, max_rank: int, temperature: float = 1.0) -> Tensor:
    """Return whole ranks near ``share = softmax(c / temperature) * DCDPB``, each in [1, r] (Eq. 8).

    Every layer gets rank 1 and claims ``clamp(share - 1, 0, r - 1)`` more. The part of a share above the maximum ``r``
    is not given to other layers (difference 3). If the claims add up to more than ``floor(budget) - L``, they are
    scaled down to this sum (difference 4). Fractions are rounded by the largest-remainder method. Ties go to the layer
    with the larger contribution, or else to the earlier layer.

    Args:
        contribution: ``(L,)``.
        budget: Scalar in [L, r L].
        max_rank: ``r``.
        temperature: Values above 1 flatten the shares, values below 1 sharpen them.

    Returns:
        ``(L,)`` int64 with ``sum <= floor(budget)``.

    >>> allocate_ranks(torch.log(torch.tensor([6.0, 3.0, 1.0])), torch.tensor(10.9), max_rank=4)
    tensor([4, 3, 1])
    """
    layers = contribution.numel()
    # Descending, so that among layers with the same clamped claim the one that contributes more comes first.
    contribution, order = contribution.sort(descending=True, stable=True)
    shares = (contribution / temperature).softmax(0) * budget
    claims = (shares - 1).clamp(0, max_rank - 1)
    available = budget.floor() - layers
    claims = claims * (available / claims.sum().clamp(min=_ROUNDING_TOLERANCE)).clamp(max=1)
    floors = claims.floor()
    remainders = claims - floors
    # The sum should be an integer, but rounding errors can make it slightly smaller.
    left = (remainders.sum() + _ROUNDING_TOLERANCE).floor()
    # The layers with the largest remainders are rounded up.
    rounded_up = torch.arange(layers, device=budget.device) < left
    falling = remainders.argsort(descending=True, stable=True)
    ranks = (1 + floors).index_add(0, falling, rounded_up.to(floors.dtype)).long()
    return ranks.index_copy(0, order, ranks)
