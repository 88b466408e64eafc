"""combine_lora: the weighted sum of adapters, compared with sums of weights by hand."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lalora_lightning import (
    add_lora,
    combine_lora,
    condense_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
)
from tests.helpers import families
from tests.helpers.families import run
from tests.helpers.models import TinyTransformer


def trained(model: nn.Module, seed: int, rank: int, **settings: object) -> nn.Module:
    """A copy with adapters and a head that are not those of the base model, at different ranks."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    add_lora(model, rank=rank, **settings)
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.2)
        layer.set_rank(1 + i % rank)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model


def summed_by_hand(base: nn.Module, models: list[nn.Module], weights: list[float]) -> nn.Module:
    """The base model with the weighted sum of the increments, and with the weighted mean of the heads."""
    total = copy.deepcopy(base)
    state = total.state_dict()
    for key, value in state.items():
        merged = []
        for model in models:
            model = copy.deepcopy(model)
            merge_lora(model, remove=True)
            merged.append(model.state_dict()[key])
        head = key.startswith("head")
        change = sum(weight * (m - value) for weight, m in zip(weights, merged, strict=True))
        value += change / sum(weights) if head else change
    return total


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0], [1.5, -0.5]])
def test_the_increments_add_up(tmp_path: Path, model: TinyTransformer, weights: list[float]):
    models = [trained(model, 1, rank=4), trained(model, 2, rank=2, target_modules=["query", "key"])]
    expected = summed_by_hand(model, models, weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # A file, and a folder of PEFT's format.
    torch.save(lora_state_dict(models[0]), tmp_path / "a.pt")
    save_peft_adapter(models[1], tmp_path / "b")
    summary = combine_lora(model, {tmp_path / "a.pt": weights[0], tmp_path / "b": weights[1]})
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x), expected(x))
    assert summary.projections == 9
    assert [p.requires_grad for p in model.head.parameters()] == [True, True]
    # Query has the ranks of both, and the backbone is as it was.
    ranks = [int(m.blocks[0].query.rank) for m in models]
    assert int(model.blocks[0].query.rank) == sum(ranks)
    state = model.state_dict()
    assert all(torch.equal(value, state.get(key, value)) for key, value in before.items() if not key.startswith("head"))


def test_states_in_memory_and_fused_projections():
    base = families.gpt2().eval()
    models = [trained(base, seed, rank=2, target_modules="all-linear") for seed in (1, 2)]
    merged = copy.deepcopy(base)
    for name, module in merged.named_modules():
        for model in models:
            layer = lora_layers(model).get(name)
            if layer is not None:
                module.weight.data += 0.5 * layer.increment().T
    combine_lora(base, [(lora_state_dict(model), 0.5) for model in models])
    torch.testing.assert_close(run(base), run(merged), atol=1e-5, rtol=1e-5)
    # The sum is condensed as any other adapter.
    assert condense_lora(base, average_rank=2).total_energy > 0.5


def test_it_is_pefts_own_concatenation(tmp_path: Path):
    """PEFT's ``add_weighted_adapter`` with ``combination_type="cat"``."""
    base = families.llama().eval()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]), "first")
    theirs.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], lora_alpha=6))
    for parameter in theirs.parameters():
        if parameter.shape[1:2] in ((2,), (3,)):
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    combine_lora(ours, {tmp_path / "first": 0.7, tmp_path / "second": 0.4})
    theirs.add_weighted_adapter(["first", "second"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    torch.testing.assert_close(run(ours), run(theirs.eval()), atol=1e-5, rtol=1e-5)
    assert (run(ours) - run(base)).abs().max() > 0.01


def test_more_components_than_a_weight_can_have(model: TinyTransformer):
    """Three adapters of rank 4 on weights of 8 x 8."""
    models = [trained(model, seed, rank=4) for seed in (1, 2, 3)]
    for other in models:
        for layer in lora_layers(other).values():
            layer.set_rank(4)
    expected = summed_by_hand(model, models, [1.0, 1.0, 1.0])
    combine_lora(model, [(lora_state_dict(other), 1.0) for other in models])
    assert {layer.max_rank for layer in lora_layers(model).values()} == {8}
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-5)


def test_one_after_another(model: TinyTransformer):
    """Another adapter on a model that has one merged."""
    first, second = (trained(model, seed, rank=2, modules_to_save=[]) for seed in (1, 2))
    expected = summed_by_hand(model, [first, second], [1.0, 1.0])
    for other in (first, second):
        combine_lora(model, [(lora_state_dict(other), 1.0)])
        merge_lora(model, remove=True)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x), expected(x))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, 0.0], [1 / 3, 1 / 3]])
def test_values_that_no_adapter_changed_stay_as_they_are(model: TinyTransformer, weights: list[float]):
    """A weighted mean would be rounded, undefined for weights that add up to 0, and NaN for an infinite value."""
    model.register_buffer("mask", torch.tensor([0.0, 0.1, -torch.inf]))
    states = [lora_state_dict(trained(model, seed, rank=2, modules_to_save=[])) for seed in (1, 2)]
    combine_lora(model, list(zip(states, weights, strict=True)))
    assert model.mask.tolist() == torch.tensor([0.0, 0.1, -torch.inf]).tolist()


def test_a_mean_in_half_precision_is_rounded_once(model: TinyTransformer):
    model = model.to(torch.bfloat16)
    states = [lora_state_dict(trained(model, seed, rank=2)) for seed in range(4)]
    combine_lora(model, [(state, 0.25) for state in states])
    mean = torch.stack([state["head.bias"].double() for state in states]).mean(0)
    assert torch.equal(model.head.bias, mean.to(torch.bfloat16))


def test_what_cannot_be_combined_leaves_the_model_as_it_was(tmp_path: Path, model: TinyTransformer):
    states = [lora_state_dict(trained(model, seed, rank=2)) for seed in (1, 2)]
    ranks_of_0 = {key: torch.zeros(2) for key in states[0] if key.endswith("rank_mask")}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for adapters, message in (
        ({}, "adapters with finite weights"),
        ([(states[0], float("nan"))], "adapters with finite weights"),
        ([(states[0], 1.0), (states[1], -1.0)], r"do not add up to 0, to average head\.bias"),
        ([({**states[0], **ranks_of_0}, 1.0)], "ranks above 0"),
        ([(states[0], 1.0), ({"nothing": torch.ones(1)}, 1.0)], "Expected a state of LoRA layers"),
        ([(lora_state_dict(trained(TinyTransformer(width=16), 1, rank=2)), 1.0)], "Cannot load"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_lora(model, adapters)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(FileNotFoundError):
        combine_lora(model, {tmp_path / "missing.pt": 1.0})
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="without LoRA layers"):
        combine_lora(model, [(states[0], 1.0)])
