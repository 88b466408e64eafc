"""Starts and variants of the layers; hand-worked factorisations, and PEFT's own training as the oracle."""

import copy
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lalora_lightning import (
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
    trim_lora,
)
from lalora_lightning.initialization import FACTORIZATIONS, Init, milora, olora, pissa
from tests.helpers.models import TinyTransformer

INITS = get_args(Init)
X = torch.linspace(-1, 1, 4 * 5 * 8).view(4, 5, 8)
Y = torch.tensor([0, 1, 1, 0])


def train(model: nn.Module, steps: int = 5) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(init: str, **settings: object) -> TinyTransformer:
    model = TinyTransformer()
    add_lora(model, rank=4, alpha=8.0, init=init, **settings)
    train(model)
    return model.eval()


def test_pissa_takes_the_largest_singular_values():
    # Of diag(4, 1, -9) they are 9 and 4. With scaling 4 A and B share 9/4 and 4/4.
    A, B = pissa(torch.diag(torch.tensor([4.0, 1.0, -9.0])), rank=2, scaling=4.0)
    torch.testing.assert_close(4 * B @ A, torch.diag(torch.tensor([4.0, 0.0, -9.0])))
    torch.testing.assert_close(A.norm(dim=1), torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(B.norm(dim=0), torch.tensor([1.5, 1.0]))


def test_milora_takes_the_smallest_singular_values():
    A, B = milora(torch.diag(torch.tensor([4.0, 1.0, -9.0])), rank=2, scaling=0.25)
    torch.testing.assert_close(0.25 * B @ A, torch.diag(torch.tensor([4.0, 1.0, 0.0])))
    torch.testing.assert_close(A.norm(dim=1), torch.tensor([2.0, 4.0]))


def test_olora_takes_orthonormal_columns():
    weight = torch.randn(5, 3)
    A, B = olora(weight, rank=2, scaling=4.0)
    torch.testing.assert_close(B.T @ B, torch.eye(2))
    # What R leaves out is the third column's part along the third direction.
    torch.testing.assert_close((B @ A)[:, :2], weight[:, :2])


@pytest.mark.parametrize("init", INITS)
def test_the_adapted_layer_equals_its_base_at_every_rank(init):
    base = nn.Linear(6, 9)
    x = torch.randn(4, 6)
    layer = TruncatedLoRALinear(base, rank=3, alpha=6.0, init=init, out_slices=[(0, 3), (6, 9)])
    for rank in (1, 2, 3):
        layer.set_rank(rank)
        torch.testing.assert_close(layer(x), base(x))
    layer(x).square().sum().backward()
    # B learns at once in every case; A where B is not zero.
    assert layer.lora_B.grad.any()
    assert bool(layer.lora_A.grad.any()) == (init in FACTORIZATIONS)


def test_orthogonal_rows():
    layer = TruncatedLoRALinear(nn.Linear(6, 9), rank=3, init="orthogonal", out_slices=[(0, 3), (6, 9)])
    for A, _ in layer.split(layer.lora_A, layer.lora_B):
        torch.testing.assert_close(A @ A.T, torch.eye(3))


@pytest.mark.parametrize("init", FACTORIZATIONS)
def test_what_a_layer_with_a_start_computes(init):
    base = nn.Linear(6, 9)
    layer = TruncatedLoRALinear(base, rank=3, alpha=6.0, init=init)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn(3, 6))
        layer.lora_B.add_(0.1 * torch.randn(9, 3))
    layer.set_rank(2)
    x = torch.randn(4, 6)
    change = layer.lora_B[:, :2] @ layer.lora_A[:2] - layer.start_B[:, :2] @ layer.start_A[:2]
    expected = x @ (base.weight + 2.0 * change).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    A, B = layer.folded()
    torch.testing.assert_close(B @ A, 2.0 * change)
    layer.trim()
    assert layer.lora_A.shape == layer.start_A.shape == (2, 6)
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("peft_init", ["pissa", "olora"])
def test_training_goes_as_with_peft_s_own(peft_init):
    """PEFT takes the start off the base weight; here it is taken off beside it: the same function and gradients."""
    model = TinyTransformer()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=peft_init, modules_to_save=["head"]
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    add_lora(model, rank=4, alpha=8.0, init=peft_init)
    losses = train(model)
    assert losses == pytest.approx(train(peft_model), abs=1e-5)
    assert losses[-1] < losses[0]


def test_rank_stabilised_scaling_is_peft_s():
    model = TinyTransformer()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], use_rslora=True)
    peft_layer = get_peft_model(copy.deepcopy(model), config).base_model.model.blocks[0].query
    add_lora(model, rank=4, alpha=8.0, use_rslora=True)
    assert model.blocks[0].query.scaling == peft_layer.scaling["default"] == 4.0


@pytest.mark.parametrize("init", INITS)
def test_a_trained_model_leaves_and_arrives(init, tmp_path):
    model = trained(init)
    for layer in lora_layers(model).values():
        layer.set_rank(3)
    expected = model(X)
    state = lora_state_dict(model)
    torch.save(state, tmp_path / "adapter.pt")
    save_peft_adapter(model, tmp_path / "peft")

    torch.manual_seed(0)
    base = TinyTransformer()
    loaded = copy.deepcopy(base)
    loaded.blocks.load_state_dict(plain_blocks(model))
    base = copy.deepcopy(loaded)
    load_lora_state_dict(loaded, tmp_path / "adapter.pt")
    again = copy.deepcopy(base)
    add_lora(again, rank=4, alpha=8.0, init=init)
    load_lora_state_dict(again, state)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    merged, trimmed = copy.deepcopy(model), copy.deepcopy(model)
    merge_lora(merged, remove=True)
    trim_lora(trimmed)
    for other in (loaded.eval(), again.eval(), peft_model, merged, trimmed):
        torch.testing.assert_close(other(X), expected, rtol=1e-5, atol=1e-6)
    assert not lora_layers(merged)


