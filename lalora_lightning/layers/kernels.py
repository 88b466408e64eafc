r"""The computation of the low-rank layer: frozen layer and adapter as a single autograd node.

Shapes: ``N`` rows of input, ``d`` input and ``m`` output features, ``S`` adapted slices of the output with ``m_s``
features each, rank ``r``::

    x (N, d) ----------- W.T (d, m) -------------------------> out (N, m)
        \                                                       ^ += scaling * hidden_s B_s.T, per slice s
         `-- A.T (d, S r) --> hidden (N, S r), masked -- B_s.T (r, m_s)

The mask sets the hidden columns beyond the current rank to zero. It is applied in place to the narrow hidden factor, so
no masked copy of a weight is needed.

The factors may have a wider data type than the input, such as float32 beside bfloat16. The adapter is then computed
with the accuracy of the wider type. The frozen layer and the output stay in the input's type.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OutSlices", "TruncatedLoRAFunction", "add_adapter", "is_transformed", "truncated_lora", "without_autocast"]

OutSlices = tuple[tuple[int, int], ...]
"""``(start, stop)`` ranges of output features, in ascending order and disjoint."""


def is_transformed(x: Any) -> bool:
    """Return whether the computation is followed in a way that the fused one would hide from it or disturb.

    These are ``torch.jit.trace``, ``torch.fx``, ``torch.func``, forward-mode differentiation, and selective activation
    checkpointing, which keeps outputs that must not be changed in place.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch.jit.is_tracing()
        or isinstance(x, torch.fx.Proxy)
        or torch.autograd.forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() > 0 and _checkpoints_selectively())
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast does not multiply in half precision; the meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _checkpoints_selectively() -> bool:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def truncated_lora(
    x: Tensor,
    lora_x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    rank_mask: Tensor,
    scaling: float,
    out_slices: OutSlices,
) -> tuple[Tensor, Tensor]:
    """Compute ``x W.T + b + scaling * mask(lora_x A.T) B.T`` without recording a graph.

    Args:
        x: ``(N, d)`` input.
        lora_x: ``(N, d)`` input of the adapter; None if it is ``x``. With dropout it differs.
        weight: ``(m, d)``.
        bias: ``(m,)``.
        A: ``(S r, d)``, in the data type in which the adapter is computed.
        B: ``(sum of m_s, r)``, in the same type.
        rank_mask: ``(r,)``, 1 for the components within the current rank, 0 for the others.
        scaling: Factor of the adapter.
        out_slices: The adapted ranges of output features.

    Returns:
        The output ``(N, m)`` and the masked hidden factor ``(N, S r)``.
    """
    out = F.linear(x, weight, bias)
    hidden = _mask((x if lora_x is None else lora_x).to(A.dtype) @ A.T, rank_mask)
    for (out_s, B_s), hidden_s in zip(_by_slice(out, B, out_slices), _columns(hidden, out_slices), strict=True):
        _add_product(out_s, hidden_s, B_s.T, scaling)
    return out, hidden


def add_adapter(
    out: Tensor, lora_x: Tensor, A: Tensor, B: Tensor, rank_mask: Tensor, scaling: float, out_slices: OutSlices
) -> Tensor:
    """Compute ``out + scaling * mask(lora_x A.T) B.T`` in plain autograd; arguments as in :func:`truncated_lora`."""
    width = out.shape[1]
    hidden = lora_x.to(A.dtype) @ A.T
    hidden = hidden * rank_mask.repeat(len(out_slices)).to(hidden.dtype)
    for (start, stop), hidden_s, B_s in zip(
        out_slices, _columns(hidden, out_slices), _rows(B, out_slices), strict=True
    ):
        out = out + F.pad(scaling * hidden_s @ B_s.T, (start, width - stop))
    return out


class TruncatedLoRAFunction(torch.autograd.Function):
    """:func:`truncated_lora` as a single autograd node.

    Separate autograd nodes would need temporaries of the size of the output and the input. Here, the gradients of the
    base layer and of the adapter with respect to the input are accumulated in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        rank_mask: Tensor,
        scaling: float,
        out_slices: OutSlices,
        dtype: torch.dtype,
    ) -> Tensor:
        """Compute the output, the adapter in ``dtype``, and save the tensors that the required gradients need."""
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        out, hidden = truncated_lora(x, lora_x, weight, bias, A, B, rank_mask, scaling, out_slices)
        need_x, _, need_weight, _, need_A, need_B = ctx.needs_input_grad[:6]
        # The factors are saved as they came in: a second derivative can follow them, and a copy would take memory.
        ctx.save_for_backward(
            x if need_weight or (need_A and lora_x is None) else None,
            lora_x if need_A else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            hidden if need_B else None,
            rank_mask,
        )
        ctx.scaling, ctx.out_slices, ctx.dtype, ctx.has_lora_x = scaling, out_slices, dtype, lora_x is not None
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the required gradients from ``g``, the gradient of the output ``(N, m)``.

        Raises:
            RuntimeError: The gradients are to be differentiated again, and the input was not kept since ``lora_A`` is
                frozen.
        """
        if torch.is_autocast_enabled(g.device.type):
            # A backward pass inside of autocast: the types are those of the forward pass.
            with without_autocast(g.device):
                return TruncatedLoRAFunction.backward(ctx, g)
        if torch.is_grad_enabled():
            # The caller asked for a graph of the backward pass.
            return _differentiable_backward(ctx, g)
        x, lora_x, weight, lora_A, lora_B, hidden, rank_mask = ctx.saved_tensors
        B = lora_B.to(ctx.dtype)
        need_x, need_lora_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        scaling = ctx.scaling
        grad_x = grad_lora_x = grad_weight = grad_bias = grad_A = grad_B = None

        slices = _by_slice(g.to(ctx.dtype), B, ctx.out_slices)
        # addmm with beta=0 is a scaled matrix product in one kernel, which does not read its first argument.
        unread = B[0, 0]
        if need_B:
            hiddens = _columns(hidden, ctx.out_slices)
            grad_B = _join(
                [
                    torch.addmm(unread, g_s.T, hidden_s, beta=0, alpha=scaling)
                    for (g_s, _), hidden_s in zip(slices, hiddens, strict=True)
                ],
                dim=0,
            )
        if need_A or need_x or need_lora_x:
            grad_hidden = _mask(_join([g_s @ B_s for g_s, B_s in slices], dim=1), rank_mask)
            del slices  # frees a copy of g in a wider type
            if need_A:
                # Cast once more, because a copy in a wider type would take memory until the backward pass.
                adapter_input = (lora_x if ctx.has_lora_x else x).to(ctx.dtype)
                grad_A = torch.addmm(unread, grad_hidden.T, adapter_input, beta=0, alpha=scaling)
            if need_x:
                grad_x = g @ weight
                if not ctx.has_lora_x:
                    _add_product(grad_x, grad_hidden, lora_A.to(ctx.dtype), scaling)
            if need_lora_x:
                grad_lora_x = torch.addmm(unread, grad_hidden, lora_A.to(ctx.dtype), beta=0, alpha=scaling).to(g.dtype)
        if need_weight:
            grad_weight = g.T @ x
        if need_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_lora_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None, None


