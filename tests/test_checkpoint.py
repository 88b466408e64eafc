"""Adapter-only state: what is in it, round trips, and all that can be wrong with one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from lalora_lightning import RankAllocator, add_lora, load_lora_state_dict, lora_state_dict
from tests.conftest import TinyTransformer


def fresh(rank: int = 4) -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer()
    add_lora(model, rank=rank, alpha=2.0 * rank)
    return model


def test_state_holds_adapters_ranks_and_head_only(adapted: TinyTransformer):
    layers = [f"blocks.{i}.{name}" for i in range(3) for name in ("query", "value")]
    expected = {f"{layer}.{key}" for layer in layers for key in ("lora_A", "lora_B", "rank")}
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


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range(adapted: TinyTransformer, rank: int):
    state = {**lora_state_dict(adapted), "blocks.1.value.rank": torch.tensor(rank)}
    with pytest.raises(ValueError, match=rf"blocks\.1\.value\.rank to be in \[1, 4\] but got {rank}"):
        load_lora_state_dict(fresh(), state)


def test_a_model_without_layers(model: TinyTransformer):
    with pytest.raises(ValueError, match="call add_lora"):
        lora_state_dict(model)
    with pytest.raises(ValueError, match="call add_lora"):
        load_lora_state_dict(model, {})
