"""condense_lora: against the singular value decomposition of whole increments, and PEFT's own forward pass."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lalora_lightning import (
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    condense_lora,
    load_lora_state_dict,
    load_peft_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
    trim_lora,
)
from tests.helpers.families import gpt2, llama, roberta, run, timm_vit
from tests.helpers.models import TinyTransformer

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Unequal(nn.Module):
    """Two layers of unequal cost: 8 + 8 and 8 + 24 parameters for each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(8, 8), nn.Linear(8, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.narrow(x)))


def with_values(layer: TruncatedLoRALinear, values: list[float]) -> None:
    """Give the increment of a layer these singular values."""
    A, B = torch.randn(layer.in_features, len(values)), torch.randn(layer.out_features, len(values))
    left, right = torch.linalg.qr(B).Q, torch.linalg.qr(A).Q
    mix = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    with torch.no_grad():
        layer.lora_A.copy_(mix @ right.T)
        layer.lora_B.copy_(left * torch.tensor(values) @ mix.T / layer.scaling)


def trained(model: nn.Module, **settings: object) -> nn.Module:
    """Adapt a model, with adapters that do something, and at several ranks."""
    add_lora(model, **{"rank": 4, "alpha": 8.0, **settings})
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.2)
        if i % 2:
            layer.set_rank(max(1, layer.max_rank - 1))
    return model.eval()


def increments(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.increment() for name, layer in lora_layers(model).items()}


def spectra(layer: TruncatedLoRALinear) -> Tensor:
    """Singular values of the whole increment of each slice."""
    increment = layer.increment().double()
    return torch.stack([torch.linalg.svdvals(increment[start:stop]) for start, stop in layer.out_slices])


def tiny(**settings: object) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    return lambda: (trained(TinyTransformer(), **settings), lambda model: model(X))


def family(build: Callable[[], nn.Module], **settings: object) -> Callable[[], tuple[nn.Module, Callable]]:
    return lambda: (trained(build(), **settings), run)


def averaged() -> tuple[nn.Module, Callable]:
    """Masks of an average weight the components."""
    model = trained(TinyTransformer())
    for layer in lora_layers(model).values():
        layer.rank_mask = torch.tensor([1.0, 0.75, 0.25, 0.0])
    return model, lambda model: model(X)


MODELS = {
    "transformer": tiny(),
    "all linear": tiny(target_modules="all-linear"),
    "frozen A": tiny(freeze_A=True),
    "rank pattern": tiny(rank_pattern={"blocks.0": 2, "blocks.2": 1}),
    "orthogonal": tiny(init="orthogonal"),
    "soft masks": averaged,
    "GPT-2": family(gpt2),
    "GPT-2, all linear": family(gpt2, target_modules="all-linear"),
    "timm": family(timm_vit),
    "timm, all linear": family(timm_vit, target_modules="all-linear"),
    "MultiheadAttention": lambda: (trained(SelfAttention()), lambda model: model(X)),
}


@pytest.mark.parametrize("group_by", ["module", "kind", "block", "parent", lambda name: name[-3:]])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_all_of_the_energy_is_the_same_function(build, group_by):
    model, call = build()
    expected, before = call(model), increments(model)
    needed = {name: int((spectra(layer) > 1e-6).sum(1).max()) for name, layer in lora_layers(model).items()}
    summary = condense_lora(model, energy=1.0, group_by=group_by)
    torch.testing.assert_close(call(model), expected, rtol=1e-6, atol=1e-6)
    for name, increment in increments(model).items():
        torch.testing.assert_close(increment, before[name], rtol=1e-6, atol=1e-6)
    assert summary.total_energy == pytest.approx(1.0)
    assert all(energy == pytest.approx(1.0) for energy in summary.energy.values())
    if group_by == "module":
        assert summary.ranks == needed
    # Not more than the layers need together.
    assert max(summary.ranks.values()) == max(needed.values())
    trim_lora(model)
    torch.testing.assert_close(call(model), expected, rtol=1e-6, atol=1e-6)
    trainable = sum(p.numel() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))
    assert trainable == summary.parameters


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_error_is_that_of_the_dropped_singular_values(build):
    """Eckart and Young: no increments of these ranks are closer."""
    model, _ = build()
    before = {name: (increment, spectra(lora_layers(model)[name])) for name, increment in increments(model).items()}
    summary = condense_lora(model, average_rank=1.5)
    if len(summary.ranks) > 1:
        assert len(set(summary.ranks.values())) > 1
    total = dropped = 0.0
    for name, layer in lora_layers(model).items():
        increment, values = before[name]
        rank = summary.ranks[name]
        assert int(layer.rank) == rank
        error = (layer.increment() - increment).square().sum().item()
        assert error == pytest.approx(values[:, rank:].square().sum().item(), rel=1e-4, abs=1e-9)
        energy = values.square().sum().item()
        assert summary.energy[name] == pytest.approx(1 - error / energy, abs=1e-5)
        total, dropped = total + energy, dropped + error
        # Components in falling order, and the factors balanced.
        for A, B in layer.split(layer.lora_A, layer.lora_B):
            norms = A[:rank].norm(dim=1), B[:, :rank].norm(dim=0)
            torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)
            assert (norms[0].diff() <= 1e-6).all()
    assert summary.total_energy == pytest.approx(1 - dropped / total, abs=1e-5)


