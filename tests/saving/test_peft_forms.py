"""The uniform and the mixed form of an adapter: ranks, padding, layers of rank 0; over the families of models."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lalora_lightning import (
    RankAllocator,
    add_lora,
    condense_lora,
    load_peft_adapter,
    lora_layers,
    push_peft_adapter,
    save_peft_adapter,
    trim_lora,
)
from tests.helpers import families
from tests.helpers.families import run

FAMILIES = [
    families.roberta,
    families.bert,
    families.distilbert,
    families.deberta_v2,
    families.modernbert,
    families.t5,
    families.llama,
    families.llama_classifier,
    families.gpt2,
    families.vit,
    families.timm_vit,
]


def trained(build: Callable[[], nn.Module], condensed: bool = False, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A base model, and the same with adapters of ranks 1 to 4, and with a head, that do something."""
    torch.manual_seed(0)
    base = build().eval()
    model = copy.deepcopy(base)
    add_lora(model, rank=4, alpha=6.0, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if condensed:
        condense_lora(model, average_rank=1.5, min_rank=0)
    else:
        for i, layer in enumerate(lora_layers(model).values()):
            layer.set_rank(1 + i % 4)
    return base, model


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: int(layer.rank) for name, layer in lora_layers(model).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@torch.no_grad()
def difference(base: nn.Module, model: nn.Module, folder: Path) -> float:
    """Largest difference of the adapted model to what PEFT and load_peft_adapter read, of the largest output."""
    expected = run(model)
    assert (run(base) - expected).abs().max() > 1e-3 * expected.abs().max()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    ours = copy.deepcopy(base)
    load_peft_adapter(ours, folder)
    got = [run(theirs.base_model.model), run(ours)]
    return max(float((each - expected).abs().max() / expected.abs().max()) for each in got)


@pytest.mark.parametrize("condensed", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("build", FAMILIES)
def test_families(build: Callable[[], nn.Module], targets: str | None, condensed: bool, tmp_path: Path):
    base, model = trained(build, condensed, **({"target_modules": targets} if targets else {}))
    for uniform in (True, False):
        folder = tmp_path / str(uniform)
        save_peft_adapter(model, folder, uniform=uniform)
        assert difference(base, model, folder) <= 1e-6
        assert bool(config_of(folder)["rank_pattern"]) <= (not uniform)
    # Both forms are one adapter, and its ranks come back: those of all slices of a fused projection together.
    restored = []
    for uniform in (True, False):
        load_peft_adapter(again := copy.deepcopy(base), tmp_path / str(uniform))
        restored.append({name: rank for name, rank in ranks(again).items() if rank})
    slices = {name: len(layer.out_slices) for name, layer in lora_layers(model).items()}
    assert restored[0] == restored[1] == {name: slices[name] * rank for name, rank in ranks(model).items() if rank}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors(init: str, tmp_path: Path):
    base, model = trained(families.llama, init=init)
    for uniform in (True, False):
        save_peft_adapter(model, tmp_path / str(uniform), uniform=uniform)
        assert difference(base, model, tmp_path / str(uniform)) <= 2e-6
        assert config_of(tmp_path / str(uniform))["r"] == 8


def test_a_rank_to_pad_to(tmp_path: Path):
    base, model = trained(families.llama)
    save_peft_adapter(model, tmp_path, uniform=16)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})
    assert "| form | padded to rank 16 |" in (tmp_path / "README.md").read_text()
    assert {min(value.shape) for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {16}
    assert difference(base, model, tmp_path) <= 1e-6
    load_peft_adapter(base, tmp_path)
    assert ranks(base) == ranks(model)
    assert {layer.max_rank for layer in lora_layers(base).values()} == {4}


@pytest.mark.parametrize("uniform", [3, 1, 0, 16.0, "16", None])
def test_a_rank_below_the_highest_is_refused(uniform: Any, tmp_path: Path):
    _, model = trained(families.llama)
    with pytest.raises(ValueError, match=f"to be a rank of at least 4, the highest .* but got {uniform!r}"):
        save_peft_adapter(model, tmp_path / "adapter", uniform=uniform)
    with pytest.raises(ValueError, match="to be a rank of at least 4"):
        push_peft_adapter(model, "me/adapter", uniform=uniform)
    assert not (tmp_path / "adapter").exists()


def test_a_component_whose_b_is_zero_is_no_padding(tmp_path: Path):
    """A new component has a random A, and can learn."""
    base, model = trained(families.llama)
    for layer in lora_layers(model).values():
        layer.lora_B.data[:, layer.rank - 1 :] = 0
    save_peft_adapter(model, tmp_path)
    load_peft_adapter(base, tmp_path)
    assert ranks(base) == ranks(model)


@pytest.mark.parametrize(
    ("uniform", "targets", "padded"),
    [
        (True, ["q_proj", "v_proj"], {"model.layers.1.self_attn.v_proj": 0}),
        (False, ["0.self_attn.v_proj", "q_proj"], {}),
    ],
)
def test_layers_of_rank_0(uniform: bool, targets: list[str], padded: dict[str, int], tmp_path: Path):
    """In the uniform form, they are padded where that keeps the names short. Otherwise they are left out."""
    base, model = trained(families.llama, target_modules=["q_proj", "k_proj", "v_proj"])
    layers = lora_layers(model)
    for i in range(2):
        layers[f"model.layers.{i}.self_attn.k_proj"].set_rank(0)
    layers["model.layers.1.self_attn.v_proj"].set_rank(0)
    save_peft_adapter(model, tmp_path, uniform=uniform)
    assert difference(base, model, tmp_path) <= 1e-6
    config, tensors = config_of(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    load_peft_adapter(base, tmp_path)
    expected = {"model.layers.0.self_attn.q_proj": 1, "model.layers.0.self_attn.v_proj": 3}
    expected |= {"model.layers.1.self_attn.q_proj": 4, **padded}
    assert config["target_modules"] == targets
    assert ranks(base) == expected
    assert len(tensors) == 2 * len(expected)


@pytest.mark.parametrize("uniform", [True, False])
def test_layers_of_rank_0_in_blocks_of_which_only_some_are_adapted(uniform: bool, tmp_path: Path):
    """No name is short, so that the padding would be of no use."""
    base, model = trained(families.llama, target_modules=r"model\.layers\.1\.self_attn\.[qkv]_proj")
    lora_layers(model)["model.layers.1.self_attn.k_proj"].set_rank(0)
    save_peft_adapter(model, tmp_path, uniform=uniform)
    assert config_of(tmp_path)["target_modules"] == ["1.self_attn.q_proj", "1.self_attn.v_proj"]
    assert difference(base, model, tmp_path) <= 1e-6
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4


def test_an_adapter_that_is_zero_has_rank_0(tmp_path: Path):
    base, model = trained(families.llama)
    save_peft_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    zeros = {key: torch.zeros_like(value) if name in key else value for key, value in tensors.items()}
    save_file(zeros, tmp_path / "adapter_model.safetensors")
    load_peft_adapter(base, tmp_path)
    assert ranks(base) == {**ranks(model), name: 0}
    lora_layers(model)[name].set_rank(0)
    torch.testing.assert_close(run(base), run(model))
    # It can still learn.
    RankAllocator(base)
    assert set(ranks(base).values()) == {1}
    run(base).sum().backward()
    assert lora_layers(base)[name].lora_B.grad.abs().max() > 0


def test_nothing_but_rank_0(tmp_path: Path):
    _, model = trained(families.llama)
    for layer in lora_layers(model).values():
        layer.set_rank(0)
    with pytest.raises(ValueError, match="all of them have rank 0"):
        save_peft_adapter(model, tmp_path)


def test_both_forms_of_a_condensed_and_trimmed_model(tmp_path: Path):
    base, model = trained(families.llama, condensed=True, target_modules="all-linear")
    assert 0 in ranks(model).values()
    save_peft_adapter(model, tmp_path / "untrimmed")
    assert not [name for name in config_of(tmp_path / "untrimmed")["target_modules"] if "." in name]
    trim_lora(model)
    for uniform in (True, False):
        save_peft_adapter(model, tmp_path / str(uniform), uniform=uniform)
        assert difference(base, model, tmp_path / str(uniform)) <= 1e-6
    sizes = [
        sum(math.prod(value.shape) for value in load_file(tmp_path / form / "adapter_model.safetensors").values())
        for form in ("True", "False")
    ]
    assert (
        sizes[0] > sizes[1] == sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in lora_layers(model).values())
    )


def two_saved_adapters(folder: Path, other_rank: int, uniform: bool | int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return a base model and two adapted ones; their adapters are in the subfolders ``one`` and ``other``."""
    base, one = trained(families.llama)
    other = copy.deepcopy(one)
    for layer in lora_layers(other).values():
        layer.lora_B.data.mul_(-2)
        layer.set_rank(other_rank)
    save_peft_adapter(one, folder / "one", uniform=uniform)
    save_peft_adapter(other, folder / "other", uniform=uniform)
    return base, one, other


@pytest.mark.parametrize("uniform", [True, False])
def test_weighted_combinations_of_peft(uniform: bool, tmp_path: Path):
    base, one, other = two_saved_adapters(tmp_path, 2, uniform)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "other", adapter_name="other")
    theirs.add_weighted_adapter(["one", "other"], [0.7, 0.3], "both", combination_type="cat")
    theirs.set_adapter("both")
    with torch.no_grad():
        for weight, model in ((0.7, one), (0.3, other)):
            for name, layer in lora_layers(model).items():
                A, B = layer.folded()
                base.get_submodule(name).weight.add_(weight * B @ A)
        expected = run(base)
        assert (run(theirs.base_model.model) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.skipif(not hasattr(PreTrainedModel, "enable_peft_hotswap"), reason="needs a later transformers")
@pytest.mark.parametrize("rank", [4, 8])
def test_transformers_exchanges_adapters_that_are_padded_to_one_rank(rank: int, tmp_path: Path):
    base, one, other = two_saved_adapters(tmp_path, 1, rank)
    base.enable_peft_hotswap(target_rank=rank)
    for name, model, hotswap in (("one", one, False), ("other", other, True)):
        base.load_adapter(tmp_path / name, adapter_name="adapter", hotswap=hotswap)
        with torch.no_grad():
            expected = run(model)
            assert (run(base) - expected).abs().max() <= 1e-6 * expected.abs().max()
