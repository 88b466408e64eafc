"""TruncatedLoRALinear against slicing in plain torch and against PEFT's own layer."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lalora_lightning import TruncatedLoRALinear


def make_layer(
    d: int = 6,
    m: int = 9,
    rank: int = 4,
    in_force: int = 2,
    out_slices: list[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    base: type[nn.Module] = nn.Linear,
    **kwargs: object,
) -> TruncatedLoRALinear:
    base_layer = (nn.Linear(d, m) if base is nn.Linear else Conv1D(m, d)).to(dtype).requires_grad_(False)
    layer = TruncatedLoRALinear(base_layer, rank, alpha=2.0 * rank, out_slices=out_slices, **kwargs)
    nn.init.normal_(layer.lora_B)
    layer.set_rank(in_force)
    return layer


def by_slicing(layer: TruncatedLoRALinear, x: Tensor, lora_x: Tensor | None = None) -> Tensor:
    """The layer's definition, written with slices of the parameters."""
    k, r = int(layer.rank), layer.max_rank
    out = F.linear(x, layer.base_weight, layer.bias)
    columns, start_B = [], 0
    for i, (start, stop) in enumerate(layer.out_slices):
        A = layer.lora_A[i * r : i * r + k]
        B = layer.lora_B[start_B : start_B + stop - start, :k]
        start_B += stop - start
        increment = layer.scaling * (x if lora_x is None else lora_x) @ A.T @ B.T
        columns.append(F.pad(increment, (start, layer.out_features - stop)))
    return out + sum(columns)


SLICES = [None, [(0, 3), (6, 9)], [(1, 5), (5, 9)], [(2, 6)]]


@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
@pytest.mark.parametrize("out_slices", SLICES)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_mask_equals_slicing_in_output_and_gradients(
    base: type[nn.Module], out_slices: list[tuple[int, int]] | None, shape: tuple[int, ...]
):
    rank = 3
    layer = make_layer(base=base, rank=rank, out_slices=out_slices)
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 9)
    wanted_inputs = (x, layer.lora_A, layer.lora_B)

    expected = by_slicing(layer, x)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), wanted_inputs)
    out = layer(x)
    gradients = torch.autograd.grad((out * weights).sum(), wanted_inputs)

    torch.testing.assert_close(out, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)
    # The components beyond the rank in force get no gradient at all.
    assert not gradients[1].view(-1, rank, 6)[:, 2:].any()
    assert not gradients[2][:, 2:].any()


@given(
    d=st.integers(1, 20),
    m=st.integers(1, 20),
    n=st.integers(0, 7),
    rank=st.integers(1, 20),
    in_force=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_mask_equals_slicing_for_all_shapes(d: int, m: int, n: int, rank: int, in_force: int, seed: int):
    torch.manual_seed(seed)
    rank = min(rank, d, m)
    layer = make_layer(d, m, rank, min(in_force, rank))
    x = torch.randn(n, d, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    out, expected = layer(x), by_slicing(layer, x)
    torch.testing.assert_close(out, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_forward_by_hand():
    layer = TruncatedLoRALinear(nn.Linear(2, 2), rank=2, alpha=4.0)
    with torch.no_grad():
        layer.base_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0], [10.0, 10.0]]))
        layer.lora_B.copy_(torch.tensor([[3.0, 100.0], [-1.0, 100.0]]))
    layer.set_rank(1)
    # W x + b = (1.5, 0.5); A_1 x = 3; scaling 4 / 2 = 2; so + 2 * (3, -1) * 3.
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [19.5, -5.5]
    assert layer.increment().tolist() == [[6.0, 12.0], [-2.0, -4.0]]


@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
@pytest.mark.parametrize("out_slices", SLICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fresh_layer_equals_base_bit_for_bit(
    base: type[nn.Module], out_slices: list[tuple[int, int]] | None, dtype: torch.dtype
):
    base_layer = (nn.Linear(6, 9) if base is nn.Linear else Conv1D(9, 6)).to(dtype)
    layer = TruncatedLoRALinear(base_layer, rank=3, out_slices=out_slices)
    x = torch.randn(4, 5, 6, dtype=dtype)
    assert torch.equal(layer(x), base_layer(x))


def test_full_rank_equals_peft():
    net = nn.Sequential(nn.Linear(12, 16))
    reference = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False), copy.deepcopy(net)
    )[0]
    layer = TruncatedLoRALinear(net[0].requires_grad_(False), rank=4, alpha=6.0)
    with torch.no_grad():
        layer.lora_A.copy_(reference.lora_A["default"].weight)
        layer.lora_B.copy_(reference.lora_B["default"].weight)
    x = torch.randn(3, 7, 12, requires_grad=True)
    theirs, ours = reference(x), layer(x)
    torch.testing.assert_close(ours, theirs)
    their_gradients = torch.autograd.grad(
        theirs.square().sum(), (x, reference.lora_A["default"].weight, reference.lora_B["default"].weight)
    )
    our_gradients = torch.autograd.grad(ours.square().sum(), (x, layer.lora_A, layer.lora_B))
    for gradient, wanted in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_start_is_kaiming_uniform_with_row_norms_near_one_over_root_three():
    layer = TruncatedLoRALinear(nn.Linear(4096, 64), rank=64)
    assert not layer.lora_B.any()
    assert layer.lora_A.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.01)
    assert int(layer.rank) == 64