def test_what_is_kept_is_worth_the_most_for_each_parameter():
    model = Unequal()
    add_lora(model, rank=4, alpha=4.0, target_modules=["narrow", "wide"])
    layers = lora_layers(model)
    # Worth 36, 16, 4, 1 at 16 parameters, and 100, 36, 16, 4 at 32 parameters: 2.25, 1, 1/4, 1/16; 3.1, 1.1, 1/2, 1/8.
    with_values(layers["narrow"], [6.0, 4.0, 2.0, 1.0])
    with_values(layers["wide"], [10.0, 6.0, 4.0, 2.0])
    # 79 are too few for the second component of the wide layer, and are enough for that of the narrow one.
    for parameters, ranks in [
        (48, [1, 1]), (79, [2, 1]), (80, [1, 2]), (95, [1, 2]), (96, [2, 2]), (128, [2, 3]), (144, [3, 3]),
        (191, [3, 4]), (192, [4, 4]), (1000, [4, 4]),
    ]:  # fmt: skip
        condensed = copy.deepcopy(model)
        summary = condense_lora(condensed, parameters=parameters)
        assert list(summary.ranks.values()) == ranks
        assert summary.parameters == 16 * ranks[0] + 32 * ranks[1]
        assert summary.parameters_before == 192
        by_rank = condense_lora(copy.deepcopy(model), parameters / 48)
        assert by_rank.ranks == summary.ranks
    # 213 in all; 100, 36, 36, 16 are 188.
    for energy, ranks in [(0.4, [1, 1]), (0.8, [1, 2]), (0.86, [2, 2]), (188.1 / 213, [2, 3]), (1.0, [4, 4])]:
        assert list(condense_lora(copy.deepcopy(model), energy=energy).ranks.values()) == ranks
    assert str(summary) == "192 of 192 adapter parameters kept, with 100.00% of the energy; ranks 4 to 4"


def test_layers_of_one_kind_share_a_rank():
    model = trained(TinyTransformer())
    energies = {name: spectra(layer)[0].square() for name, layer in lora_layers(model).items()}
    summary = condense_lora(model, average_rank=2, group_by="kind")
    assert sorted(summary.ranks) == ["blocks.*.query", "blocks.*.value"]
    for name, layer in lora_layers(model).items():
        assert int(layer.rank) == summary.ranks[re.sub(r"\d", "*", name)]
    together = {kind: sum(e for name, e in energies.items() if name[-5:] == kind[-5:]) for kind in summary.ranks}
    for kind, rank in summary.ranks.items():
        expected = together[kind][:rank].sum() / together[kind].sum()
        assert summary.energy[kind] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("features", [8, 4096])
