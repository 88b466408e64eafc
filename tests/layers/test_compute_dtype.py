"""Adapters in float32 over a base layer in half precision, against float64 and PEFT's own layer."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers
from tests.helpers.models import TinyTransformer

D, M, N = 64, 48, 96
OUT_SLICES = [(0, 16), (32, 48)]

half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
called_or_not = pytest.mark.parametrize("called", [False, True])


def make_layer(dtype: torch.dtype = torch.bfloat16, called: bool = False, **settings: object) -> TruncatedLoRALinear:
    """A layer at rank 5 of 8 whose increment is as large as its base weight, where rounding it would show."""
    torch.manual_seed(0)
    base = nn.Linear(D, M).to(dtype).requires_grad_(False)
    if called:
        base.register_forward_hook(lambda *_: None)
    layer = TruncatedLoRALinear(base, rank=8, **{"compute_dtype": torch.float32, **settings})
    nn.init.normal_(layer.lora_B)
    layer.set_rank(5)
    return layer


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The input and the gradient of the output."""
    torch.manual_seed(1)
    return torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(N, M).to(dtype)


def by_layer(layer: TruncatedLoRALinear, x: Tensor, g: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the input, A and B."""
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, layer.lora_A, layer.lora_B], g)]


def by_float64(layer: TruncatedLoRALinear, x: Tensor, g: Tensor, dropped: Tensor | float = 1.0) -> list[Tensor]:
    """The same from the definition."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    out = F.linear(x, layer.base_weight.double(), layer.bias.double())
    rank, stop_B = int(layer.rank), 0
    for i, (start, stop) in enumerate(layer.out_slices):
        A_s, B_s = A[8 * i : 8 * i + rank], B[stop_B : stop_B + stop - start, :rank]
        stop_B += stop - start
        out = out + F.pad(layer.scaling * (x * dropped) @ A_s.T @ B_s.T, (start, M - stop))
    return [out.detach(), *torch.autograd.grad(out, [x, A, B], g.double())]


def errors(own: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(own, exact, strict=True)]


def require_accurate(own: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    of_out, of_x, of_A, of_B = errors(own, exact)
    assert of_A < 1e-6
    assert of_B < 1e-6
    # The output and the gradient of the input are rounded to the input's type, on average by a quarter of its epsilon.
    assert of_out < 0.4 * torch.finfo(dtype).eps
    assert of_x < 0.4 * torch.finfo(dtype).eps


@half
@called_or_not
@pytest.mark.parametrize("out_slices", [None, OUT_SLICES])
def test_gradients_are_as_accurate_as_in_float32(dtype: torch.dtype, called: bool, out_slices: list | None):
    layer = make_layer(dtype, called, out_slices=out_slices)
    own = by_layer(layer, *inputs(dtype))
    assert [t.dtype for t in own] == [dtype, dtype, torch.float32, torch.float32]
    require_accurate(own, by_float64(layer, *inputs(dtype)), dtype)
    # Without a gradient, the output is the same.
    with torch.no_grad():
        assert torch.equal(layer(inputs(dtype)[0]), own[0])


@half
@called_or_not
def test_by_default_the_adapter_is_rounded_to_the_type_of_the_input(dtype: torch.dtype, called: bool):
    layer = make_layer(dtype, called, compute_dtype=None)
    of_A, of_B = errors(by_layer(layer, *inputs(dtype)), by_float64(layer, *inputs(dtype)))[2:]
    assert 0.2 < of_A / torch.finfo(dtype).eps < 0.5
    assert 0.2 < of_B / torch.finfo(dtype).eps < 0.5


@half
@called_or_not
def test_no_error_is_larger_than_that_of_peft(dtype: torch.dtype, called: bool):
    layer = make_layer(dtype, called)
    layer.set_rank(8)
    net = nn.Sequential(nn.Linear(D, M).to(dtype))
    net[0].load_state_dict(layer.base_layer.state_dict())
    peft = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=["0"]), net)[0]
    A, B = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    A.data, B.data = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    x, g = inputs(dtype)
    out = peft(x)
    theirs = [out.detach(), *torch.autograd.grad(out, [x, A, B], g)]
    exact = by_float64(layer, x, g)
    for own, other in zip(errors(by_layer(layer, x, g), exact), errors(theirs, exact), strict=True):
        assert own < 1.1 * other


