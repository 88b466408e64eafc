"""Base layers that have to be called, and transformations that an autograd function would hide from."""

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers, merge_lora, unmerge_lora
from tests.helpers.models import TinyTransformer

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class OwnForward(nn.Linear):
    """As Falcon's: the same product, written by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def weight_norm(linear: nn.Linear) -> nn.Linear:
    return parametrizations.weight_norm(linear)


def old_weight_norm(linear: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear)


def parametrized(linear: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(linear, "weight", Halved())
    return linear


def pruned(linear: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(linear, "weight", 0.5)


def own_forward(linear: nn.Linear) -> nn.Linear:
    own = OwnForward(6, 4)
    own.load_state_dict(linear.state_dict())
    return own


def instance_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: 3 * F.linear(x, linear.weight, linear.bias)
    return linear


def with_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, out: 2 * out)
    return linear


def with_pre_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return linear


KINDS = [weight_norm, old_weight_norm, parametrized, pruned, own_forward, instance_forward, with_hook, with_pre_hook]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
Kind = Callable[[nn.Linear], nn.Linear]


def adapted(base: nn.Module, **settings: object) -> TruncatedLoRALinear:
    layer = TruncatedLoRALinear(base, rank=3, alpha=6.0, **settings)
    nn.init.normal_(layer.lora_B)
    layer.set_rank(2)
    return layer


def expected(layer: TruncatedLoRALinear, x: Tensor) -> Tensor:
    """The base layer's own output and the first two components, by hand."""
    return layer.base_layer(x) + 2.0 * x @ layer.lora_A[:2].T @ layer.lora_B[:, :2].T


@every_kind
def test_a_base_layer_that_is_not_plain_is_called(kind: Kind):
    layer = adapted(kind(nn.Linear(6, 4)))
    x = X.clone().requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, expected(layer, x))
    inputs = [x, layer.lora_A, layer.lora_B]
    for own, other in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected(layer, x).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not own_forward], ids=lambda kind: kind.__name__)
def test_it_becomes_so_after_it_was_adapted(kind: Kind):
    layer = adapted(nn.Linear(6, 4))
    before = layer(X)
    kind(layer.base_layer)
    torch.testing.assert_close(layer(X), expected(layer, X))
    assert not torch.allclose(layer(X), before) or kind in (weight_norm, old_weight_norm)


@every_kind
def test_a_merge_that_would_be_ignored_is_refused(kind: Kind):
    layer = adapted(kind(nn.Linear(6, 4)))
    out = layer(X)
    if kind in (with_hook, with_pre_hook):
        # Its hooks act on the merged layer, too.
        layer.merge()
        assert kind is with_hook or not torch.allclose(layer(X), out)
        layer.unmerge()
    else:
        with pytest.raises(TypeError, match=r"computes with its own weight but got a .*; remove that first"):
            layer.merge()
    torch.testing.assert_close(layer(X), out)


def test_a_model_with_parametrized_projections_trains_and_merges_without_them(model: TinyTransformer):
    for block in model.blocks:
        parametrizations.weight_norm(block.query)
    x = torch.randn(2, 5, 8)
    out = model(x)
    add_lora(model, rank=2)
    assert len(lora_layers(model)) == 6
    torch.testing.assert_close(model(x), out)
    model(x).sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(model).values())
    with pytest.raises(TypeError, match="ParametrizedLinear"):
        merge_lora(model)
    assert not any(layer.merged for layer in lora_layers(model).values())
    for block in model.blocks:
        # torch makes a parameter of the weight only if it requires a gradient.
        block.query.base_layer.requires_grad_(True)
        parametrize.remove_parametrizations(block.query.base_layer, "weight")
    merge_lora(model)
    torch.testing.assert_close(model(x), out)
    unmerge_lora(model)


@pytest.mark.parametrize("out_slices", [None, [(0, 3), (5, 8)]])
@pytest.mark.parametrize("autocast", [False, True])
def test_called_and_fused_give_the_same(out_slices: list | None, autocast: bool):
    fused = adapted(nn.Linear(6, 8), out_slices=out_slices)
    called = copy.deepcopy(fused)
    called.base_layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a, b = fused(X), called(X)
    assert a.dtype == b.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(a, b, **({"rtol": 0.02, "atol": 0.05} if autocast else {}))


def test_dynamic_quantization_of_the_base_layer():
    layer = adapted(nn.Linear(6, 4)).eval()
    out = layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
    assert type(model[0].base_layer) is not nn.Linear
    torch.testing.assert_close(model(X), expected(model[0], X))
    torch.testing.assert_close(model(X), out, rtol=0.1, atol=0.1)


def test_training_mode_is_that_of_the_base_layer():
    assert not TruncatedLoRALinear(nn.Linear(6, 4).eval(), rank=2, dropout=0.5).training
    model = TinyTransformer().eval()
    add_lora(model, rank=2, dropout=0.5)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 8)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("base", [nn.Linear, OwnForward])
def test_transformations_of_torch_func(base: type[nn.Linear]):
    layer = adapted(base(6, 4))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, X)
    for i, x in enumerate(X):
        layer.zero_grad()
        expected(layer, x).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad)