def test_small_components_beside_large_ones_are_kept(features: int):
    """Rounding depends on the rank and not on the width of the layer."""
    layer = TruncatedLoRALinear(nn.Linear(features, 16, bias=False), rank=4, alpha=4.0)
    with_values(layer, [1.0, 1e-3, 1e-4, 0.0])
    model = nn.Sequential(layer)
    expected = layer.increment()
    summary = condense_lora(model, energy=1.0)
    assert summary.ranks == {"0": 3}
    torch.testing.assert_close(layer.increment(), expected, rtol=0, atol=1e-6 * float(expected.detach().norm()))
    assert spectra(layer)[0, 2].item() == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_data_types(dtype: torch.dtype):
    model = trained(TinyTransformer())
    for layer in lora_layers(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    before = increments(model)
    condense_lora(model, energy=1.0)
    for name, layer in lora_layers(model).items():
        assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
        error = (layer.increment() - before[name]).norm() / before[name].norm()
        # Only the new factors are rounded.
        assert error < 16 * torch.finfo(dtype).eps


def test_autocast_and_inference_mode_change_nothing():
    model = trained(TinyTransformer())
    other = copy.deepcopy(model)
    expected = condense_lora(model, average_rank=1.5)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert condense_lora(other, average_rank=1.5) == expected
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
    other(X).sum().backward()


def test_quantized_base_layers():
    bnb = pytest.importorskip("bitsandbytes")
    linear, base = nn.Linear(64, 96), bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(linear.state_dict(), strict=False)
    layer = TruncatedLoRALinear(base.to("cpu"), rank=4, alpha=8.0, out_slices=[(0, 32), (64, 96)])
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.set_rank(3)
    model, x = nn.Sequential(layer), torch.randn(5, 64)
    weight, expected = base.weight.clone(), model(x)
    assert condense_lora(model, energy=1.0).ranks == {"0": 3}
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_initial_factors_are_refused_and_the_way_out_works(init: str, tmp_path: Path):
    base = llama().eval()
    model = trained(copy.deepcopy(base), init=init)
    expected, before = run(model), lora_state_dict(model)
    with pytest.raises(ValueError, match=r"Cannot condense .*q_proj\. .* init='" + init) as error:
        condense_lora(model, average_rank=2)
    assert "save_peft_adapter" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(model).items())

    save_peft_adapter(model, tmp_path / "whole")
    folded = copy.deepcopy(base)
    load_peft_adapter(folded, tmp_path / "whole")
    torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)
    condense_lora(folded, energy=0.95)
    trim_lora(folded)
    save_peft_adapter(folded, tmp_path / "condensed")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "condensed").eval()
    torch.testing.assert_close(run(theirs), run(folded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2, roberta])
def test_an_adapter_that_peft_trained(build, tmp_path: Path):
    base = build().eval()
    targets = {"target_modules": "all-linear"} if build is llama else {}
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, init_lora_weights=False, **targets)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = run(theirs)
    theirs.save_pretrained(tmp_path / "wide")

    model = copy.deepcopy(base)
    load_peft_adapter(model, tmp_path / "wide")
    condensed = copy.deepcopy(model)
    summary = condense_lora(condensed, energy=1.0)
    torch.testing.assert_close(run(condensed), expected, rtol=1e-5, atol=1e-5)
    summary = condense_lora(model, average_rank=3)
    costs = sum(layer.lora_A.shape[1] + layer.lora_B.shape[0] for layer in lora_layers(model).values())
    assert 0.9 * 3 * costs < summary.parameters <= 3 * costs
    trim_lora(model)
    save_peft_adapter(model, tmp_path / "narrow")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "narrow").eval()
    torch.testing.assert_close(run(again), run(model), rtol=1e-5, atol=1e-5)
    ours = copy.deepcopy(base)
    load_peft_adapter(ours, tmp_path / "narrow")
    torch.testing.assert_close(run(ours.eval()), run(model), rtol=1e-5, atol=1e-5)


def losses(model: nn.Module, steps: int = 20) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    y, found = torch.tensor([0, 1, 1, 0]), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("freeze_A", [False, True])
def test_layers_without_an_increment_still_learn(freeze_A: bool):
    model = TinyTransformer()
    add_lora(model, rank=4, freeze_A=freeze_A)
    nn.init.normal_(model.blocks[1].query.lora_B, std=0.1)
    norms = {name: layer.lora_A.square().sum(1).mean() for name, layer in lora_layers(model).items()}
    summary = condense_lora(model, average_rank=2)
    assert sorted(summary.ranks.values()) == [1, 1, 1, 1, 1, 4]
    model.head.requires_grad_(False)
    for name, layer in lora_layers(model).items():
        if name != "blocks.1.query":
            assert not layer.lora_B.any()
            torch.testing.assert_close(layer.lora_A.square().sum(1), norms[name].expand(4))
    found = losses(model)
    assert found[-1] < 0.9 * found[0]
    for layer in lora_layers(model).values():
        assert layer.lora_B[:, 0].any()


