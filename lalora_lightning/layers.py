"""TruncatedLoRALinear: a linear layer with a low-rank adapter whose rank in force is a mask."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lalora_lightning.base_linear import (
    is_linear,
    is_quantized,
    keep_plain_format,
    linear_parameter,
    linear_shape,
    linear_weight,
)
from lalora_lightning.initialization import FACTORIZATIONS, Init


def lora_scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """``alpha / rank``, rank-stabilised ``alpha / sqrt(rank)`` (Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class TruncatedLoRALinear(nn.Module):
    r"""Linear layer with a low-rank adapter, of which only the first ``rank`` components are in force.

    ``h = W_0 x + b + (alpha / r) * B_r' A_r' x`` (La-LoRA, Neural Networks 194, 2025, 108095, Eq. 4), where ``A_r'``
    and ``B_r'`` are the first ``r'`` rows of ``lora_A`` and columns of ``lora_B``. The matrices are stored at the
    maximum rank ``r``; truncation is a mask on the device, so that changing the rank changes no shape, recompiles
    nothing and synchronises nothing. The components beyond ``r'`` keep their values and get zero gradients. A state
    dict holds the rank in force and, as extra state, the scaling and the slices: it describes itself.

    ``lora_B`` starts at zero: a fresh layer computes exactly what its base layer computes. With an ``init`` where
    ``B A`` is not zero, the start is kept and taken off again, ``B A - B_start A_start``, component by component, so
    that this holds at every rank, up to rounding, and the base weight stays what it is. The base layer's weight is used
    and its ``forward`` is not called, so that forward hooks on it do not fire, unless it is quantised.

    A fused projection can be adapted in slices of its output features only (``out_slices``): ``lora_A`` and
    ``lora_B`` then hold one adapter of rank ``r`` per slice, stacked along their rows.

    Args:
        base_layer: The frozen ``nn.Linear``, transformers ``Conv1D``, or bitsandbytes ``Linear4bit`` or
            ``Linear8bitLt``, with weight ``W_0`` (m x d).
        rank: The maximum rank ``r``, from 1 to min(m, d).
        alpha: The adapter is scaled by ``alpha / rank``, whatever the rank in force.
        dropout: Probability of dropping an entry of the adapter's input while training.
        init: How ``lora_A`` and ``lora_B`` start, see :mod:`lalora_lightning.initialization`.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (rank-stabilised: Kalajdzievski, 2023).
        freeze_A: Train ``lora_B`` only (LoRA-FA: Zhang et al., 2023); the layer's input is not kept for the backward.
        random_rank: While training, draw a rank from 1 to the one in force at each forward pass, so that the adapter
            works at each of them (DyLoRA: Valipour et al., 2023).
        out_slices: ``(start, stop)`` ranges of output features to adapt; by default all of them as one.
        device: Device of the adapter; by default the base weight's.
        dtype: Type of the adapter's parameters. They are cast to the input's type for computing.

    Attributes:
        lora_A: ``(r, d)``; ``(S r, d)`` for S slices.
        lora_B: ``(m, r)``; ``(sum of the slices' widths, r)`` for slices.
        start_A: What ``lora_A`` started from, a persistent buffer; None where ``B A`` started at zero.
        start_B: The same of ``lora_B``.
        rank: Integer scalar, the rank in force ``r'``; a persistent buffer. Starts at ``r``.

    Raises:
        TypeError: The base layer is not linear.
        ValueError: rank, alpha, dropout or a slice is out of range, or there is no such init.

    >>> layer = TruncatedLoRALinear(nn.Linear(6, 4), rank=2, alpha=4.0)
    >>> layer.set_rank(1)
    >>> layer
    TruncatedLoRALinear(
      rank=1 of 2, scaling=2.0
      (base_layer): Linear(in_features=6, out_features=4, bias=True)
    )
    """

    rank: Tensor
    rank_mask: Tensor
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        out_slices: Sequence[tuple[int, int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        init: Init = "kaiming",
        use_rslora: bool = False,
        freeze_A: bool = False,
        random_rank: bool = False,
    ) -> None:
        super().__init__()
        if not is_linear(base_layer):
            raise TypeError(
                "Expected the base layer to be nn.Linear, transformers' Conv1D or a quantised layer of bitsandbytes "
                f"but got {type(base_layer).__name__}."
            )
        if init not in get_args(Init):
            raise ValueError(f"Expected init to be one of {get_args(Init)} but got {init!r}.")
        self.base_layer = base_layer
        # Asked for at every forward pass.
        self._quantized = is_quantized(base_layer)
        keep_plain_format(base_layer)
        self.out_features, self.in_features = linear_shape(base_layer)
        self.out_slices = tuple(out_slices or [(0, self.out_features)])
        _check_settings(self, rank, alpha, dropout)
        self.max_rank = rank
        self.scaling = lora_scaling(alpha, rank, use_rslora)
        self.dropout = dropout
        self.init = init
        self.random_rank = random_rank
        self.merged = False
        self._unmerged_weight: Tensor | None = None

        device = linear_parameter(base_layer).device if device is None else device
        adapted = sum(stop - start for start, stop in self.out_slices)
        self.lora_A = nn.Parameter(
            torch.empty(len(self.out_slices) * rank, self.in_features, device=device, dtype=dtype), not freeze_A
        )
        self.lora_B = nn.Parameter(torch.empty(adapted, rank, device=device, dtype=dtype))
        self.register_buffer("rank", torch.empty((), dtype=torch.long, device=device))
        # Derived from `rank`, which the state dict holds. Boolean, so that no cast of the model touches it.
        self.register_buffer("rank_mask", torch.empty(rank, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.reset_parameters()
        self.register_state_dict_pre_hook(_refuse_merged)
        self.register_load_state_dict_pre_hook(_refuse_loading_merged)
        self.register_load_state_dict_post_hook(_rebuild_mask)

    @classmethod
    def with_scaling(
        cls,
        base_layer: nn.Module,
        rank: int,
        scaling: float,
        **settings: Any,
    ) -> "TruncatedLoRALinear":
        """A layer of exactly this scaling, which ``alpha / rank`` may round; settings as of the class."""
        layer = cls(base_layer, rank, scaling * rank, **settings)
        layer.scaling = scaling
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as ``init`` says, at full rank.

        Also what a layer that was built on the meta device needs after ``to_empty``.
        """
        factors = self.split(self.lora_A, self.lora_B)
        if self.init in FACTORIZATIONS:
            weight = self.base_weight
            if weight.is_meta:
                raise ValueError(f"Expected init={self.init!r} to find a weight but it is on the meta device.")
            for (A, B), (start, stop) in zip(factors, self.out_slices, strict=True):
                start_A, start_B = FACTORIZATIONS[self.init](weight[start:stop], self.max_rank, self.scaling)
                if not (start_A.any(1) | start_B.any(0)).all():
                    raise ValueError(
                        f"Expected a weight of rank {self.max_rank} at least to start from with init={self.init!r} but "
                        "it has less, and what starts at zero on both sides never learns."
                    )
                A.copy_(start_A)
                B.copy_(start_B)
            self.keep_start()
        else:
            for A, _ in factors:
                if self.init == "orthogonal":
                    nn.init.orthogonal_(A)
                else:
                    # Each row's norm is about 1/sqrt(3).
                    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
            self.start_A = self.start_B = None
        self.set_rank(self.max_rank)

    @torch.no_grad()
    def keep_start(self) -> None:
        """Take ``lora_A`` and ``lora_B`` as they are for the start that is taken off again."""
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    @property
    def base_weight(self) -> Tensor:
        """The base weight ``W_0`` as ``(m, d)``; of a quantised layer a copy."""
        return linear_weight(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """The weight in effect, ``(m, d)``, added in float32 or wider and cast once.

        For code that reads a layer's weight instead of calling the layer.
        """
        base_weight = self.base_weight
        if self.merged:
            return base_weight
        increment = self.increment()
        return (base_weight.to(increment.dtype) + increment).to(base_weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, ``(m,)``."""
        return self.base_layer.bias  # type: ignore[return-value]

    def set_rank(self, rank: int) -> None:
        """Set the rank in force.

        Raises:
            ValueError: The rank is not in [1, max_rank].
        """
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"Expected rank to be in [1, {self.max_rank}] but got {rank}.")
        self.rank.fill_(rank)
        self.rank_mask.copy_(torch.arange(self.max_rank, device=self.rank.device) < rank)

    def split(self, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views by slice of tensors shaped like ``lora_A`` and ``lora_B``: ``[(A (r, d), B (m_s, r)), ...]``."""
        if len(self.out_slices) == 1:
            return [(A, B)]
        widths = [stop - start for start, stop in self.out_slices]
        return list(zip(A.chunk(len(widths)), B.split(widths), strict=True))

    def increment(self) -> Tensor:
        """The weight increment ``P = scaling * B_r' A_r'`` (m x d) at the rank in force, in float32 or wider.

        A sharded adapter is gathered: every process has to ask.
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        increment = torch.zeros(self.out_features, self.in_features, device=self.lora_A.device, dtype=dtype)
        A, B, mask = self._factors(self.rank_mask)
        # Autocast would multiply in half precision.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            for (start, stop), (A_i, B_i) in zip(self.out_slices, self.split(A, B), strict=True):
                increment[start:stop] = self.scaling * (B_i.to(dtype) * mask) @ A_i.to(dtype)
        return increment

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """The components in force of all slices as one plain adapter of scaling 1, without a start.

        Returns:
            A ``(R, d)`` and B ``(m, R)`` with ``P = B A``. R is the rank in force times the slices, and twice that
            where a start is taken off.
        """
        A, B, mask = self._factors(self.rank_mask)
        pairs = [(A_i[mask], self.scaling * B_i[:, mask]) for A_i, B_i in self.split(A, B)]
        rank = len(pairs[0][0])
        folded_B = B.new_zeros(self.out_features, len(pairs) * rank)
        for i, ((start, stop), (_, B_i)) in enumerate(zip(self.out_slices, pairs, strict=True)):
            folded_B[start:stop, i * rank : (i + 1) * rank] = B_i
        return torch.cat([A_i for A_i, _ in pairs]), folded_B

    def _factors(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the mask of their components as they act: where there is a start, it follows with a minus sign."""
        own_A, own_B = whole(self.lora_A), whole(self.lora_B)
        if self.start_A is None or self.start_B is None:
            return own_A, own_B, mask
        pairs = zip(self.split(own_A, own_B), self.split(self.start_A, self.start_B), strict=True)
        A = torch.cat([A for (own, _), (start, _) in pairs for A in (own, start)])
        return A, torch.cat([own_B, -self.start_B], dim=1), mask.repeat(2)

    def _mask_in_force(self) -> Tensor:
        if not (self.random_rank and self.training):
            return self.rank_mask
        # Uniform over 1 to the rank in force, drawn without asking the device for a number.
        limit = (1 - torch.rand((), device=self.rank.device)) * self.rank
        return torch.arange(self.max_rank, device=self.rank.device) < limit

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(..., d)``.

        Returns:
            ``(..., m)`` in the input's type, or under autocast in autocast's.
        """
        device_type = x.device.type
        # Like autocast, which leaves double precision alone.
        if device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            # What autocast does to a linear layer, done here once: the backward needs the same casts again.
            with torch.autocast(device_type, enabled=False):
                return self._forward(x.to(dtype), dtype)
        return self._forward(x, None)

    def _forward(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        if self.merged:
            return F.linear(x, *self._base_parameters(dtype))
        # Rows in, rows out: the view back stands outside the function, so that the output may be changed in place.
        rows = x.reshape(-1, self.in_features)
        lora_rows = F.dropout(rows, self.dropout) if self.training and self.dropout > 0 else None
        A, B, mask = self._factors(self._mask_in_force())
        fixed = mask, self.scaling, self.out_slices
        if self._quantized:
            # It multiplies by its weight without a full copy of it, and has its own backward pass.
            out = self.base_layer(rows)
            out = _add_lora(out, rows if lora_rows is None else lora_rows, A, B, *fixed)
            return out.view(*x.shape[:-1], self.out_features)
        weight, bias = self._base_parameters(dtype)
        if torch.is_grad_enabled():
            out = _TruncatedLoRA.apply(rows, lora_rows, weight, bias, A, B, *fixed)
        else:
            # Nothing is kept for a backward pass: a node of the graph would only take time.
            out, _ = _truncated_lora(rows, lora_rows, weight, bias, A.to(x.dtype), B.to(x.dtype), *fixed)
        return out.view(*x.shape[:-1], self.out_features)

    def _base_parameters(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight (m, d) and bias (m,), as autocast would have them."""
        weight, bias = self.base_weight, self.bias
        if dtype is None:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def get_extra_state(self) -> Tensor:
        """What ``lora_A``, ``lora_B`` and ``rank`` do not tell: the scaling and the slices, as one float64 vector."""
        return torch.tensor([self.scaling, *itertools.chain(*self.out_slices)], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state that was trained with another scaling or on other slices: it would be another function.

        Raises:
            ValueError: Scaling or slices differ.
        """
        if type(state).__name__ == "_EXTRA_STATE":
            # torch's set_model_state_dict, which loads sharded models, loses the value and gives its placeholder.
            return
        if not self.is_own_extra_state(state):
            raise ValueError(
                f"Expected the state of an adapter with {_describe(self.get_extra_state())} but got one with "
                f"{_describe(state)}; adapt the model with the settings it was trained with."
            )

    def is_own_extra_state(self, state: Any) -> bool:
        """Whether scaling and slices are this layer's; the scaling may have been rounded to half precision."""
        own = self.get_extra_state()
        if not isinstance(state, Tensor) or state.shape != own.shape or not state.is_floating_point():
            return False
        state = state.to("cpu", torch.float64)
        return torch.equal(state[1:], own[1:]) and torch.allclose(state[:1], own[:1], rtol=1e-2, atol=0.0)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # A rank allocator makes the ranks of all layers slices of one tensor, which some formats refuse to save.
            destination[prefix + "rank"] = destination[prefix + "rank"].clone()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the base weight, in float32 and cast once; :meth:`unmerge` restores it bit for bit.

        Raises:
            RuntimeError: The layer is merged already.
            TypeError: The base weight is quantised.
            ValueError: The merged weight would not be finite; nothing has changed then.
        """
        if self.merged:
            raise RuntimeError("Expected an unmerged layer but it is merged already; call unmerge() first.")
        if self._quantized:
            raise TypeError(
                f"Expected a weight in floating point but got a quantised one ({type(self.base_layer).__name__}), in "
                "which rounding would swallow the adapter. Take lora_state_dict(model), load the model without "
                "quantisation, load_lora_state_dict(model, state) and merge there."
            )
        merged = self.weight
        if not torch.isfinite(merged).all():
            raise ValueError(f"Expected the merged weight to be finite in {merged.dtype} but it has NaN or Inf.")
        self._unmerged_weight = self.base_weight.clone()
        self.base_weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: the base weight is again what it was, bit for bit.

        Raises:
            RuntimeError: The layer is not merged.
        """
        if self._unmerged_weight is None:
            raise RuntimeError("Expected a merged layer but it is not merged; call merge() first.")
        self.base_weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged = False

    @torch.no_grad()
    def trim(self) -> None:
        """Cut ``lora_A`` and ``lora_B`` to the rank in force: the same outputs from fewer parameters.

        The parameters are new ones: an optimizer that held the old ones has to be built again.
        """
        rank = int(self.rank)
        factors = self.split(self.lora_A, self.lora_B)
        self.lora_A = nn.Parameter(torch.cat([A[:rank] for A, _ in factors]), self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(torch.cat([B[:, :rank] for _, B in factors]), self.lora_B.requires_grad)
        if self.start_A is not None and self.start_B is not None:
            starts = self.split(self.start_A, self.start_B)
            self.start_A, self.start_B = torch.cat([A[:rank] for A, _ in starts]), self.start_B[:, :rank].clone()
        self.max_rank = rank
        self.rank_mask = self.rank_mask[:rank].clone()

    def extra_repr(self) -> str:
        rank = "?" if self.rank.is_meta else int(self.rank)
        text = f"rank={rank} of {self.max_rank}, scaling={self.scaling}"
        if self.out_slices != ((0, self.out_features),):
            text += f", out_slices={self.out_slices}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


def _truncated_lora(
    x: Tensor,
    lora_x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    rank_mask: Tensor,
    scaling: float,
    out_slices: tuple[tuple[int, int], ...],
) -> tuple[Tensor, Tensor]:
    """``x W^T + b + scaling * mask(lora_x A^T) B^T`` for rows ``x`` (N x d), and the masked factor (N x S r).

    ``B`` accumulates onto the base output, so that there is no full-size temporary. The mask meets the narrow factor in
    place, so that there is no masked copy of a weight.
    """
    out = F.linear(x, weight, bias)
    hidden = _mask((x if lora_x is None else lora_x) @ A.T, rank_mask)
    for (out_i, B_i), hidden_i in zip(_by_slice(out, B, out_slices), _chunks(hidden, out_slices), strict=True):
        out_i.addmm_(hidden_i, B_i.T, alpha=scaling)
    return out, hidden


def _add_lora(
    out: Tensor,
    lora_x: Tensor,
    A: Tensor,
    B: Tensor,
    rank_mask: Tensor,
    scaling: float,
    out_slices: tuple[tuple[int, int], ...],
) -> Tensor:
    """``out + scaling * mask(lora_x A^T) B^T`` for rows, in plain autograd."""
    hidden = (lora_x @ A.T.to(lora_x.dtype)) * rank_mask.repeat(len(out_slices))
    slices = zip(out_slices, _chunks(hidden, out_slices), _rows(B.to(lora_x.dtype), out_slices), strict=True)
    for (start, stop), hidden_i, B_i in slices:
        out = out + F.pad(scaling * hidden_i @ B_i.T, (start, out.shape[1] - stop))
    return out


class _TruncatedLoRA(torch.autograd.Function):
    """:func:`_truncated_lora` as one node of the graph.

    One node, because autograd over the separate operations would add full-size temporaries: here the adapter's part
    of the input gradient accumulates onto the base's.
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
        out_slices: tuple[tuple[int, int], ...],
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        out, hidden = _truncated_lora(x, lora_x, weight, bias, A, B, rank_mask, scaling, out_slices)
        need_x, need_lora_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_weight or (need_A and lora_x is None) else None,
            lora_x if need_A else None,
            weight if need_x else None,
            A if need_x or need_lora_x else None,
            B,
            hidden if need_B else None,
            rank_mask,
        )
        ctx.scaling, ctx.out_slices, ctx.dropped = scaling, out_slices, lora_x is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_x, weight, A, B, hidden, rank_mask = ctx.saved_tensors
        need_x, need_lora_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        scaling = ctx.scaling
        grad_x = grad_lora_x = grad_weight = grad_bias = grad_A = grad_B = None

        parts = _by_slice(g, B, ctx.out_slices)
        # addmm with beta=0 is a scaled matrix product in one kernel; it does not read its first argument.
        unread = B[0, 0]
        if need_B:
            hiddens = _chunks(hidden, ctx.out_slices)
            grad_B = _join(
                [
                    torch.addmm(unread, g_i.T, h_i, beta=0, alpha=scaling)
                    for (g_i, _), h_i in zip(parts, hiddens, strict=True)
                ],
                dim=0,
            )
        if need_A or need_x or need_lora_x:
            grad_hidden = _mask(_join([g_i @ B_i for g_i, B_i in parts], dim=1), rank_mask)
            if need_A:
                adapter_in = lora_x if ctx.dropped else x
                grad_A = torch.addmm(unread, grad_hidden.T, adapter_in, beta=0, alpha=scaling)
            if need_x:
                grad_x = g @ weight
                if not ctx.dropped:
                    grad_x.addmm_(grad_hidden, A, alpha=scaling)
            if need_lora_x:
                grad_lora_x = torch.addmm(unread, grad_hidden, A, beta=0, alpha=scaling)
        if need_weight:
            grad_weight = g.T @ x
        if need_bias:
            grad_bias = g.sum(0)
        return grad_x, grad_lora_x, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _mask(hidden: Tensor, rank_mask: Tensor) -> Tensor:
    """Set the columns beyond the rank in force to zero, in each slice's r columns, in place."""
    hidden.view(-1, rank_mask.shape[0]).mul_(rank_mask)
    return hidden


def _by_slice(out: Tensor, B: Tensor, out_slices: tuple[tuple[int, int], ...]) -> list[tuple[Tensor, Tensor]]:
    """Views of the output's columns (N, m_s) and of B's rows (m_s, r), slice by slice."""
    if out_slices == ((0, out.shape[1]),):
        return [(out, B)]
    return [(out[:, start:stop], B_i) for (start, stop), B_i in zip(out_slices, _rows(B, out_slices), strict=True)]


def _rows(B: Tensor, out_slices: tuple[tuple[int, int], ...]) -> Sequence[Tensor]:
    """Views of B's rows (m_s, r), slice by slice."""
    return [B] if len(out_slices) == 1 else B.split([stop - start for start, stop in out_slices])


def _chunks(hidden: Tensor, out_slices: tuple[tuple[int, int], ...]) -> Sequence[Tensor]:
    """Views of the hidden factor's columns (N, r), slice by slice."""
    return [hidden] if len(out_slices) == 1 else hidden.chunk(len(out_slices), dim=1)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _check_settings(layer: TruncatedLoRALinear, rank: int, alpha: float, dropout: float) -> None:
    end = 0
    for start, stop in layer.out_slices:
        if not end <= start < stop <= layer.out_features:
            raise ValueError(
                f"Expected out_slices to be rising, disjoint ranges in [0, {layer.out_features}] "
                f"but got {layer.out_slices}."
            )
        end = stop
    largest = min(layer.in_features, *(stop - start for start, stop in layer.out_slices))
    if not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(
            f"Expected rank to be in [1, {largest}], up to the smaller side of the weight, and whole but got {rank}."
        )
    if not 0 < alpha < math.inf:
        raise ValueError(f"Expected alpha to be positive and finite but got {alpha}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout to be in [0, 1) but got {dropout}.")


def _describe(state: Any) -> str:
    scaling, *edges = state.tolist() if isinstance(state, Tensor) and state.ndim == 1 and len(state) else [state]
    return f"scaling {scaling} on output slices {list(zip(edges[::2], edges[1::2], strict=False))}"


def _refuse_merged(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(layer, TruncatedLoRALinear)
    if layer.merged:
        raise RuntimeError(
            f"Expected {prefix.rstrip('.') or 'the layer'} to be unmerged when its state is taken, since loading would "
            "add the adapter a second time; call unmerge_lora(model) first."
        )


def _refuse_loading_merged(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(layer, TruncatedLoRALinear)
    if layer.merged:
        raise RuntimeError(
            f"Expected {prefix.rstrip('.') or 'the layer'} to be unmerged when a state is loaded, since its base "
            "weight still holds the old adapter; call unmerge_lora(model) first."
        )


def _rebuild_mask(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, TruncatedLoRALinear)
    if not layer.rank.is_meta and not 1 <= layer.rank <= layer.max_rank:
        raise ValueError(f"Expected the loaded rank to be in [1, {layer.max_rank}] but got {int(layer.rank)}.")
    rank_mask = torch.arange(layer.max_rank, device=layer.rank.device) < layer.rank
    if layer.rank_mask.device == rank_mask.device:
        layer.rank_mask.copy_(rank_mask)
    else:
        layer.rank_mask = rank_mask


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, where it is sharded (a DTensor, by fully_shard): every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
