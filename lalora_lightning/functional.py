"""The equations of La-LoRA, one pure function each: tensors in, tensors out, nothing stored.

Source: Gu, Yuan, Cai, Zhou, Fan, "La-LoRA: Parameter-efficient fine-tuning with layer-wise adaptive low-rank
adaptation", Neural Networks 194 (2025) 108095.

Shapes used throughout: ``L`` layers that get a rank each, at most ``K`` adapted weight matrices in a layer, ``r``
rank components in a matrix. Norms of both factors travel together in a leading dimension of 2: index 0 is ``lora_A``,
index 1 is ``lora_B``. A layer with fewer than ``K`` matrices is padded with zero norms, which no equation sees.

No function asks the device for a number, so none synchronises. Norms that are not finite are the caller's to notice:
where an equation divides zero by zero, the value that the reading gives takes the place of the NaN.
"""

import torch
from torch import Tensor

_ROUNDING_TOLERANCE = 1e-3


def sparsity(increment: Tensor, threshold: float = 1e-4) -> Tensor:
    """Share of an increment's entries that are as good as zero (Eq. 1).

    Args:
        increment: The weight increment ``P = scaling * B @ A`` at the rank in force, of any shape.
        threshold: Entries with a smaller absolute value count as zero.

    Returns:
        A scalar in [0, 1].

    >>> sparsity(torch.tensor([[0.5, 0.0], [9e-5, -0.2]]))
    tensor(0.5000)
    """
    return (increment.abs() < threshold).float().mean()


