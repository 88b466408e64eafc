"""Merging, unmerging, trimming and removing the adapters of a model."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers, merge_lora, trim_lora, unmerge_lora
from tests.helpers.families import roberta
from tests.helpers.models import TinyTransformer


def test_merge_unmerge_and_trim_a_model(adapted: TinyTransformer):
    x = torch.randn(5, 4, 8)
    adapted.blocks[1].query.set_rank(2)
    adapted.blocks[1].value.set_rank(1)
    expected = adapted(x)
    weights = [p.clone() for p in adapted.parameters()]

    merge_lora(adapted)
    torch.testing.assert_close(adapted(x), expected)
    unmerge_lora(adapted)
    assert all(torch.equal(p, before) for p, before in zip(adapted.parameters(), weights, strict=True))
    assert torch.equal(adapted(x), expected)

    trim_lora(adapted)
    torch.testing.assert_close(adapted(x), expected)
    assert [layer.max_rank for layer in lora_layers(adapted).values()] == [4, 4, 2, 1, 4, 4]


def test_removed_adapters_leave_a_model_that_saves_as_if_it_had_never_been_adapted(tmp_path: Path):
    model = roberta().eval()
    names = {name: type(module) for name, module in model.named_modules()}
    add_lora(model, rank=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    ids = torch.arange(12).view(2, 6) + 3
    expected = model(ids).logits
    merge_lora(model, remove=True)
    assert {name: type(module) for name, module in model.named_modules()} == names
    model.save_pretrained(tmp_path)
    loaded, problems = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values())
    torch.testing.assert_close(loaded.eval()(ids).logits, expected)


def test_a_layer_by_itself_is_not_removed():
    layer = TruncatedLoRALinear(nn.Linear(8, 8), rank=2)
    with pytest.raises(ValueError, match="it is one itself"):
        merge_lora(layer, remove=True)
    assert not layer.merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_cycles_of_merging_leave_the_weights_as_they_were(adapted: TinyTransformer, dtype: torch.dtype):
    for layer in lora_layers(adapted).values():
        layer.base_layer.to(dtype)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    for _ in range(100):
        merge_lora(adapted)
        unmerge_lora(adapted)
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())


def test_a_merge_that_fails_merges_nothing(adapted: TinyTransformer):
    weights = [p.clone() for p in adapted.parameters()]
    adapted.blocks[2].query.lora_B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        merge_lora(adapted)
    assert not any(layer.merged for layer in lora_layers(adapted).values())
    assert all(
        torch.equal(p, before) for p, before in zip(adapted.parameters(), weights, strict=True) if p.isfinite().all()
    )


@pytest.mark.parametrize("function", [merge_lora, unmerge_lora, trim_lora])
def test_a_model_without_layers(function, model: TinyTransformer):
    with pytest.raises(ValueError, match="call add_lora"):
        function(model)