@called_or_not
def test_dropout(called: bool):
    layer = make_layer(called=called, dropout=0.5)
    x, g = inputs(torch.bfloat16)
    torch.manual_seed(2)
    own = by_layer(layer, x, g)
    torch.manual_seed(2)
    dropped = F.dropout(torch.ones_like(x), 0.5)
    exact = by_float64(layer, x, g, dropped.double())
    assert max(errors(own, exact)[2:]) < 1e-6
    # Here, the gradients of the two inputs are rounded one by one.
    assert max(errors(own, exact)[:2]) < 0.5 * torch.finfo(torch.bfloat16).eps


@called_or_not
def test_a_frozen_a(called: bool):
    layer = make_layer(called=called, freeze_A=True)
    x, g = inputs(torch.bfloat16)
    (grad_B,) = torch.autograd.grad(layer(x), layer.lora_B, g)
    assert errors([grad_B], by_float64(layer, x, g)[3:])[0] < 1e-6


def test_the_input_is_kept_in_its_own_type():
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    layer = make_layer()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs(torch.bfloat16)[0])
    assert [t.dtype for t in saved if t.shape == (N, D)] == [torch.bfloat16]


@called_or_not
def test_autocast_means_its_own_type(called: bool):
    own = make_layer(torch.float32, called)
    default = make_layer(torch.float32, called, compute_dtype=None)
    with torch.autocast("cpu", torch.bfloat16):
        pair = [by_layer(layer, *inputs(torch.float32)[:1], inputs(torch.bfloat16)[1]) for layer in (own, default)]
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_changes_nothing_in_the_same_type(dtype: torch.dtype):
    pair = [make_layer(dtype, compute_dtype=compute_dtype) for compute_dtype in (dtype, None)]
    for a, b in zip(*(by_layer(layer, *inputs(dtype)) for layer in pair), strict=True):
        assert torch.equal(a, b)


@half
@pytest.mark.parametrize("compute_dtype", [torch.float32, None])
def test_second_derivatives(dtype: torch.dtype, compute_dtype: torch.dtype | None):
    grads = []
    for called in (False, True):
        layer = make_layer(dtype, called, out_slices=OUT_SLICES, compute_dtype=compute_dtype)
        x, g = inputs(dtype)
        first = torch.autograd.grad(layer(x), [x, layer.lora_A, layer.lora_B], g, create_graph=True)
        grads.append(torch.autograd.grad(sum(t.float().square().mean() for t in first), [layer.lora_A, layer.lora_B]))
    for own, other in zip(*grads, strict=True):
        assert own.dtype == torch.float32
        assert (own - other).norm() < 4 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("out_slices", [None, OUT_SLICES])
def test_compiled(out_slices: list | None):
    layer = make_layer(out_slices=out_slices)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for own, eager in zip(
        by_layer(compiled, *inputs(torch.bfloat16)), by_layer(layer, *inputs(torch.bfloat16)), strict=True
    ):
        torch.testing.assert_close(own, eager)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_layers_in_bfloat16(bits: int):
    bnb = pytest.importorskip("bitsandbytes")
    base = (
        bnb.nn.Linear4bit(D, M, compute_dtype=torch.bfloat16, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(D, M, has_fp16_weights=False)
    )
    base.load_state_dict(nn.Linear(D, M).bfloat16().state_dict(), strict=False)
    layer = TruncatedLoRALinear(base.bfloat16().to("cpu"), rank=8, compute_dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    x, g = inputs(torch.bfloat16)
    own = by_layer(layer, x, g)
    assert own[0].dtype == torch.bfloat16
    assert max(errors(own[2:], by_float64(layer, x, g)[2:])) < 1e-6


def test_add_lora_sets_it_for_every_layer():
    model = TinyTransformer().bfloat16()
    add_lora(model, rank=2, compute_dtype=torch.float32)
    assert {layer.compute_dtype for layer in lora_layers(model).values()} == {torch.float32}
    assert {layer.compute_dtype for layer in lora_layers(copy.deepcopy(model)).values()} == {torch.float32}


@pytest.mark.parametrize("compute_dtype", [torch.int8, torch.bool, "float32"])
def test_types_that_are_refused(compute_dtype: object):
    with pytest.raises(ValueError, match=re.escape(f"or None, but got {compute_dtype!r}")):
        TruncatedLoRALinear(nn.Linear(4, 4), rank=2, compute_dtype=compute_dtype)
