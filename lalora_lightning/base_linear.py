"""What counts as a linear layer, and how its weight is read: nn.Linear, transformers' Conv1D, bitsandbytes' layers."""

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x @ W.T + b`` and nothing else.

    True of ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``.
    """
    return type(module).forward is nn.Linear.forward or is_conv1d(module) or is_quantized(module)


# By name: loading transformers or bitsandbytes only to ask these questions would cost every user seconds.
def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D`` (GPT-2), a linear layer that stores its weight as ``(d, m)``."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' ``Linear4bit``, or ``LinearNF4`` or ``LinearFP4``, which derive from it."""
    return _is_of_bitsandbytes(module, "Linear4bit")


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a 4-bit or 8-bit linear layer of bitsandbytes."""
    return is_4bit(module) or _is_of_bitsandbytes(module, "Linear8bitLt")


def keep_plain_format(module: Any) -> None:
    """Have a 4-bit layer keep its weight in the format that can be trained through and read.

    On processors with AVX512-BF16, bitsandbytes packs the weight of a layer anew at the first pass in evaluation mode
    that needs no gradient. From then on, the layer computes in bfloat16, has no gradient with respect to its input, and
    ``dequantize_4bit`` returns wrong numbers.
    """
    if not is_4bit(module):
        return
    module.support_avx512bf16_for_cpu = False
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes saves the plain format, and goes back to it for that.
        module.state_dict()


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """``(m, d)``: output and input features of a linear module."""
    if is_conv1d(module):
        d, m = linear_parameter(module).shape
        return m, d
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def linear_parameter(module: nn.Module) -> Tensor:
    """The weight of a linear module as it is stored; a quantised one is packed integers."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as ``(m, d)``: for ``Conv1D`` a transposed view, for a quantised one a copy.

    bitsandbytes quantises when a layer is moved to its device; before, the weight is what it was.
    """
    weight = linear_parameter(module)
    if not weight.is_floating_point():
        return _dequantized(module)
    return weight.T if is_conv1d(module) else weight


def entries(parameter: Tensor) -> int:
    """Number of entries of a parameter; a byte of a 4-bit weight holds two."""
    packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
    return parameter.numel() * (2 if packed else 1)


def _dequantized(module: Any) -> Tensor:
    from bitsandbytes import functional

    if is_4bit(module):
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    # The first forward pass moves the scales from the weight to the module's state.
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return functional.int8_vectorwise_dequant(module.weight.data, scales.to(module.weight.device))


def _is_of_bitsandbytes(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__ == "bitsandbytes.nn.modules" for kind in type(module).__mro__)
