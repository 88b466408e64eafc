"""TruncatedLoRALinear: a linear layer with a low-rank adapter whose current rank is a mask."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_lightning.initialization import FACTORIZATIONS, Init
from lalora_lightning.layers import state_hooks
from lalora_lightning.layers.adapted_weight import weight_on_use
from lalora_lightning.layers.factors import LowRankFactors
from lalora_lightning.layers.fx_leaf import traced_call
from lalora_lightning.layers.kernels import TruncatedLoRAFunction, add_adapter, is_transformed, truncated_lora
from lalora_lightning.layers.linear_kinds import (
    is_linear,
    is_plain,
    is_quantized,
    keep_plain_format,
    linear_device,
    linear_shape,
    linear_weight,
    uses_own_weight,
)
from lalora_lightning.layers.settings import (
    lora_scaling,
    require_adapter_settings,
    require_floating_point,
    require_rank_that_fits,
    require_slices,
)
from lalora_lightning.layers.switch import is_switched_off, new_switch

__all__ = ["TruncatedLoRALinear"]


class TruncatedLoRALinear(LowRankFactors):
    r"""Linear layer with a low-rank adapter that uses its first ``rank`` components.

    ``h = W_0 x + (alpha / r) * B_r' A_r' x + b`` (La-LoRA, Neural Networks 194, 2025, 108095, Eq. 4), where ``A_r'``
    and ``B_r'`` are the first ``r'`` rows of ``lora_A`` and columns of ``lora_B``. Both are stored at the maximum rank
    ``r`` and truncated by a mask on the device. Changing the rank therefore changes no shapes and causes no
    recompilation or synchronization. The components beyond ``r'`` keep their values and get zero gradients. A state
    dict contains the mask and, as extra state, the scaling and the slices.

    ``lora_B`` is initialized to zero, so a new layer computes exactly the same as its base layer. If ``init`` makes
    ``B A`` nonzero, the layer keeps the initial factors and subtracts their product, truncated to the same rank:
    ``B A - B_0 A_0``. A new layer then equals its base layer at every rank, up to rounding, and the base weight is not
    changed.

    A plain base layer is not called, since its product and that of the adapter are computed together. Any other base
    layer is called, and the adapter is added to its output: a quantized or offloaded layer, one with hooks or
    parametrizations, and one with a ``forward`` of its own. The same happens under tracing and ``torch.func``.

    A fused projection can be adapted in slices of its output features (``out_slices``). ``lora_A`` and ``lora_B`` then
    contain one adapter of rank ``r`` for each slice, stacked along their rows.

    Args:
        base_layer: The frozen ``nn.Linear`` or a subclass of it, such as bitsandbytes' ``Linear4bit`` and
            ``Linear8bitLt``, or transformers' ``Conv1D``, with weight ``W_0`` (m x d).
        rank: The maximum rank ``r``, from 1 to min(m, d).
        alpha: The adapter is scaled by ``alpha / rank``, independent of the current rank.
        dropout: Probability of dropping an entry of the adapter's input during training.
        out_slices: ``(start, stop)`` ranges of output features to adapt; by default one slice with all features.
        device: Device of the adapter; by default that of the base weight.
        dtype: Data type of the adapter's parameters.
        init: Initialization of ``lora_A`` and ``lora_B``, see :mod:`lalora_lightning.initialization`.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (rank-stabilized LoRA, arXiv 2312.03732).
        freeze_A: Train ``lora_B`` only (LoRA-FA, arXiv 2308.03303). The layer's input is then not kept for the
            backward pass.
        compute_dtype: Data type in which the adapter is computed; by default that of the input. With float32 over a
            bfloat16 base layer, the gradients of the adapter are as accurate as in float32, and a training step is
            slower. Under autocast, its type is used.

    Attributes:
        lora_A: ``(r, d)``, or ``(S r, d)`` for S slices.
        lora_B: ``(m, r)``, or ``(sum of the slices' widths, r)`` for slices.
        start_A: The initial ``lora_A``, a persistent buffer; None if the initial ``B A`` is zero.
        start_B: The initial ``lora_B``, a persistent buffer or None, like ``start_A``.
        rank_mask: ``(r,)``, a persistent buffer: 1 for the components within the current rank, 0 for the others. If
            models of different ranks were averaged, the values in between weight the components.
        rank: Integer scalar, the current rank ``r'``, read off the mask. The initial value is ``r``.

    Raises:
        TypeError: The base layer is not linear.
        ValueError: rank, alpha, dropout, init or a slice is out of range.

    >>> layer = TruncatedLoRALinear(nn.Linear(6, 4), rank=2, alpha=4.0)
    >>> layer.set_rank(1)
    >>> layer
    TruncatedLoRALinear(
      rank=1 of 2, scaling=2.0
      (base_layer): Linear(in_features=6, out_features=4, bias=True)
    )
    """

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
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if not is_linear(base_layer):
            raise TypeError(
                "Expected the base layer to be nn.Linear, a subclass of it or transformers' Conv1D but got "
                f"{type(base_layer).__name__}."
            )
        out_features, in_features = linear_shape(base_layer)
        slices = tuple(out_slices or [(0, out_features)])
        require_slices(slices, out_features)
        require_rank_that_fits(rank, slices, in_features)
        require_adapter_settings(rank, alpha, dropout, init)
        require_floating_point(compute_dtype)
        scaling = lora_scaling(alpha, rank, use_rslora)
        device = linear_device(base_layer) if device is None else device
        super().__init__(out_features, in_features, slices, rank, scaling, init, freeze_A, device, dtype)
        keep_plain_format(base_layer)
        self.base_layer = base_layer
        self.dropout = dropout
        self.compute_dtype = compute_dtype
        self.merged = False
        self.switch = new_switch()
        self._unmerged_weight: Tensor | None = None
        self.reset_parameters()
        self.register_state_dict_pre_hook(state_hooks.require_unmerged_to_save)
        self.register_state_dict_pre_hook(state_hooks.warn_of_save_pretrained)
        self.register_load_state_dict_pre_hook(state_hooks.require_unmerged_to_load)
        self.register_load_state_dict_pre_hook(state_hooks.require_rank_mask)
        self.register_load_state_dict_post_hook(state_hooks.replace_mask)
        # Dropout is off in a model that is adapted in evaluation mode.
        self.train(base_layer.training)

    @classmethod
    def with_scaling(
        cls,
        base_layer: nn.Module,
        rank: int,
        scaling: float,
        **settings: Any,
    ) -> "TruncatedLoRALinear":
        """Return a layer with exactly this scaling, which ``alpha / rank`` could round.

        Args:
            base_layer: As in the class.
            rank: As in the class.
            scaling: Factor of ``B A``.
            settings: Other arguments of the class.
        """
        layer = cls(base_layer, rank, scaling * rank, **settings)
        layer.scaling = scaling
        return layer

    def reset_parameters(self) -> None:
        """Initialize the factors according to ``init``, and set the maximum rank.

        Call this after ``to_empty`` if the layer was built on the meta device.

        Raises:
            ValueError: ``init`` needs the base weight, but it is on the meta device or has a rank below ``max_rank``.
        """
        self.initialize(self.base_weight if self.init in FACTORIZATIONS else None)

    @property
    def base_weight(self) -> Tensor:
        """The base weight ``W_0`` as ``(m, d)``; a copy if it is quantized."""
        return linear_weight(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """The adapted weight ``(m, d)``, for code that reads the weight of a layer instead of calling the layer.

        It is computed by the first operation that uses it. Shape, data type and device take no computation.
        """
        return self.base_weight if self.merged or is_switched_off(self.switch) else weight_on_use(self)

    def adapted_weight(self) -> Tensor:
        """Compute the adapted weight ``(m, d)`` in float32 or wider, and cast it once."""
        base_weight = self.base_weight
        if self.merged:
            return base_weight
        increment = self.increment()
        return (base_weight.to(increment.dtype) + increment).to(base_weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, ``(m,)``."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(..., d)``.

        Returns:
            ``(..., m)`` in the input's type, or in autocast's type under autocast.
        """
        if is_switched_off(self.switch):
            return self.base_layer(x)
        if is_transformed(x) or not is_plain(self.base_layer):
            return self._call_base_layer(x)
        device_type = x.device.type
        # Autocast does not change double precision.
        if device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            # The inputs are cast here once, as autocast would do it, because the backward pass needs them again.
            with torch.autocast(device_type, enabled=False):
                return self._fuse_base_layer(x.to(dtype), dtype)
        return self._fuse_base_layer(x, None)

    def _fuse_base_layer(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Compute base layer and adapter in one autograd node, with the weight of a plain base layer."""
        if self.merged:
            return F.linear(x, *self._base_parameters(dtype))
        # The shape is restored outside of the autograd function, so that callers may change the output in place.
        rows = x.reshape(-1, self.in_features)
        lora_rows = F.dropout(rows, self.dropout) if self.training and self.dropout > 0 else None
        A, B, mask = self._factors()
        compute_dtype = (self.compute_dtype or x.dtype) if dtype is None else dtype
        fixed = mask, self.scaling, self.out_slices
        weight, bias = self._base_parameters(dtype)
        if torch.is_grad_enabled():
            out = TruncatedLoRAFunction.apply(rows, lora_rows, weight, bias, A, B, *fixed, compute_dtype)
        else:
            # Without a backward pass, an autograd node would only cost time.
            out, _ = truncated_lora(rows, lora_rows, weight, bias, A.to(compute_dtype), B.to(compute_dtype), *fixed)
        return out.view(*x.shape[:-1], self.out_features)

    def _call_base_layer(self, x: Tensor) -> Tensor:
        """Call the base layer and add the adapter in plain autograd. ``torch.fx`` records one call of the layer."""
        traced = traced_call(self, (x,), {})
        if traced is not None:
            return traced
        out = self.base_layer(x)
        if self.merged:
            return out
        rows = x.reshape(-1, self.in_features)
        if self.training and self.dropout > 0:
            rows = F.dropout(rows, self.dropout)
        A, B, mask = self._factors()
        dtype = self.compute_dtype or x.dtype
        fixed = mask, self.scaling, self.out_slices
        adapted = add_adapter(out.reshape(-1, self.out_features), rows, A.to(dtype), B.to(dtype), *fixed)
        return adapted.reshape(out.shape).to(out.dtype)

    def _base_parameters(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Return the base layer's weight ``(m, d)`` and bias ``(m,)``, in autocast's type if there is one."""
        weight, bias = self.base_weight, self.bias
        if dtype is None:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def get_extra_state(self) -> Tensor:
        """Return the scaling and the slices, which are not in the state dict otherwise, as a float64 vector."""
        return torch.tensor([self.scaling, *itertools.chain(*self.out_slices)], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a loaded state was trained with the same scaling and slices.

        Raises:
            ValueError: Scaling or slices differ.
        """
        if type(state).__name__ == "_EXTRA_STATE":
            # torch's set_model_state_dict, which loads sharded models, passes a placeholder instead of the value.
            return
        if not self.is_own_extra_state(state):
            raise ValueError(
                f"Expected the state of an adapter with {state_hooks.describe_extra_state(self.get_extra_state())} but "
                f"got one with {state_hooks.describe_extra_state(state)}; adapt the model with the settings it was "
                "trained with."
            )

    def is_own_extra_state(self, state: Any) -> bool:
        """Return whether a state has this layer's slices and scaling, rounded if the state was cast to another type."""
        own = self.get_extra_state()
        if not isinstance(state, Tensor) or state.shape != own.shape or not state.is_floating_point():
            return False
        return torch.equal(state.cpu(), own.to(state.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the base weight, in float32 and cast once; :meth:`unmerge` restores it bit for bit.

        Until then the layer keeps a copy of the original base weight.

        Raises:
            RuntimeError: The layer is merged already.
            TypeError: The base weight is quantized, or the base layer does not compute with a weight of its own.
            ValueError: The merged weight would not be finite. The layer is left unchanged.
        """
        if self.merged:
            raise RuntimeError("Expected an unmerged layer but it is merged already; call unmerge() first.")
        if is_quantized(self.base_layer):
            raise TypeError(
                f"Expected a weight in floating point but got a quantized one ({type(self.base_layer).__name__}, "
                f"{type(self.base_layer.weight).__name__}), "
                "where rounding would lose the adapter; get state = lora_state_dict(model), load the model without "
                "quantization, call load_lora_state_dict(model, state) and merge that model."
            )
        if not uses_own_weight(self.base_layer):
            raise TypeError(
                "Expected a base layer that computes with its own weight but got a "
                f"{type(self.base_layer).__name__} with a parametrization, pruning, offloading, a weight of a special "
                "kind or a forward of its own, which would ignore the merged weight; remove that first, or keep the "
                "adapter unmerged."
            )
        merged = self.adapted_weight()
        if not torch.isfinite(merged).all():
            raise ValueError(f"Expected the merged weight to be finite in {merged.dtype} but it has NaN or Inf.")
        self._unmerged_weight = self.base_weight.clone()
        self.base_weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: restore the base weight bit for bit.

        Raises:
            RuntimeError: The layer is not merged.
        """
        if self._unmerged_weight is None:
            raise RuntimeError("Expected a merged layer but it is not merged; call merge() first.")
        self.base_weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer; it is switched on, whatever the original is."""
        super().__setstate__(state)
        self.switch = new_switch()

    def extra_repr(self) -> str:
        """Return the current rank and the scaling, and slices and dropout if they are not the defaults."""
        rank = "?" if self.rank_mask.is_meta else int(self.rank)
        text = f"rank={rank} of {self.max_rank}, scaling={self.scaling}"
        if self.out_slices != ((0, self.out_features),):
            text += f", out_slices={self.out_slices}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")
