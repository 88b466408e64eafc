"""Base weights that are tensor subclasses, as torchao's and quanto's quantized ones; a small one stands for them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_lightning import (
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
)
from tests.helpers.models import TinyTransformer

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


class Rounded(Tensor):
    """A weight in 1024ths, stored as integers. Like torchao's, it only knows how to compute ``F.linear``."""

    levels: Tensor

    @staticmethod
    def __new__(cls, levels: Tensor) -> "Rounded":
        out = Tensor._make_wrapper_subclass(cls, levels.shape, dtype=torch.float32, device=levels.device)
        out.levels = levels
        return out

    def dequantize(self) -> Tensor:
        return self.levels / 1024

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].levels.clone())
        raise NotImplementedError(f"{func} of a rounded weight")


def rounded(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(Rounded((1024 * linear.weight.detach()).round()), requires_grad=False)
    return linear


def rounded_model() -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer()
    for block in model.blocks:
        for name in ("query", "key", "value"):
            rounded(getattr(block, name))
    return model


def adapted_model() -> TinyTransformer:
    model = rounded_model()
    add_lora(model, rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


@pytest.fixture
def layer() -> TruncatedLoRALinear:
    layer = TruncatedLoRALinear(rounded(nn.Linear(8, 6)), rank=3, alpha=6.0)
    nn.init.normal_(layer.lora_B)
    layer.set_rank(2)
    return layer


def plain_weight(layer: TruncatedLoRALinear) -> Tensor:
    return layer.base_layer.weight.levels / 1024 + 2.0 * layer.lora_B[:, :2] @ layer.lora_A[:2]


def test_the_base_layer_is_called(layer: TruncatedLoRALinear):
    torch.testing.assert_close(layer(X), F.linear(X, plain_weight(layer), layer.bias))


def test_a_model_learns(layer: TruncatedLoRALinear):
    model = rounded_model()
    out = model(X)
    add_lora(model, rank=2)
    torch.testing.assert_close(model(X), out)
    model(X).square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(model).values())
    assert all(not layer.base_layer.weight.requires_grad for layer in lora_layers(model).values())


def test_its_weight_can_be_read(layer: TruncatedLoRALinear):
    """T5 reads the type of a weight."""
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == (6, 8)
    outs = [F.linear(X, weight) for weight in (layer.weight, plain_weight(layer))]
    torch.testing.assert_close(*outs)
    for own, other in zip(*(torch.autograd.grad(o.sum(), [layer.lora_A, layer.lora_B]) for o in outs), strict=True):
        torch.testing.assert_close(own, other)


def test_a_merge_is_refused_and_the_way_out_works():
    model = adapted_model()
    with pytest.raises(TypeError, match=r"got a quantized one \(Linear, Rounded\).* without quantization"):
        merge_lora(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    torch.manual_seed(0)
    plain = TinyTransformer()
    load_lora_state_dict(plain, lora_state_dict(model))
    merge_lora(plain, remove=True)
    torch.testing.assert_close(plain(X), model(X), rtol=0, atol=0.05)


def test_states_and_copies():
    model = adapted_model()
    state = lora_state_dict(model)
    assert [key for key in state if key.endswith("weight")] == ["head.weight"]
    again = rounded_model()
    load_lora_state_dict(again, state)
    assert torch.equal(again(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_an_initialization_from_the_dequantized_weight():
    base = rounded(nn.Linear(8, 6))
    layer = TruncatedLoRALinear(base, rank=2, alpha=2.0, init="pissa")
    U, S, Vh = torch.linalg.svd(base.weight.levels / 1024)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, U[:, :2] * S[:2] @ Vh[:2])
    torch.testing.assert_close(layer(X), base(X))


class Packed(nn.Linear):
    """A layer that packs its weight into integers, and computes by itself."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.weight = nn.Parameter((8 * self.weight.detach()).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / 8, self.bias)


def test_a_weight_of_unknown_format_is_called_but_not_read():
    base = Packed()
    layer = TruncatedLoRALinear(base, rank=2)
    torch.testing.assert_close(layer(X), base(X))
    for read in (lambda: layer.weight + 0, lambda: TruncatedLoRALinear(base, rank=2, init="pissa")):
        with pytest.raises(TypeError, match=r"got a Packed with a weight in torch.int8; call the layer"):
            read()
    with pytest.raises(TypeError, match="computes with its own weight"):
        layer.merge()
