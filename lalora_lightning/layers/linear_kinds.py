"""The kinds of linear layers that can be adapted, and which of them are plain enough to compute with their weight."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "is_4bit",
    "is_conv1d",
    "is_linear",
    "is_plain",
    "is_quantized",
    "keep_plain_format",
    "linear_device",
    "linear_dtype",
    "linear_parameter",
    "linear_shape",
    "linear_weight",
    "num_entries",
    "uses_own_weight",
]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: ``nn.Linear`` or a subclass, or transformers' ``Conv1D``.

    Subclasses include bitsandbytes' quantized layers, and layers with a ``forward`` of their own such as Falcon's.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a module does nothing but compute ``x @ W.T + b`` with its own parameter ``W``.

    Only such a module can be replaced by a computation with its weight. Any other one has to be called: a quantized or
    offloaded layer, one with hooks, parametrizations, weight norm or pruning, and one with a ``forward`` of its own.
    """
    return (
        uses_own_weight(module)
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
    )


def uses_own_weight(module: nn.Module) -> bool:
    """Return whether a linear module computes with a parameter ``weight`` in floating point, which can be changed.

    A weight of 8 bits is only stored. Something else, such as a hook, converts it before each computation.
    """
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and type(weight) in (nn.Parameter, Tensor)
        and weight.dtype.itemsize > 1
        and (type(module).forward is nn.Linear.forward or is_conv1d(module))
        and "forward" not in module.__dict__
    )


# Classes are recognized by name, because importing transformers or bitsandbytes takes seconds.
def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' ``Conv1D`` (GPT-2), which stores its weight as ``(d, m)``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_4bit(module: nn.Module) -> bool:
    """Return whether a module is bitsandbytes' ``Linear4bit`` or a subclass (``LinearNF4``, ``LinearFP4``)."""
    return _is_from_bitsandbytes(module, "Linear4bit")


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit or 8-bit layer of bitsandbytes, or has a weight that dequantizes itself."""
    return is_4bit(module) or _is_from_bitsandbytes(module, "Linear8bitLt") or _dequantizes_itself(module)


def keep_plain_format(module: Any) -> None:
    """Prevent bitsandbytes from repacking a 4-bit weight into a format without gradients.

    On processors with AVX512-BF16, bitsandbytes repacks the weight in the first forward pass that is in evaluation mode
    and needs no gradient. After that, the layer computes in bfloat16, has no gradient with respect to its input, and
    ``dequantize_4bit`` returns wrong values.
    """
    if not is_4bit(module):
        return
    module.support_avx512bf16_for_cpu = False
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        # To save a weight, bitsandbytes converts it back to the plain format.
        module.state_dict()


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return ``(m, d)``, the output and input features of a linear module."""
    if is_conv1d(module):
        d, m = linear_parameter(module).shape
        return m, d
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def linear_parameter(module: nn.Module) -> Tensor:
    """Return the weight of a linear module as it is stored; a quantized weight consists of packed integers."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"Expected a linear layer whose weight is a tensor but that of {type(module).__name__} is a "
            f"{type(weight).__name__}; adapt the model before it is packed."
        )
    return weight


def linear_device(module: nn.Module) -> torch.device | str:
    """Return the device that a linear module computes on; accelerate moves an offloaded weight there for each call."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return linear_parameter(module).device if device is None else torch.device(device)


def linear_dtype(module: nn.Module) -> torch.dtype:
    """Return the data type of :func:`linear_weight`, without dequantizing the weight."""
    weight: Any = linear_parameter(module)
    if weight.is_floating_point():
        return weight.dtype
    return weight.quant_state.dtype if is_4bit(module) else torch.float32


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear module as ``(m, d)``: a transposed view for ``Conv1D``, a copy if quantized.

    bitsandbytes quantizes a layer when it is moved to its device. Before that, this is the original weight.

    Raises:
        TypeError: The weight is quantized in a way that is not known.
    """
    weight = linear_parameter(module)
    if _dequantizes_itself(module):
        return weight.dequantize()
    if not weight.is_floating_point():
        return _dequantized(module)
    return weight.T if is_conv1d(module) else weight


def num_entries(parameter: Tensor) -> int:
    """Return the number of entries of a parameter; each byte of a 4-bit weight holds two."""
    packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
    return parameter.numel() * (2 if packed else 1)


def _dequantizes_itself(module: nn.Module) -> bool:
    """Return whether the weight is a tensor subclass for quantized values, as those of torchao and quanto."""
    kind = type(module._parameters.get("weight"))
    return issubclass(kind, Tensor) and kind.dequantize is not Tensor.dequantize


def _dequantized(module: Any) -> Tensor:
    if not is_quantized(module):
        raise TypeError(
            "Expected a weight in floating point, one of bitsandbytes or a tensor with dequantize() but got a "
            f"{type(module).__name__} with a weight in {module.weight.dtype}; call the layer instead of reading its "
            "weight, and choose an initialization that does not need it."
        )
    from bitsandbytes import functional

    if is_4bit(module):
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    # The first forward pass moves the scales from the weight to the module's state.
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return functional.int8_vectorwise_dequant(module.weight.data, scales.to(module.weight.device))


def _is_from_bitsandbytes(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__ == "bitsandbytes.nn.modules" for kind in type(module).__mro__)