@pytest.mark.parametrize("out_slices", [None, [(0, 3), (6, 9)]])
def test_unfrozen_base_and_double_precision_pass_gradcheck(out_slices: list[tuple[int, int]] | None):
    layer = make_layer(out_slices=out_slices, dtype=torch.float64, rank=3).double()
    layer.set_rank(3)
    layer.base_layer.requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_dropout_drops_only_the_adapters_input():
    layer = make_layer(dropout=0.5)
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = by_slicing(layer, x, dropped)
    torch.testing.assert_close(out, expected)
    inputs = (x, layer.lora_A, layer.lora_B)
    for gradient, wanted in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), by_slicing(layer, x))


def test_frozen_a_gets_no_gradient_and_the_rest_is_right():
    layer = make_layer()
    layer.lora_A.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad is None
    expected = torch.autograd.grad(by_slicing(layer, x).square().sum(), (x, layer.lora_B))
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(layer.lora_B.grad, expected[1])


def test_adapter_is_float32_over_a_bfloat16_base():
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    exact = by_slicing(copy.deepcopy(layer).float(), x.float())
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_its_type_and_keeps_gradients_in_the_parameters_type(dropout: float):
    layer = make_layer(dropout=dropout)
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        torch.manual_seed(1)
        lora_x = F.dropout(x.bfloat16(), dropout)
        expected = by_slicing(layer, x, lora_x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    inputs = (x, layer.lora_A, layer.lora_B)
    for gradient, wanted, parameter in zip(
        torch.autograd.grad(out.float().square().sum(), inputs),
        torch.autograd.grad(expected.float().square().sum(), inputs),
        inputs,
        strict=True,
    ):
        assert gradient.dtype == parameter.dtype
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


def test_autocast_leaves_a_fresh_layer_equal_to_its_base_bit_for_bit():
    base_layer = nn.Linear(6, 9)
    layer = TruncatedLoRALinear(base_layer, rank=3)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), base_layer(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool):
    layer = make_layer(dropout=0.2)
    x = torch.randn(4, 6, requires_grad=True)
    gradients = []
    for call in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in (x, layer.lora_A, layer.lora_B)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_layer_on_the_meta_device_can_be_materialised():
    layer = TruncatedLoRALinear(nn.Linear(6, 9, device="meta"), rank=2)
    assert layer.lora_A.is_meta
    assert layer.rank.is_meta
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 9)
    layer.to_empty(device="cpu")
    layer.base_layer.reset_parameters()
    layer.reset_parameters()
    assert int(layer.rank) == 2
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_state_dict_assigned_to_a_meta_layer_brings_its_rank_into_force():
    layer = make_layer()
    other = TruncatedLoRALinear(nn.Linear(6, 9, device="meta"), rank=4, alpha=8.0)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 6)
    assert torch.equal(other(x), layer(x))


def test_state_dict_holds_the_mask():
    layer = make_layer(in_force=3)
    state = layer.state_dict()
    assert set(state) == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B", "rank_mask", "_extra_state"}
    other = make_layer(in_force=1)
    other.load_state_dict(state)
    assert int(other.rank) == 3
    assert other.rank_mask.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
@pytest.mark.parametrize("out_slices", SLICES)
def test_merge_and_unmerge(dtype: torch.dtype, base: type[nn.Module], out_slices: list[tuple[int, int]] | None):
    layer = make_layer(dtype=dtype, base=base, out_slices=out_slices, rank=3)
    before = layer.base_weight.clone()
    effective = layer.weight
    expected = by_slicing(layer.float(), torch.eye(6)).T - layer.bias[:, None]
    layer.base_layer.to(dtype)

    layer.merge()
    assert torch.equal(layer.base_weight, effective)
    torch.testing.assert_close(layer.base_weight.float(), expected, rtol=0.02, atol=0.02)
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))

    layer.unmerge()
    assert torch.equal(layer.base_weight, before)


def test_merge_twice_unmerge_twice_and_saving_while_merged_are_refused():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        layer.state_dict()
    layer.unmerge()
    layer.state_dict()


def test_merge_that_overflows_is_refused_and_changes_nothing():
    layer = make_layer(dtype=torch.float16)
    nn.init.constant_(layer.lora_B, 1e6)
    before = layer.base_weight.clone()
    with pytest.raises(ValueError, match=r"finite in torch.float16"):
        layer.merge()
    assert torch.equal(layer.base_weight, before)
    assert not layer.merged