def test_condensing_twice_is_condensing_once_to_the_smaller_size():
    once, twice = trained(TinyTransformer()), trained(TinyTransformer())
    twice.load_state_dict(once.state_dict())
    first, last = condense_lora(twice, average_rank=2), condense_lora(twice, average_rank=1.5)
    expected = condense_lora(once, average_rank=1.5)
    assert last.ranks == expected.ranks
    assert last.parameters_before == first.parameters
    for name, increment in increments(once).items():
        torch.testing.assert_close(increments(twice)[name], increment, rtol=1e-5, atol=1e-6)


def nan(model: nn.Module) -> None:
    model.blocks[2].value.lora_A.data[0, 0] = math.nan


def infinite_beyond_the_rank(model: nn.Module) -> None:
    model.blocks[2].value.set_rank(1)
    model.blocks[2].value.lora_B.data[0, 3] = math.inf


@pytest.mark.parametrize(
    ("prepare", "size", "error", "message"),
    [
        (merge_lora, {"average_rank": 2}, RuntimeError, "merged"),
        (nan, {"average_rank": 2}, ValueError, r"Cannot condense blocks\.2\.value\. Expected finite factors"),
        (infinite_beyond_the_rank, {"average_rank": 2}, ValueError, r"Cannot condense blocks\.2\.value"),
        (None, {}, ValueError, "got none of them"),
        (None, {"average_rank": 2, "energy": 0.9}, ValueError, "got average_rank and energy"),
        (None, {"average_rank": 0.5}, ValueError, "at least 1 but got 0.5"),
        (None, {"average_rank": 0, "min_rank": 0}, ValueError, "to be positive"),
        (None, {"average_rank": math.nan}, ValueError, "got nan"),
        (None, {"parameters": 95}, ValueError, "at least 96 parameters, rank 1 for every layer, but got 95"),
        (None, {"parameters": 15, "min_rank": 0}, ValueError, "at least 16 parameters, rank 1 for the smallest layer"),
        (None, {"average_rank": 0.1, "min_rank": 0}, ValueError, "at least 16 parameters, .* but got 10"),
        (None, {"energy": 0.0}, ValueError, r"energy to be in \(0, 1\] but got 0"),
        (None, {"energy": 1.01}, ValueError, r"energy to be in \(0, 1\]"),
        (None, {"energy": math.nan}, ValueError, r"energy to be in \(0, 1\]"),
        (None, {"average_rank": 2, "min_rank": 2}, ValueError, "min_rank to be 0 or 1"),
        (None, {"average_rank": 2, "group_by": "layer"}, ValueError, "group_by"),
    ],
)
def test_what_cannot_be_condensed_is_left_as_it_is(prepare, size, error, message):
    model = trained(TinyTransformer())
    if prepare is not None:
        prepare(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    masks = {name: layer.rank_mask for name, layer in lora_layers(model).items()}
    with pytest.raises(error, match=message):
        condense_lora(model, **size)
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())
    assert all(layer.rank_mask is masks[name] for name, layer in lora_layers(model).items())


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="call add_lora"):
        condense_lora(TinyTransformer(), average_rank=2)


def test_an_allocator_condenses_no_merged_model():
    model = trained(TinyTransformer())
    allocator = RankAllocator(model)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="merged"):
        allocator.condense(1.0)
    assert not allocator.condensed


def condensed_to_nothing() -> TinyTransformer:
    """Of six layers, one has two components, one has one, and the others have none."""
    model = TinyTransformer()
    add_lora(model, rank=4, alpha=4.0)
    layers = lora_layers(model)
    with_values(layers["blocks.0.query"], [2.0, 1.0])
    with_values(layers["blocks.2.value"], [3.0])
    return model