def component_norms(factors: Tensor, dim: int) -> Tensor:
    """Norm of each rank component of a stack of factors, in float32 or wider.

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
    """Frobenius norm of a factor truncated to rank 1, 2, ..., r.

    Args:
        squares: ``(..., r)`` squared norm of each rank component.

    Returns:
        ``(..., r)``; entry ``k`` is the norm of the first ``k + 1`` components.

    >>> norms_by_rank(torch.tensor([9.0, 16.0, 0.0]))
    tensor([3., 5., 5.])
    """
    return squares.cumsum(-1).sqrt()


def truncated_norms(norms: Tensor, ranks: Tensor) -> Tensor:
    """Norms at the rank in force, ``|A|_r'`` and ``|B|_r'``.

    Args:
        norms: ``(2, L, K, r)`` from :func:`norms_by_rank`.
        ranks: ``(L,)`` integers in [1, r].

    Returns:
        ``(2, L, K)``.
    """
    index = (ranks - 1).view(1, -1, 1, 1).expand(*norms.shape[:-1], 1)
    return norms.gather(-1, index).squeeze(-1)


def values(truncated: Tensor, ranks: Tensor) -> Tensor:
    """Value of each layer: ``s_i = (1 / r'_i) * sum over matrices (|B|_r' + |A|_r')`` (Eq. 7).

    Args:
        truncated: ``(2, L, K)`` norms at the rank in force.
        ranks: ``(L,)`` ranks in force.

    Returns:
        ``(L,)``.

    >>> values(torch.tensor([[[3.0]], [[1.0]]]), torch.tensor([2]))
    tensor([2.])
    """
    return truncated.sum((0, 2)) / ranks


def growth_rates(value: Tensor, value_before: Tensor) -> Tensor:
    """Relative growth of each layer's value: ``IR_i = (s_i - s_i_before) / s_i_before`` (Eq. 6).

    A value that was zero has growth zero (reading 5).

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
    """The dynamic contribution-driven parameter budget: ``clamp(DCDPB * (1 + gamma * mean_i IR_i))`` (Eq. 5).

    Args:
        budget: Scalar, the budget in force.
        growth: ``(L,)`` growth rates.
        gamma: How strongly growth of the values grows the budget.
        minimum: Lower bound, one rank for every layer: ``L``.
        maximum: Upper bound, ``r * L`` in the paper.

    Returns:
        Scalar in [minimum, maximum].

    >>> update_budget(torch.tensor(10.0), torch.tensor([0.1, 0.3]), gamma=2.0, minimum=2, maximum=16)
    tensor(14.)
    """
    return (budget * (1 + gamma * growth.mean())).clamp(minimum, maximum)


def fidelities(truncated: Tensor, full: Tensor) -> Tensor:
    """How much of a factor's norm truncation keeps: ``f = |.|_r' / |.|`` (Eq. 10); 1 for an all-zero factor.

    Args:
        truncated: ``(2, L, K)`` norms at the rank in force.
        full: ``(2, L, K)`` norms at the maximum rank.

    Returns:
        ``(2, L, K)`` in [0, 1].

    >>> fidelities(torch.tensor([3.0, 0.0]), torch.tensor([5.0, 0.0]))
    tensor([0.6000, 1.0000])
    """
    return (truncated / full).nan_to_num(nan=1.0)


def contributions(truncated: Tensor, fidelity: Tensor) -> Tensor:
    """Contribution of each layer: ``c_i = sum over matrices (f_A |B|_r' + f_B |A|_r')`` (Eq. 9).

    Args:
        truncated: ``(2, L, K)`` norms at the rank in force.
        fidelity: ``(2, L, K)`` from :func:`fidelities`, or ones (Table 11's ablation).

    Returns:
        ``(L,)``.

    >>> contributions(torch.tensor([[[3.0]], [[2.0]]]), torch.tensor([[[0.5]], [[1.0]]]))
    tensor([4.])
    """
    return (fidelity.flip(0) * truncated).sum((0, 2))


def relative_contributions(contribution: Tensor, matrices: Tensor) -> Tensor:
    """Mean contribution of a layer's matrices over the mean of all layers (reading 2).

    Args:
        contribution: ``(L,)`` sums over the layer's matrices (Eq. 9).
        matrices: ``(L,)`` number of matrices in each layer.

    Returns:
        ``(L,)`` with mean 1; ones where nothing contributes at all.

    >>> relative_contributions(torch.tensor([2.0, 12.0]), torch.tensor([2, 4]))
    tensor([0.5000, 1.5000])
    """
    mean = contribution / matrices
    return (mean / mean.mean()).nan_to_num(nan=1.0)


def allocate_ranks(contribution: Tensor, budget: Tensor, max_rank: int, temperature: float = 1.0) -> Tensor:
    """Ranks near ``share = softmax(c / temperature) * DCDPB``, each in [1, r] (Eq. 8).

    Every layer has rank 1. Beyond that it deserves ``clamp(share - 1, 0, r - 1)``: what the cap ``r`` cuts off is not
    handed to others (reading 3). Where this adds up to more than ``floor(budget) - L``, it is scaled down to that
    (reading 4). Fractions are rounded by largest remainder, ties in favour of the larger contribution, then of the
    earlier layer.

    Args:
        contribution: ``(L,)``.
        budget: Scalar in [L, r L].
        max_rank: ``r``.
        temperature: Above 1 flattens, below 1 sharpens the shares.

    Returns:
        ``(L,)`` int64 with ``sum <= floor(budget)``.

    >>> allocate_ranks(torch.log(torch.tensor([6.0, 3.0, 1.0])), torch.tensor(10.9), max_rank=4)
    tensor([4, 3, 1])
    """
    layers = contribution.numel()
    # In falling order, so that of layers that the cap made equal the one that contributes more comes first.
    contribution, order = contribution.sort(descending=True, stable=True)
    shares = (contribution / temperature).softmax(0) * budget
    deserved = (shares - 1).clamp(0, max_rank - 1)
    available = budget.floor() - layers
    deserved = deserved * (available / deserved.sum().clamp(min=_ROUNDING_TOLERANCE)).clamp(max=1)
    whole = deserved.floor()
    remainders = deserved - whole
    # A sum of floats that stands for a whole number may fall short of it; the tolerance cannot lift it to the next.
    left = (remainders.sum() + _ROUNDING_TOLERANCE).floor()
    # The first layers in the order of falling remainders are rounded up.
    rounded_up = torch.arange(layers, device=budget.device) < left
    falling = remainders.argsort(descending=True, stable=True)
    ranks = (1 + whole).index_add(0, falling, rounded_up.to(whole.dtype)).long()
    return ranks.index_copy(0, order, ranks)
