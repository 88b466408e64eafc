"""``TruncatedLoRALinear.weight``, which is computed when it is used."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers
from lalora_lightning.layers.adapted_weight import AdaptedWeight

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def adapted(base: nn.Module | None = None, **settings: Any) -> TruncatedLoRALinear:
    torch.manual_seed(0)
    layer = TruncatedLoRALinear(base or nn.Linear(6, 8).requires_grad_(False), rank=3, alpha=6.0, **settings)
    nn.init.normal_(layer.lora_B)
    layer.set_rank(2)
    return layer


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[TruncatedLoRALinear]:
    """Layers whose increment was computed, once for each time."""
    layers = []
    increment = TruncatedLoRALinear.increment

    def counted(layer: TruncatedLoRALinear) -> Tensor:
        layers.append(layer)
        return increment(layer)

    monkeypatch.setattr(TruncatedLoRALinear, "increment", counted)
    return layers


class ProductOfItsOwn(torch.autograd.Function):
    """As fused kernels do it: autograd only sees what goes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: F.linear(X.to(w.dtype), w),
    "transposed": lambda w: w.T @ X.new_ones(len(w), 2, dtype=w.dtype),
    "views": lambda w: w.chunk(2)[1] * w[0],
    "autograd function": lambda w: ProductOfItsOwn.apply(X.to(w.dtype), w),
    "cast": lambda w: w.double().square().float(),
    "data": lambda w: w + w.data,
}

BASES: dict[str, Callable[[], TruncatedLoRALinear]] = {
    "plain": adapted,
    "trainable": lambda: adapted(nn.Linear(6, 8)),
    "slices": lambda: adapted(out_slices=[(0, 3), (5, 8)]),
    "initial factors": lambda: adapted(init="pissa"),
    "frozen A": lambda: adapted(freeze_A=True),
    "float64": lambda: adapted(nn.Linear(6, 8).double(), dtype=torch.float64),
    "bfloat16": lambda: adapted(nn.Linear(6, 8).bfloat16()),
    "Conv1D": lambda: adapted(Conv1D(8, 6)),
    "weight norm": lambda: adapted(parametrizations.weight_norm(nn.Linear(6, 8))),
}


def plain_weight(layer: TruncatedLoRALinear) -> Tensor:
    """The adapted weight in plain torch, with gradients."""
    weight = layer.base_layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.base_layer.weight
    parts = zip(
        layer.out_slices,
        layer.split(layer.lora_A, layer.lora_B),
        [(0, 0)] * 2 if layer.start_A is None else layer.split(layer.start_A, layer.start_B),
        strict=False,
    )
    increment = torch.zeros(weight.shape, dtype=layer.lora_A.dtype)
    for (start, stop), (A, B), (start_A, start_B) in parts:
        increment[start:stop] = B[:, :2] @ A[:2]
        if layer.start_A is not None:
            increment[start:stop] -= start_B[:, :2] @ start_A[:2]
    return (weight.to(increment.dtype) + layer.scaling * increment).to(weight.dtype)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("use", USES)
def test_values_and_gradients_are_those_of_plain_torch(base: str, use: str):
    layer = BASES[base]()
    assert type(layer.weight) is AdaptedWeight
    parameters = [p for name, p in layer.named_parameters() if p.requires_grad and not name.endswith("bias")]
    outs = [USES[use](weight) for weight in (layer.weight, plain_weight(layer))]
    close = {"rtol": 0.01, "atol": 0.02} if base == "bfloat16" else {}
    torch.testing.assert_close(outs[0], outs[1], **close)
    grads = [torch.autograd.grad(out.float().square().sum(), parameters) for out in outs]
    for own, other in zip(*grads, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max(), **close)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("with_grad", [True, False])
def test_shape_type_and_device_take_no_computation(base: str, with_grad: bool, computed: list):
    layer = BASES[base]()
    with torch.set_grad_enabled(with_grad):
        weight, plain = layer.weight, plain_weight(layer)
    for attribute in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda"):
        assert getattr(weight, attribute) == getattr(plain, attribute)
    for method in ("size", "numel", "dim", "element_size", "is_floating_point", "__len__", "stride", "is_contiguous"):
        assert getattr(weight, method)() == getattr(plain, method)()
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert not computed


def test_it_is_computed_once(computed: list):
    layer = adapted()
    weight = layer.weight
    F.linear(X.clone().requires_grad_(), weight).square().sum().backward()
    weight.sum(), weight.T, weight.numpy(force=True)
    assert computed == [layer]


READS: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.bfloat16),
    "equal": lambda w: torch.equal(w, w),
    "iteration": lambda w: list(w),
    "stack": lambda w: torch.stack([w, w]),
    "foreach": lambda w: torch._foreach_norm([w])[0],
    "numpy": lambda w: w.numpy(),
    "asarray": lambda w: np.asarray(w),
    "dlpack": lambda w: torch.from_dlpack(w),
    "dlpack of numpy": lambda w: np.from_dlpack(w),
    "tolist": lambda w: w.tolist(),
    "item": lambda w: w[0, 0].item(),
    "repr": lambda w: repr(w),
    "deepcopy": lambda w: copy.deepcopy(w),
    "copy": lambda w: copy.copy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "save": lambda w: saved_and_loaded(w),
    "storage": lambda w: w.untyped_storage().tolist(),
    "memory": lambda w: w.data_ptr() != 0,
    "parameter": lambda w: nn.Parameter(w.data),
    "copied into": lambda w: torch.zeros_like(w).copy_(w),
    "compiled": lambda w: torch.compile(F.linear, backend="aot_eager")(X, w),
    "vmap": lambda w: vmap(lambda x: w @ x)(X),
}