def test_layers_that_need_nothing_end_with_nothing(tmp_path: Path):
    torch.manual_seed(3)
    base = TinyTransformer()
    model = copy.deepcopy(base)
    add_lora(model, rank=4, alpha=4.0)
    for name, values in (("blocks.0.query", [2.0, 1.0, 0.5, 0.1]), ("blocks.2.value", [3.0, 1e-3, 1e-4, 1e-5])):
        with_values(lora_layers(model)[name], values)
    summary = condense_lora(model, parameters=3 * 16, min_rank=0)
    expected = model(X)
    kept = {"blocks.0.query": 2, "blocks.2.value": 1}
    assert {name: rank for name, rank in summary.ranks.items() if rank} == kept
    assert str(summary).endswith("ranks 0 to 2")
    assert summary.energy["blocks.1.query"] == 1.0

    # The state of the masks, loaded with and without layers.
    state = lora_state_dict(model)
    for other in (copy.deepcopy(base), trained(copy.deepcopy(base), alpha=4.0)):
        load_lora_state_dict(other, state)
        torch.testing.assert_close(other(X), expected)
        assert {n: int(layer.rank) for n, layer in lora_layers(other).items()} == summary.ranks

    # PEFT also gets the other layers of both kinds, as zeros: they have the same short names.
    save_peft_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(X), expected)
    adapted = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == summary.ranks.keys()
    ours = copy.deepcopy(base)
    load_peft_adapter(ours, tmp_path / "adapter")
    assert {n: int(layer.rank) for n, layer in lora_layers(ours).items()} == summary.ranks
    torch.testing.assert_close(ours(X), expected)

    trim_lora(model)
    assert {name: layer.max_rank for name, layer in lora_layers(model).items()} == kept
    assert type(model.blocks[1].query) is nn.Linear
    assert not model.blocks[1].query.weight.requires_grad
    torch.testing.assert_close(model(X), expected)
    trimmed = copy.deepcopy(base)
    load_lora_state_dict(trimmed, lora_state_dict(model))
    torch.testing.assert_close(trimmed(X), expected)
    merge_lora(model, remove=True)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("build", [TinyTransformer, gpt2, timm_vit, SelfAttention])
def test_a_model_whose_layers_all_end_at_nothing(build, tmp_path: Path):
    model = build().eval()
    call = (lambda model: model(X)) if build in (TinyTransformer, SelfAttention) else run
    names, expected = {name: type(module) for name, module in model.named_modules()}, call(model)
    base = copy.deepcopy(model)
    add_lora(model, rank=2)
    summary = condense_lora(model, average_rank=1, min_rank=0)
    assert set(summary.ranks.values()) == {0}
    assert summary.parameters == 0
    torch.testing.assert_close(call(model), expected)
    call(model).sum().backward()
    with pytest.raises(ValueError, match=r"rank 0"):
        save_peft_adapter(model, tmp_path)
    state = lora_state_dict(model)
    trim_lora(model)
    assert {name: type(module) for name, module in model.named_modules()} == names
    torch.testing.assert_close(call(model), expected)
    load_lora_state_dict(base, state)
    assert {int(layer.rank) for layer in lora_layers(base).values()} == {0}
    merge_lora(base, remove=True)
    torch.testing.assert_close(call(base), expected)


def test_a_layer_of_rank_0_by_itself():
    layer = TruncatedLoRALinear(nn.Linear(8, 8), rank=2)
    layer.set_rank(0)
    with pytest.raises(ValueError, match="use its base_layer"):
        trim_lora(layer)
    with pytest.raises(ValueError, match="removes such a layer"):
        layer.trim()


def test_a_shared_layer_of_rank_0_is_removed_everywhere():
    class Shared(TinyTransformer):
        def __init__(self) -> None:
            super().__init__(depth=2)
            self.blocks[1].query = self.blocks[0].query

    model = trained(Shared())
    model.blocks[0].query.set_rank(0)
    expected = model(X)
    trim_lora(model)
    assert model.blocks[0].query is model.blocks[1].query
    assert type(model.blocks[0].query) is nn.Linear
    torch.testing.assert_close(model(X), expected)
