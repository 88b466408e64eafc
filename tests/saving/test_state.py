"""Adapter-only state: what is in it, round trips, and all that can be wrong with one."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lalora_lightning import (
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    load_peft_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
    trim_lora,
)
from tests.helpers.models import Attention, TinyTransformer


def fresh(rank: int = 4) -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer()
    add_lora(model, rank=rank, alpha=2.0 * rank)
    return model


def test_state_holds_adapters_ranks_and_head_only(adapted: TinyTransformer):
    layers = [f"blocks.{i}.{name}" for i in range(3) for name in ("query", "value")]
    expected = {f"{layer}.{key}" for layer in layers for key in ("lora_A", "lora_B", "rank_mask", "_extra_state")}
    assert set(lora_state_dict(adapted)) == expected | {"head.weight", "head.bias"}


def test_buffers_belong_to_the_state_since_training_changes_them():
    model = TinyTransformer()
    model.norm = nn.BatchNorm1d(8)
    add_lora(model, rank=2)
    state = lora_state_dict(model)
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= set(state)
    assert "norm.weight" not in state


def test_adapters_belong_to_the_state_also_where_they_are_frozen(adapted: TinyTransformer):
    adapted.blocks[0].query.lora_A.requires_grad_(False)
    assert "blocks.0.query.lora_A" in lora_state_dict(adapted)


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_round_trip_through_a_file(adapted: TinyTransformer, tmp_path: Path, form: str):
    allocator = RankAllocator(adapted, gamma=0.0, average_rank=2, gradual_budget=False)
    allocator.step()
    state = lora_state_dict(adapted)
    if form == "torch":
        torch.save(state, tmp_path / "adapter")
        state = torch.load(tmp_path / "adapter", weights_only=True)
    else:
        save_file(state, tmp_path / "adapter")
        state = load_file(tmp_path / "adapter")
    other = fresh()
    load_lora_state_dict(other, state)
    x = torch.randn(3, 4, 8)
    assert torch.equal(other(x), adapted(x))
    assert int(other.blocks[0].query.rank) == 2


def test_a_whole_model_with_a_bound_allocator_is_saved_by_safetensors(adapted: TinyTransformer, tmp_path: Path):
    RankAllocator(adapted)
    save_model(adapted, tmp_path / "model")
    other = fresh()
    load_model(other, tmp_path / "model")
    assert int(other.blocks[2].value.rank) == 1
    x = torch.randn(3, 4, 8)
    assert torch.equal(other(x), adapted(x))


def test_all_problems_are_listed_and_nothing_is_loaded(adapted: TinyTransformer):
    state = lora_state_dict(adapted)
    state["blocks.7.query.lora_A"] = state.pop("blocks.2.query.lora_A")
    state["head.bias"] = torch.zeros(3)
    state["blocks.0.value.lora_B"] = [1.0]
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Cannot load the adapter state") as error:
        load_lora_state_dict(model, state)
    for part in (
        "missing keys: blocks.2.query.lora_A",
        "unknown keys: blocks.7.query.lora_A",
        "expected head.bias to have the shape (2,) but got (3,)",
        "expected blocks.0.value.lora_B to be a tensor but got list",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_state_of_another_rank(adapted: TinyTransformer):
    with pytest.raises(ValueError, match=r"lora_A to have the shape \(2, 8\) but got \(4, 8\)"):
        load_lora_state_dict(fresh(rank=2), lora_state_dict(adapted))


@pytest.mark.parametrize("rank", [-1, 5])
def test_a_rank_out_of_range(adapted: TinyTransformer, rank: int):
    """States of version 0.1.0 have a rank instead of a mask."""
    state = {**lora_state_dict(adapted), "blocks.1.value.rank": torch.tensor(rank)}
    del state["blocks.1.value.rank_mask"]
    with pytest.raises(ValueError, match=rf"blocks\.1\.value\.rank to be in \[0, 4\] but got {rank}"):
        load_lora_state_dict(fresh(), state)


def test_a_model_without_layers_has_no_state(model: TinyTransformer):
    with pytest.raises(ValueError, match="call add_lora"):
        lora_state_dict(model)


def test_a_state_puts_its_layers_into_a_plain_model(adapted: TinyTransformer):
    adapted.blocks[1].query.set_rank(2)
    torch.manual_seed(0)
    plain = TinyTransformer()
    load_lora_state_dict(plain, lora_state_dict(adapted))
    x = torch.randn(3, 4, 8)
    assert torch.equal(plain(x), adapted(x))
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == {
        name: p.requires_grad for name, p in adapted.named_parameters()
    }
    # Trimmed, and with a scaling that alpha / rank does not give exactly.
    trim_lora(adapted)
    torch.manual_seed(0)
    plain = TinyTransformer()
    load_lora_state_dict(plain, lora_state_dict(adapted))
    assert torch.equal(plain(x), adapted(x))
    assert plain.blocks[1].query.max_rank == 2


def test_a_state_with_the_backbone_goes_into_a_plain_model(adapted: TinyTransformer):
    torch.manual_seed(7)
    plain = TinyTransformer()
    load_lora_state_dict(plain, adapted.state_dict())
    x = torch.randn(3, 4, 8)
    assert torch.equal(plain(x), adapted(x))


def test_a_state_of_fused_slices_goes_into_a_plain_model():
    def fused() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(6, 18)}), "head": nn.Linear(6, 2)})

    model, plain = fused(), fused()
    add_lora(model, rank=2)
    nn.init.normal_(model["attn"]["qkv"].lora_B)
    load_lora_state_dict(plain, lora_state_dict(model))
    assert plain["attn"]["qkv"].out_slices == ((0, 6), (12, 18))
    x = torch.randn(3, 6)
    assert torch.equal(plain["attn"]["qkv"](x), model["attn"]["qkv"](x))


def test_a_plain_model_that_does_not_fit_stays_as_it_was(adapted: TinyTransformer):
    state = lora_state_dict(adapted)
    plain = TinyTransformer(depth=2)
    with pytest.raises(ValueError, match=r"cannot adapt blocks\.2\.query: the model has no such module"):
        load_lora_state_dict(plain, state)
    with pytest.raises(ValueError, match=r"cannot adapt blocks\.2\.value: Expected out_slices to be .* in \[0, 6\]"):
        load_lora_state_dict(TinyTransformer(width=6), state)
    with pytest.raises(ValueError, match=r"expected head\.weight to have the shape \(3, 8\) but got \(2, 8\)"):
        load_lora_state_dict(wide := TinyTransformer(classes=3), state)
    assert not lora_layers(wide)
    assert all(p.requires_grad for p in wide.parameters())
    with pytest.raises(ValueError, match="as lora_state_dict returns it, but it holds nothing"):
        load_lora_state_dict(plain, {})
    with pytest.raises(ValueError, match="holds epoch, state_dict"):
        load_lora_state_dict(plain, {"epoch": 3, "state_dict": state})
    assert not lora_layers(plain)
    assert all(p.requires_grad for p in plain.parameters())


def test_a_state_of_another_scaling_or_of_other_slices_is_refused(adapted: TinyTransformer):
    torch.manual_seed(0)
    other = TinyTransformer()
    add_lora(other, rank=4, alpha=16.0)
    with pytest.raises(ValueError, match=r"scaling and output slices of blocks.0.query.*\[4.0, .*but got \[2.0, "):
        load_lora_state_dict(other, lora_state_dict(adapted))
    with pytest.raises(ValueError, match=r"an adapter with scaling 4.0 .* but got one with scaling 2.0"):
        other.load_state_dict(adapted.state_dict())
    layers = [TruncatedLoRALinear(nn.Linear(6, 18), 2, out_slices=[(0, 6), (i, i + 6)]) for i in (6, 12)]
    with pytest.raises(ValueError, match=r"output slices \[\(0.0, 6.0\), \(6.0, 12.0\)\] but got .*\(12.0, 18.0\)"):
        layers[0].load_state_dict(layers[1].state_dict())


def test_a_rank_out_of_range_is_refused_by_torchs_own_loading(adapted: TinyTransformer):
    state = {**adapted.state_dict(), "blocks.1.value.rank": torch.tensor(9)}
    del state["blocks.1.value.rank_mask"]
    with pytest.raises(ValueError, match=r"expected blocks\.1\.value\.rank to be in \[0, 4\] but got 9"):
        fresh().load_state_dict(state)


@pytest.mark.parametrize(
    "mask", [[-1.0, -1.0, -1.0, -1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 0.0], [1.0, float("nan"), 0.0, 0.0]]
)
def test_a_mask_that_no_layer_has(adapted: TinyTransformer, mask: list[float]):
    state = {**adapted.state_dict(), "blocks.1.value.rank_mask": torch.tensor(mask)}
    model = fresh()
    before = {key: value.clone() for key, value in lora_state_dict(model).items()}
    message = r"expected blocks\.1\.value\.rank_mask to fall from 1 to 0, as in \[1, 1, 0, 0\] for rank 2, but got"
    with pytest.raises(ValueError, match=message):
        load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in lora_state_dict(model).items())
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)


def test_a_whole_state_leaves_the_backbone_of_a_plain_model_frozen(adapted: TinyTransformer):
    plain = TinyTransformer()
    load_lora_state_dict(plain, adapted.state_dict())
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == {
        name: p.requires_grad for name, p in adapted.named_parameters()
    }


def test_a_model_without_a_head_gets_its_layers_too():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})

    model, plain = build(), build()
    add_lora(model, rank=2, modules_to_save=[])
    nn.init.normal_(model["value"].lora_B)
    load_lora_state_dict(plain, lora_state_dict(model))
    x = torch.randn(3, 8)
    assert torch.equal(plain["value"](x), model["value"](x))
    assert not plain["query"].base_layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_in_half_precision_is_loaded(adapted: TinyTransformer, dtype: torch.dtype):
    model = TinyTransformer()
    add_lora(model, rank=3)  # whose scaling, 16/3, is rounded
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in lora_state_dict(model).items()}
    load_lora_state_dict(model, state)
    model.load_state_dict(state, strict=False)
    assert model.blocks[0].query.scaling == 16 / 3
    plain = TinyTransformer()
    load_lora_state_dict(plain, state)
    assert plain.blocks[0].query.lora_A.dtype == torch.float32


def test_extra_state_of_other_modules_is_their_own():
    class Counter(nn.Linear):
        count = 0

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor([self.count])

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.count = int(state)

    def build() -> TinyTransformer:
        torch.manual_seed(0)
        model = TinyTransformer()
        model.head = Counter(8, 2)
        add_lora(model, rank=2)
        return model

    model, other = build(), build()
    model.head.count = 5
    load_lora_state_dict(other, lora_state_dict(model))
    assert other.head.count == 5


def test_a_state_is_loaded_whatever_the_default_device(adapted: TinyTransformer):
    state = lora_state_dict(adapted)
    model = fresh()
    with torch.device("meta"):
        model.load_state_dict(state, strict=False)
    x = torch.randn(3, 4, 8)
    assert torch.equal(model(x), adapted(x))


def test_loading_into_a_merged_model_is_refused_before_anything_is_loaded(adapted: TinyTransformer):
    state = adapted.state_dict()
    model = fresh()
    merge_lora(model)
    before = model.blocks[0].query.lora_B.clone()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.query to be unmerged when a state is loaded"):
        model.load_state_dict(state)
    assert torch.equal(model.blocks[0].query.lora_B, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_numbers_of_another_kind_are_refused(adapted: TinyTransformer, dtype: torch.dtype):
    state = lora_state_dict(adapted)
    state["blocks.0.query.lora_A"] = state["blocks.0.query.lora_A"].to(dtype)
    with pytest.raises(ValueError, match=r"lora_A to hold numbers like torch.float32 but got torch."):
        load_lora_state_dict(fresh(), state)


def test_a_state_of_a_module_around_the_model_goes_into_the_model_itself():
    base = TinyTransformer()
    adapted, plain, other = (copy.deepcopy(base) for _ in range(3))
    add_lora(adapted, rank=4)
    add_lora(other, rank=4)
    for layer in lora_layers(adapted).values():
        nn.init.normal_(layer.lora_B)
    state = lora_state_dict(nn.ModuleDict({"model": adapted}))
    assert all(key.startswith("model.") for key in state)
    x = torch.randn(2, 5, 8)
    for model in (plain, other):
        load_lora_state_dict(model, state)
        torch.testing.assert_close(model(x), adapted(x))


@pytest.mark.parametrize("first", ["adapt", "wrap"])
def test_activation_checkpointing_does_not_show(first: str, tmp_path: Path):
    model, plain = TinyTransformer(), TinyTransformer()
    for step in ("adapt", "wrap") if first == "adapt" else ("wrap", "adapt"):
        if step == "adapt":
            add_lora(model, rank=4)
        else:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Attention))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    assert list(lora_layers(model)) == [f"blocks.{i}.{name}" for i in range(3) for name in ("query", "value")]
    state = lora_state_dict(model)
    assert not any("wrapped" in key or "base_layer" in key for key in state)
    load_lora_state_dict(model, state)

    plain.load_state_dict({key.replace("base_layer.", ""): value for key, value in model.state_dict().items()}, False)
    x = torch.randn(2, 5, 8)
    save_peft_adapter(model, tmp_path / "adapter")
    load_peft_adapter(adapted := copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(adapted(x), model(x))
    load_lora_state_dict(plain, state)
    torch.testing.assert_close(plain(x), model(x))
    merge_lora(model, remove=True)
    assert not lora_layers(model)
    torch.testing.assert_close(plain(x), model(x))


def test_a_scaling_that_is_nearly_the_same_is_another_one(adapted: TinyTransformer):
    model = TinyTransformer()
    add_lora(model, rank=4, alpha=8.01)
    with pytest.raises(ValueError, match=r"expected scaling and output slices of blocks\.0\.query\._extra_state"):
        load_lora_state_dict(model, lora_state_dict(adapted))
    with pytest.raises(ValueError, match=r"Expected the state of an adapter with scaling 2\.0025"):
        model.load_state_dict(lora_state_dict(adapted), strict=False)


def test_a_refused_state_leaves_every_parameter_as_trainable_as_it_was(adapted: TinyTransformer):
    model = TinyTransformer()
    model.head.requires_grad_(False)
    model.blocks[0].key.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {**lora_state_dict(adapted), "blocks.0.key.weight": torch.zeros(8, 8), "nonsense": torch.zeros(1)}
    with pytest.raises(ValueError, match="unknown keys: nonsense"):
        load_lora_state_dict(model, state)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_the_state_of_a_model_with_a_block_in_two_places():
    def shared() -> TinyTransformer:
        model = TinyTransformer()
        model.blocks[2] = model.blocks[0]
        return model

    base = shared()
    model = shared()
    model.load_state_dict(base.state_dict())
    add_lora(model, rank=2)
    nn.init.normal_(model.blocks[2].query.lora_B)
    load_lora_state_dict(base, lora_state_dict(model))
    x = torch.randn(2, 5, 8)
    assert torch.equal(base(x), model(x))
    assert base.blocks[2] is base.blocks[0]


def test_adapters_without_ranks_are_loaded_with_one_warning(adapted: TinyTransformer, recwarn: pytest.WarningsRecorder):
    """A checkpoint of trainable parameters only, as people write it by hand."""
    trainable = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    model = fresh()
    for layer in lora_layers(model).values():
        layer.set_rank(2)
    model.load_state_dict(trainable, strict=False)
    (warning,) = [w for w in recwarn if "La-LoRA" in str(w.message)]
    assert "adapters without ranks (blocks.0.query.rank_mask is the first that is missing)" in str(warning.message)
    assert {int(layer.rank) for layer in lora_layers(model).values()} == {2}
    with pytest.raises(ValueError, match=r"missing keys: blocks\.0\.query\.rank_mask"):
        load_lora_state_dict(model, trainable)
    # With the buffers, nothing is missing.
    buffers = {name: b.clone() for name, b in adapted.named_buffers()}
    recwarn.clear()
    model.load_state_dict({**trainable, **buffers}, strict=False)
    assert not [w for w in recwarn if "La-LoRA" in str(w.message)]
    assert {int(layer.rank) for layer in lora_layers(model).values()} == {4}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_factors_that_are_not_finite_are_refused(adapted: TinyTransformer, value: float):
    """Also beyond the rank, where infinity times zero is NaN."""
    state = {key: entry.clone() for key, entry in lora_state_dict(adapted).items()}
    state["blocks.1.query.lora_A"][3] = value
    state["blocks.1.query.rank_mask"][2:] = 0
    with pytest.raises(ValueError, match=r"finite factors but blocks\.1\.query\.lora_A contain NaN or Inf"):
        load_lora_state_dict(TinyTransformer(), state)
