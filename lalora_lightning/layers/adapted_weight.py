"""AdaptedWeight: the weight of an adapted layer, computed when it is used.

Many models read ``layer.weight.dtype`` or its device in every forward pass. Multiplying out the adapter for that would
cost as much as the layer itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lalora_lightning.layers.kernels import is_transformed, without_autocast
from lalora_lightning.layers.linear_kinds import is_quantized, linear_dtype

__all__ = ["AdaptedWeight", "weight_on_use"]


def weight_on_use(layer: Any) -> Tensor:
    """Return the adapted weight ``(m, d)`` of an unmerged layer, computed when it is used.

    It is computed at once for sharded parameters and other tensor subclasses that are not quantized, and while torch
    traces, compiles or transforms a function.

    Args:
        layer: A :class:`lalora_lightning.TruncatedLoRALinear`.

    Raises:
        TypeError: The weight is read under ``torch.fx``, which follows only functions of tensors and parameters.
    """
    if isinstance(layer.lora_A, torch.fx.Proxy):
        raise TypeError(
            "Expected an adapted layer to be called under torch.fx but its weight was read; call merge_lora(model, "
            "remove=True) first, use torch.export, or make the module that reads the weight a leaf of the tracer."
        )
    if torch.compiler.is_compiling() or is_transformed(None) or type(layer.lora_A) not in (nn.Parameter, Tensor):
        return layer.adapted_weight()
    base_weight = None if is_quantized(layer.base_layer) else layer.base_weight
    if type(base_weight) not in (nn.Parameter, Tensor, type(None)):
        return layer.adapted_weight()
    return _AdaptedWeightFunction.apply(base_weight, layer.lora_A, layer.lora_B, layer.rank_mask, layer)


def _of_computed(method: Callable[..., Any]) -> Any:
    """Return a method of tensors that is called on the computed weight."""

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(self.view_as(self), *args, **kwargs)

    return call


class AdaptedWeight(Tensor):
    """A tensor without memory, whose first operation computes the weight and keeps it for later ones.

    Shape, data type, device and ``requires_grad`` are those of the weight. Autograd treats it like any other tensor,
    because the computed weight takes its place below autograd (``__torch_dispatch__``).
    """

    _layer: Any
    _factors: tuple[Tensor, Tensor]
    _rank_mask: Tensor
    _computed: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # These read the memory of a tensor without an operation.
    __deepcopy__ = _of_computed(Tensor.__deepcopy__)
    __dlpack__ = _of_computed(Tensor.__dlpack__)
    __dlpack_c_exchange_api__ = None
    __reduce_ex__ = _of_computed(Tensor.__reduce_ex__)
    __repr__ = _of_computed(Tensor.__repr__)
    data_ptr = _of_computed(Tensor.data_ptr)
    numpy = _of_computed(Tensor.numpy)
    tolist = _of_computed(Tensor.tolist)
    untyped_storage = _of_computed(Tensor.untyped_storage)

    @staticmethod
    def __new__(cls, layer: Any, base_weight: Tensor | None) -> "AdaptedWeight":
        """Return the weight of a layer; the base weight is None if it is quantized."""
        weight = Tensor._make_wrapper_subclass(
            cls,
            (layer.out_features, layer.in_features),
            strides=None if base_weight is None else base_weight.stride(),
            dtype=linear_dtype(layer.base_layer),
            device=layer.lora_A.device,
        )
        # Extensions that look for memory raise an error then, instead of reading from a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(weight)
        weight._layer, weight._factors, weight._rank_mask = layer, (layer.lora_A, layer.lora_B), layer.rank_mask
        weight._computed = None
        return weight

    def computed(self) -> Tensor:
        """Return the weight as a plain tensor without a graph, as it was when it was first used.

        Raises:
            RuntimeError: The factors were replaced since the weight was read, or the rank changed, so its gradients
                would be those of another rank.
        """
        if self._computed is None:
            layer = self._layer
            if layer.lora_A is not self._factors[0] or layer.lora_B is not self._factors[1]:
                raise RuntimeError(
                    "Expected the factors to stay the same until the weight of a layer is used but they were replaced "
                    "after the weight was read, as at the end of torch.func.functional_call; clone layer.weight there."
                )
            if self.requires_grad and layer.rank_mask is not self._rank_mask:
                raise RuntimeError(
                    "Expected the rank to stay the same until the weight of a layer is used but it was changed after "
                    "the weight was read; read layer.weight again."
                )
            with torch.inference_mode(False), torch.no_grad():
                self._computed = layer.adapted_weight()
        return self._computed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Replace every adapted weight with the computed one."""
        args, kwargs = tree_map_only(cls, cls.computed, (args, kwargs or {}))
        return func(*args, **kwargs)


class _AdaptedWeightFunction(torch.autograd.Function):
    """``W_0 + scaling * B_r' A_r'``, less the constant product of the initial factors if there is one."""

    @staticmethod
    def forward(
        ctx: Any, base_weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, rank_mask: Tensor, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(lora_A, lora_B, rank_mask)
        ctx.layer, ctx.scaling = layer, layer.scaling
        return AdaptedWeight(layer, base_weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        lora_A, lora_B, mask = ctx.saved_tensors
        dtype = torch.promote_types(lora_A.dtype, torch.float32)
        slices = zip(ctx.layer.out_slices, ctx.layer.split(lora_A.to(dtype), lora_B.to(dtype)), strict=True)
        grads_A, grads_B = [], []
        with without_autocast(g.device):
            for (start, stop), (A, B) in slices:
                g_s = ctx.scaling * g[start:stop].to(dtype)
                if ctx.needs_input_grad[1]:
                    grads_A.append((B * mask).T @ g_s)
                if ctx.needs_input_grad[2]:
                    grads_B.append((g_s @ A.T) * mask)
        grad_A, grad_B = (
            torch.cat(grads).to(factor.dtype) if grads else None
            for grads, factor in ((grads_A, lora_A), (grads_B, lora_B))
        )
        return g if ctx.needs_input_grad[0] else None, grad_A, grad_B, None, None