def _differentiable_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients by operations that autograd records, for second derivatives."""
    x, lora_x, weight, lora_A, lora_B, _, rank_mask = ctx.saved_tensors
    need_x, need_lora_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
    adapter_input = lora_x if ctx.has_lora_x else x
    if adapter_input is None:
        raise RuntimeError(
            "Expected the input of the layer for second derivatives but it was not kept, since lora_A is frozen; train "
            "it, too (freeze_A=False)."
        )
    A, B, adapter_input = lora_A.to(ctx.dtype), lora_B.to(ctx.dtype), adapter_input.to(ctx.dtype)
    mask = rank_mask.repeat(len(ctx.out_slices)).to(ctx.dtype)
    hidden = (adapter_input @ A.T) * mask
    slices = _by_slice(g.to(ctx.dtype), B, ctx.out_slices)
    grad_hidden = torch.cat([g_s @ B_s for g_s, B_s in slices], dim=1) * mask
    adapter_grad = (ctx.scaling * grad_hidden @ A).to(g.dtype)
    pairs = zip(slices, _columns(hidden, ctx.out_slices), strict=True)
    return (
        (g @ weight + (0 if ctx.has_lora_x else adapter_grad)) if need_x else None,
        adapter_grad if need_lora_x else None,
        g.T @ x if need_weight else None,
        g.sum(0) if need_bias else None,
        (ctx.scaling * grad_hidden.T @ adapter_input).to(lora_A.dtype) if need_A else None,
        torch.cat([ctx.scaling * g_s.T @ h_s for (g_s, _), h_s in pairs]).to(lora_B.dtype) if need_B else None,
        None,
        None,
        None,
        None,
    )


def _mask(hidden: Tensor, rank_mask: Tensor) -> Tensor:
    """Set the columns beyond the current rank to zero, in place, for all slices."""
    hidden.view(-1, rank_mask.shape[0]).mul_(rank_mask)
    return hidden


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Compute ``out += scaling * left right`` in place, without a temporary of the size of ``out``.

    Factors of a wider type are split into values of ``out``'s type and their remainders. One product of the type of
    ``out`` then has nearly the accuracy of the wider type, because it is summed in float32 and rounded once. Values
    of the factors may be outside of float16's range, so its product is computed in the wider type.
    """
    if left.dtype != out.dtype:
        if out.dtype == torch.float16:
            out.add_(left @ right, alpha=scaling)
            return
        (left, left_rest), (right, right_rest) = _split(left, out.dtype), _split(right, out.dtype)
        left, right = torch.cat([left, left_rest, left], dim=1), torch.cat([right, right, right_rest])
    out.addmm_(left, right, alpha=scaling)


def _split(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the values rounded to a type, and what the rounding left over, in the same type."""
    rounded = tensor.to(dtype)
    return rounded, (tensor - rounded).to(dtype)


def _by_slice(out: Tensor, B: Tensor, out_slices: OutSlices) -> list[tuple[Tensor, Tensor]]:
    """Return views of the output's columns ``(N, m_s)`` and of B's rows ``(m_s, r)`` for each slice."""
    if out_slices == ((0, out.shape[1]),):
        return [(out, B)]
    return [(out[:, start:stop], B_s) for (start, stop), B_s in zip(out_slices, _rows(B, out_slices), strict=True)]


def _rows(B: Tensor, out_slices: OutSlices) -> Sequence[Tensor]:
    """Return views of B's rows ``(m_s, r)`` for each slice."""
    return [B] if len(out_slices) == 1 else B.split([stop - start for start, stop in out_slices])


def _columns(hidden: Tensor, out_slices: OutSlices) -> Sequence[Tensor]:
    """Return views of the hidden factor's columns ``(N, r)`` for each slice."""
    return [hidden] if len(out_slices) == 1 else hidden.chunk(len(out_slices), dim=1)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