def test_transformations_of_torch_func_in_a_compiled_function():
    torch._dynamo.reset()
    layer = adapted(nn.Linear(6, 4))
    compiled = torch.compile(lambda x: vmap(lambda row: layer(row))(x), backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected(layer, X))


def test_forward_mode_differentiation():
    layer = adapted(nn.Linear(6, 4))
    tangent = torch.randn_like(X)
    out, derivative = jvp(layer, (X,), (tangent,))
    torch.testing.assert_close(out, expected(layer, X))
    torch.testing.assert_close(derivative, expected(layer, tangent) - layer.bias)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(X, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, derivative)


@pytest.mark.parametrize("training", [True, False])
def test_tracing(training: bool):
    layer = adapted(nn.Linear(6, 4)).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, X)
    torch.testing.assert_close(traced(2 * X), expected(layer, 2 * X))
    graph = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(graph(2 * X), expected(layer, 2 * X))


@pytest.mark.parametrize("out_slices", [None, [(0, 3), (5, 8)]])
@pytest.mark.parametrize("base", [nn.Linear, OwnForward])
def test_torch_fx_calls_the_layer_as_a_whole(base: type[nn.Linear], out_slices: list | None):
    """As it does with nn.Linear; a graph follows later changes of the rank."""
    layer = adapted(base(6, 8), out_slices=out_slices)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.LayerNorm(6), layer))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    for rank in (2, 1):
        layer.set_rank(rank)
        torch.testing.assert_close(graph(X), layer(F.layer_norm(X, (6,))))


@pytest.mark.parametrize("settings", [{}, {"out_slices": [(0, 3), (5, 8)]}, {"dtype": torch.float64}])
def test_second_derivatives(settings: dict):
    """A gradient penalty, against plain autograd."""
    base = nn.Linear(6, 8, dtype=settings.get("dtype"))
    fused = adapted(base, **settings)
    called = copy.deepcopy(fused)
    called.base_layer.register_forward_hook(lambda *_: None)
    x = X.to(base.weight.dtype)
    grads = []
    for layer in (fused, called):
        inputs = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
        first.square().sum().backward()
        grads.append((first, inputs.grad, layer.lora_A.grad, layer.lora_B.grad, layer.base_layer.weight.grad))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


def test_second_derivatives_by_finite_differences():
    layer = adapted(nn.Linear(6, 4).double(), dtype=torch.float64)
    names = ("lora_A", "lora_B")
    factors = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(function, (X[0].double().requires_grad_(), *factors))


def test_second_derivatives_need_what_is_not_kept_with_a_frozen_a():
    layer = adapted(nn.Linear(6, 4).requires_grad_(False), freeze_A=True)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not kept, since lora_A is frozen"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_second_derivatives_with_respect_to_the_factors_alone():
    """The input needs no gradient, as in a first layer; MAML differentiates through a step of the factors."""
    layer = adapted(nn.Linear(6, 4).requires_grad_(False))
    factors = [layer.lora_A, layer.lora_B]
    grads = []
    for forward in (layer, lambda x: expected(layer, x)):
        first = torch.autograd.grad(forward(X).square().sum(), factors, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), factors))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


@pytest.mark.parametrize("inside", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_a_backward_pass_inside_or_outside_of_autocast(inside: tuple[bool, bool], freeze_A: bool):
    layer = adapted(nn.Linear(6, 4), freeze_A=freeze_A)
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside[0]):
        out = layer(x).float().square().sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside[1]):
        grad_x, grad_B = torch.autograd.grad(out, [x, layer.lora_B])
    plain_x, plain_B = torch.autograd.grad(expected(layer, x).square().sum(), [x, layer.lora_B])
    for own, other in ((grad_x, plain_x), (grad_B, plain_B)):
        assert own.dtype == torch.float32
        tolerance = 0.05 if inside[0] else 1e-5
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("saved", [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
def test_selective_activation_checkpointing(saved: object):
    layer = adapted(nn.Linear(6, 4))
    contexts = functools.partial(create_selective_checkpoint_contexts, [saved])
    grads = []
    for forward in (
        lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts),
        lambda x: expected(layer, x),
    ):
        x = X.clone().requires_grad_()
        grads.append(torch.autograd.grad(forward(x).square().sum(), [x, layer.lora_A, layer.lora_B]))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


def test_a_weight_that_is_only_stored_in_8_bits_cannot_be_merged():
    """As with layerwise casting: a hook converts the weight, and merging into it would round the adapter away."""
    base = nn.Linear(6, 4, bias=False).requires_grad_(False)
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
    layer = adapted(base)
    with pytest.raises(TypeError, match="computes with its own weight"):
        layer.merge()
    assert not layer.merged


def test_a_layer_with_several_outputs():
    linear = nn.Linear(6, 4)
    linear.forward = lambda x: (F.linear(x, linear.weight), linear.bias)
    with pytest.raises(TypeError, match="Expected Linear to return a tensor but got a tuple; leave the layer out"):
        adapted(linear)(X)


def test_a_complex_layer_is_refused():
    model = TinyTransformer()
    model.blocks[0].query = nn.Linear(8, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"Cannot adapt blocks\.0\.query\. Expected a weight of real numbers"):
        add_lora(model, rank=2)
    assert not lora_layers(model)