@pytest.mark.parametrize("out_slices", SLICES)
def test_trim_keeps_outputs_and_trains_on(out_slices: list[tuple[int, int]] | None):
    layer = make_layer(out_slices=out_slices, rank=3, in_force=2)
    x = torch.randn(4, 6)
    expected = layer(x)
    parameters = sum(p.numel() for p in (layer.lora_A, layer.lora_B))
    layer.trim()
    torch.testing.assert_close(layer(x), expected)
    assert layer.max_rank == int(layer.rank) == 2
    assert sum(p.numel() for p in (layer.lora_A, layer.lora_B)) == parameters * 2 // 3
    layer(x).sum().backward()
    assert layer.lora_A.grad.any()


def test_weight_is_the_weight_in_effect_and_differentiable():
    layer = make_layer()
    x = torch.randn(4, 6)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    ],
)
def test_one_compiled_graph_over_rank_changes(backend: str):
    layer = make_layer(d=16, m=16, rank=8, in_force=8)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(5, 16)
    compiled(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for rank in (1, 3, 8, 2):
            layer.set_rank(rank)
            layer.zero_grad()
            out = compiled(x)
            out.square().sum().backward()
            torch.testing.assert_close(out, by_slicing(layer, x))
            (expected,) = torch.autograd.grad(by_slicing(layer, x).square().sum(), layer.lora_A)
            torch.testing.assert_close(layer.lora_A.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_rank_out_of_range(rank: int):
    with pytest.raises(ValueError, match=rf"Expected rank to be in \[1, 6\].*but got {rank}"):
        TruncatedLoRALinear(nn.Linear(6, 9), rank=rank)


def test_rank_is_limited_by_the_narrowest_slice():
    with pytest.raises(ValueError, match=r"in \[1, 2\]"):
        TruncatedLoRALinear(nn.Linear(6, 9), rank=3, out_slices=[(0, 2), (3, 9)])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alpha_out_of_range(alpha: float):
    with pytest.raises(ValueError, match="Expected alpha to be positive and finite"):
        TruncatedLoRALinear(nn.Linear(6, 9), alpha=alpha, rank=2)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(dropout: float):
    with pytest.raises(ValueError, match="Expected dropout"):
        TruncatedLoRALinear(nn.Linear(6, 9), dropout=dropout, rank=2)


@pytest.mark.parametrize("out_slices", [[(0, 10)], [(3, 3)], [(0, 4), (3, 9)], [(-1, 3)]])
def test_slices_out_of_range(out_slices: list[tuple[int, int]]):
    with pytest.raises(ValueError, match="Expected out_slices"):
        TruncatedLoRALinear(nn.Linear(6, 9), rank=1, out_slices=out_slices)


def test_set_rank_out_of_range():
    with pytest.raises(ValueError, match=r"in \[0, 4\] but got 5"):
        make_layer().set_rank(5)


def test_a_base_that_is_not_linear():
    with pytest.raises(TypeError, match=r"nn\.Linear, .* or transformers' Conv1D but got Conv2d"):
        TruncatedLoRALinear(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...], bias: bool):
    layer = TruncatedLoRALinear(nn.Linear(6, 9, bias=bias).requires_grad_(False), rank=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    out *= 0.5
    F.relu(out, inplace=True).sum().backward()
    (expected,) = torch.autograd.grad(F.relu(0.5 * by_slicing(layer, x)).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_inputs_that_are_not_contiguous():
    layer = make_layer()
    x = torch.randn(6, 3, 4).permute(2, 1, 0).requires_grad_()
    torch.testing.assert_close(layer(x), by_slicing(layer, x))
    torch.testing.assert_close(layer(x[:, :1].expand(4, 5, 6)), by_slicing(layer, x[:, :1].expand(4, 5, 6)))


def test_autocast_leaves_double_precision_alone():
    layer = make_layer(dtype=torch.float64).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64


def test_two_forward_passes_at_two_ranks_and_one_backward_pass():
    layer = make_layer()
    x = torch.randn(3, layer.in_features)
    outputs = []
    for rank in (4, 2):
        layer.set_rank(rank)
        outputs.append(layer(x).sum())
    sum(outputs).backward()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    for rank in (4, 2):
        (layer.scaling * x @ A[:rank].T @ B[:, :rank].T).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)


@pytest.mark.parametrize(
    "change", [lambda layer: layer.set_rank(2), lambda layer: layer.load_state_dict(make_layer().state_dict())]
)
def test_a_rank_set_in_inference_mode_can_be_trained(change: Callable):
    layer = make_layer()
    with torch.inference_mode():
        change(layer)
    layer(torch.randn(3, layer.in_features)).sum().backward()
    assert layer.lora_B.grad[:, :2].any()
    assert not layer.lora_B.grad[:, 2:].any()
