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
    "largest_components",
    "norms_by_rank",
    "relative_contributions",
    "singular_factors",
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


def allocate_ranks(
    contribution: Tensor,
    budget: Tensor,
    max_rank: int,
    temperature: float = 1.0,
    *,
    costs: Tensor | None = None,
    min_rank: int = 1,
) -> Tensor:
    """Return whole ranks near ``share = softmax(c / temperature) * DCDPB / cost``, from min_rank to r (Eq. 8).

    Every layer gets the minimum rank and claims ``clamp(share - min_rank, 0, r - min_rank)`` more. The part of a share
    above the maximum ``r`` is not given to other layers (difference 3). If the claims cost more than
    ``floor(budget) - min_rank * L``, they are scaled down to this sum (difference 4). Fractions are rounded by the
    largest-remainder method. Ties go to the layer with the larger contribution, or else to the earlier layer. With
    equal costs and minimum rank 1, this is the published equation (difference 12).

    Args:
        contribution: ``(L,)``.
        budget: Scalar in [min_rank L, r L], a number of ranks of mean cost.
        max_rank: ``r``.
        temperature: Values above 1 flatten the shares, values below 1 sharpen them.
        costs: ``(L,)`` what one rank of a layer costs, with mean 1; by default all ranks cost the same.
        min_rank: Minimum rank, 0 or 1.

    Returns:
        ``(L,)`` int64 with ``sum(ranks * costs) <= floor(budget)``.

    >>> allocate_ranks(torch.log(torch.tensor([6.0, 3.0, 1.0])), torch.tensor(10.9), max_rank=4)
    tensor([4, 3, 1])

    A rank of the first layer costs three times as much:

    >>> allocate_ranks(torch.zeros(2), torch.tensor(6.0), max_rank=8, costs=torch.tensor([1.5, 0.5]))
    tensor([2, 6])
    """
    layers = contribution.numel()
    costs = torch.ones_like(contribution) if costs is None else costs
    # Descending, so that among layers with the same clamped claim the one that contributes more comes first.
    contribution, order = contribution.sort(descending=True, stable=True)
    costs = costs[order]
    shares = (contribution / temperature).softmax(0) * budget / costs
    claims = (shares - min_rank).clamp(0, max_rank - min_rank)
    available = budget.floor() - min_rank * layers
    claims = claims * (available / (claims * costs).sum().clamp(min=_ROUNDING_TOLERANCE)).clamp(max=1)
    floors = claims.floor()
    remainders = claims - floors
    # What is left after rounding down goes to the layers with the largest remainders.
    left = (remainders * costs).sum()
    falling = remainders.argsort(descending=True, stable=True)
    next_costs = costs[falling]
    # With equal costs an integer is left, but rounding errors can make it slightly smaller.
    rounded_up = next_costs.cumsum(0) <= left + _ROUNDING_TOLERANCE * next_costs
    ranks = (min_rank + floors).index_add(0, falling, rounded_up.to(floors.dtype)).long()
    return ranks.index_copy(0, order, ranks)


def singular_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of the same product ``B A`` along its singular directions, in falling order (difference 13).

    With ``B A = U S V^T``, the new factors are ``sqrt(S) V^T`` and ``U sqrt(S)``. They are computed from the QR
    decompositions of both factors and the singular value decomposition of an ``r x r`` matrix. A component with the
    singular value 0 gets a row of ``A`` with the mean norm of the given rows, so that it can learn.

    Args:
        A: ``(r, d)``, in float32 or wider.
        B: ``(m, r)``.

    Returns:
        A ``(r, d)``, B ``(m, r)`` and the singular values ``(r,)``. Values that are zero up to rounding are zero.

    >>> A, B, values = singular_factors(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    >>> values
    tensor([5., 3.])
    """
    Q_A, R_A = torch.linalg.qr(A.mT)
    Q_B, R_B = torch.linalg.qr(B)
    U, values, V = torch.linalg.svd(R_B @ R_A.mT)
    # The product of the triangular factors has rounding errors of this size, whatever m and d are.
    rounding = 4 * len(values) * torch.finfo(A.dtype).eps
    values = torch.where(values > values[0] * rounding, values, 0.0)
    norm = A.square().sum(1).mean().sqrt()
    scale_A = torch.where(values > 0, values.sqrt(), norm)
    return scale_A[:, None] * (V @ Q_A.mT), (Q_B @ U) * values.sqrt(), values


def largest_components(
    worth: Tensor,
    costs: Tensor,
    *,
    parameters: float | None = None,
    energy: float = 1.0,
    min_rank: int = 1,
) -> Tensor:
    """Return how many leading components of each layer to keep, by worth per parameter (difference 13).

    The components of all layers are taken in falling order of ``worth / cost``. With a limit on parameters, those that
    do not fit are passed over. Otherwise, they are taken until the share of the worth is reached. Components without
    worth are not taken. Every layer keeps ``min_rank`` components.

    Args:
        worth: ``(L, r)`` squared norm of each component, falling along the second dimension.
        costs: ``(L,)`` parameters of one component.
        parameters: Largest total of parameters; None to go by the energy.
        energy: Share of the total worth to keep, in [0, 1].
        min_rank: Components that every layer keeps.

    Returns:
        ``(L,)`` int64.

    >>> largest_components(torch.tensor([[9.0, 1.0], [8.0, 6.0]]), torch.tensor([2, 1]), parameters=4)
    tensor([1, 2])

    The second component of the first layer would be next, but does not fit:

    >>> largest_components(torch.tensor([[9.0, 4.0], [8.0, 1.0]]), torch.tensor([2, 1]), parameters=4)
    tensor([1, 2])
    """
    worth, costs = worth.double(), costs.double()[:, None].expand_as(worth)
    forced = torch.arange(worth.shape[1], device=worth.device) < min_rank
    value = torch.where(forced, torch.inf, worth / costs).flatten()
    order = value.argsort(descending=True, stable=True)
    if parameters is not None:
        fits = _fits_in_order(costs.flatten()[order], parameters)
    else:
        sums = worth.flatten()[order].cumsum(0)
        # A component is needed if the earlier ones do not reach the share.
        fits = sums - worth.flatten()[order] < energy * sums[-1]
    kept = torch.zeros_like(value, dtype=torch.bool).index_copy(0, order, fits) & (value > 0)
    return (kept.view_as(worth) | forced).sum(1)


def _fits_in_order(costs: Tensor, limit: float) -> Tensor:
    """Return which items are taken, if each is taken in turn unless it exceeds the limit: ``(n,)`` to ``(n,)`` bool."""
    taken, total = [], 0.0
    for cost in costs.tolist():
        taken.append(total + cost <= limit)
        total += cost * taken[-1]
    return torch.tensor(taken, device=costs.device)