def saved_and_loaded(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("read", READS)
def test_everything_reads_it_as_a_plain_tensor(read: str):
    layer = adapted()
    with torch.no_grad():
        own, plain = READS[read](layer.weight), READS[read](layer.adapted_weight())
    assert type(own) is type(plain)
    if isinstance(own, str):
        assert own == plain
    else:
        torch.testing.assert_close(own, plain, rtol=0, atol=0)


def test_memory_that_is_not_there_is_not_read():
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        Tensor.data_ptr(adapted().weight)


def test_second_derivatives():
    layer = adapted(dtype=torch.float64)
    grads = []
    for weight in (layer.weight, plain_weight(layer)):
        first = torch.autograd.grad(weight.pow(3).sum(), [layer.lora_A, layer.lora_B], create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), [layer.lora_A, layer.lora_B]))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


def test_autocast_computes_the_gradients_in_float32():
    layer = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        grads = [
            torch.autograd.grad(w.sum(), [layer.lora_A, layer.lora_B]) for w in (layer.weight, plain_weight(layer))
        ]
    assert all(g.dtype == torch.float32 for g in grads[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(X, layer.weight).dtype == torch.bfloat16


def test_a_merged_layer_returns_its_base_weight():
    layer = adapted()
    layer.merge()
    assert layer.weight is layer.base_layer.weight


def test_a_rank_that_changes_before_the_weight_is_used_is_an_error():
    """The value would be that of the new rank, and the gradients those of the old one."""
    layer = adapted()
    weight = layer.weight
    layer.set_rank(1)
    with pytest.raises(RuntimeError, match=r"changed|modified"):
        weight.sum().backward()
    with torch.no_grad():
        weight = layer.weight
        layer.set_rank(2)
        assert torch.equal(weight, layer.weight)


def test_a_weight_that_outlives_its_factors_is_an_error():
    """It would be computed with the layer's own factors."""
    layer = adapted()
    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda: layer.weight
    others = {"layer.lora_A": torch.ones_like(layer.lora_A), "layer.lora_B": torch.ones_like(layer.lora_B)}
    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            weight = functional_call(model, others, ())
            with pytest.raises(RuntimeError, match="factors to stay the same"):
                weight.sum()
    model.forward = lambda: layer.weight.clone()
    increment = layer.scaling * layer.rank * torch.ones_like(layer.base_weight)
    torch.testing.assert_close(functional_call(model, others, ()), layer.base_weight + increment)


def test_a_weight_without_values():
    layer = adapted()
    layer.base_layer.to("meta")
    with pytest.raises(RuntimeError, match="it is offloaded or on the meta device; call the layer"):
        layer.weight.sum()
    layer.to("meta")
    assert F.linear(X.to("meta"), layer.weight).is_meta


class Reader(nn.Module):
    """Casts to the type of one projection, and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.query(x.to(self.query.weight.dtype))
        return self.head(x @ self.value.weight.T + self.value.bias)


@pytest.fixture
def reader() -> Reader:
    torch.manual_seed(0)
    model = Reader()
    add_lora(model, rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_models_that_read_it_are_copied_saved_traced_and_exported(reader: Reader):
    out = reader(X).detach()
    file = io.BytesIO()
    torch.save(reader, file)
    file.seek(0)
    with torch.no_grad():
        for model in (
            copy.deepcopy(reader),
            torch.load(file, weights_only=False),
            torch.jit.trace(reader, X),
            torch.export.export(reader, (X,)).module(),
            torch.compile(reader, backend="aot_eager", fullgraph=True),
        ):
            torch.testing.assert_close(model(X), out)
    with pytest.raises(TypeError, match=r"to be called under torch.fx but its weight was read; call merge_lora"):
        torch.fx.symbolic_trace(reader)


def test_models_that_read_it_under_torch_func(reader: Reader):
    parameters = {name: p.detach() for name, p in reader.named_parameters() if p.requires_grad}
    loss = lambda parameters, x: functional_call(reader, parameters, (x,)).square().sum()  # noqa: E731
    per_sample = vmap(grad(loss), (None, 0))(parameters, X)
    reader(X[1]).square().sum().backward()
    for name in parameters:
        own, other = per_sample[name][1], reader.get_parameter(name).grad
        torch.testing.assert_close(own / other.abs().max(), other / other.abs().max())


def test_t5_asks_for_the_type_of_a_weight_at_no_cost(computed: list):
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    add_lora(model, rank=2, target_modules=["wo"], modules_to_save=[])
    ids = torch.arange(4)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(lora_layers(model)) == 4
    assert not computed