def plain_blocks(model: TinyTransformer) -> dict[str, torch.Tensor]:
    state = {key.replace("base_layer.", ""): value for key, value in model.blocks.state_dict().items()}
    return {key: value for key, value in state.items() if key.rpartition(".")[2] in ("weight", "bias")}


def test_frozen_a_stays_and_its_input_is_not_kept():
    model = TinyTransformer()
    print(add_lora(model, rank=4, freeze_A=True))
    before = {name: layer.lora_A.clone() for name, layer in lora_layers(model).items()}
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A, before[name])
        assert layer.lora_B.any()
    # A random A that is not trained has to travel all the same.
    assert "blocks.0.query.lora_A" in lora_state_dict(model)

    def kept(freeze_A: bool) -> int:
        layer = TruncatedLoRALinear(nn.Linear(64, 64).requires_grad_(False), rank=2, freeze_A=freeze_A)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), lambda t: t):
            layer(torch.randn(100, 64))
        return max(sizes)

    assert kept(False) == 100 * 64
    assert kept(True) == 100 * 2


@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"freeze_A": True}, {"use_rslora": True}])
def test_variants_go_with_adaptive_ranks(settings):
    model = TinyTransformer()
    expected = model(X)
    add_lora(model, rank=4, **settings)
    allocator = RankAllocator(model, gamma=50.0)
    torch.testing.assert_close(model.eval()(X), expected)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        allocator.step()
    assert allocator.ranks.sum() > 3


def test_a_pattern_fixes_maximum_ranks():
    model = TinyTransformer()
    summary = add_lora(model, rank=4, alpha=8.0, rank_pattern={"blocks.1": 2, "value": 3})
    ranks = {name: layer.max_rank for name, layer in lora_layers(model).items()}
    # The first part that a name holds counts.
    assert ranks == {
        "blocks.0.query": 4,
        "blocks.0.value": 3,
        "blocks.1.query": 2,
        "blocks.1.value": 2,
        "blocks.2.query": 4,
        "blocks.2.value": 3,
    }
    assert {layer.scaling for layer in lora_layers(model).values()} == {2.0}
    assert summary.adapter_parameters == 16 * sum(ranks.values())
    with pytest.raises(ValueError, match=r"fixed_ranks=True"):
        RankAllocator(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"block": 2}}, r"parts of the names of adapted projections but block is in none of"),
        (
            {"rank_pattern": {"blocks.1": 9}},
            r"Cannot adapt blocks\.1\.query.* to be in \[1, 8\].* but got 9",
        ),
        ({"rank_pattern": {"blocks.1": 2.5}}, r"Cannot adapt blocks\.1\.query.* an integer .*but got 2\.5"),
        ({"init": "svd"}, r"Cannot adapt .*Expected init to be one of .* but got 'svd'"),
    ],
)
def test_wrong_settings_leave_the_model_alone(settings, message):
    model = TinyTransformer()
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank=4, **settings)
    assert not lora_layers(model)


def test_a_state_with_a_start_does_not_fit_a_model_without():
    model = TinyTransformer()
    add_lora(model, rank=4, alpha=8.0)
    with pytest.raises(ValueError, match=r"unknown keys: blocks\.0\.query\.start_A"):
        load_lora_state_dict(model, lora_state_dict(trained("pissa")))


def test_a_reset_after_loading_a_start_gives_the_base_again():
    model = TinyTransformer()
    base = copy.deepcopy(model.blocks)
    load_lora_state_dict(model, lora_state_dict(trained("pissa")))
    for layer in lora_layers(model).values():
        layer.reset_parameters()
    for block, plain in zip(model.blocks, base, strict=True):
        torch.testing.assert_close(block(X), plain(X))


def test_a_pattern_starts_from_the_singular_values_of_its_own_rank():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    settings = {"target_modules": ["a"], "modules_to_save": [], "init": "milora"}
    add_lora(model, rank=2, alpha=2.0, rank_pattern={"a": 1}, **settings)
    torch.testing.assert_close(model["a"].start_B @ model["a"].start_A, torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])))
    assert model["a"].scaling == 1.0


def test_a_pattern_may_be_below_a_rank_that_a_narrow_layer_cannot_have():
    model = nn.ModuleDict({"wide": nn.Linear(8, 8), "narrow": nn.Linear(8, 2)})
    add_lora(model, rank=4, target_modules=["wide", "narrow"], modules_to_save=[], rank_pattern={"narrow": 2})
    assert model["narrow"].max_rank == 2


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_a_weight_without_enough_rank_is_no_start(init):
    base = nn.Linear(6, 6)
    nn.init.zeros_(base.weight)
    with pytest.raises(ValueError, match=r"Expected a weight of rank 2 or more .* never learns"):
        TruncatedLoRALinear(base, rank=2, init=init)


def test_a_start_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = TinyTransformer()
    with pytest.raises(ValueError, match=r"init='pissa' .*meta device"):
        add_lora(model, rank=2, init="pissa")


def test_the_summary_counts_what_is_trained():
    model = TinyTransformer()
    summary = add_lora(model, rank=4, freeze_A=True)
    assert summary.adapter_parameters == 6 * 4 * 8
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.trainable_share == trainable / sum(p.numel() for p in model.parameters())


def test_an_increment_is_multiplied_out_in_float32_under_autocast():
    layer = TruncatedLoRALinear(nn.Linear(64, 64), rank=8)
    nn.init.normal_(layer.lora_B)
    expected = layer.increment()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.increment(), expected)
