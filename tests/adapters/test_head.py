"""What else is trained."""

import copy

import pytest
import transformers
from torch import nn

from lalora_lightning import add_lora
from tests.helpers.families import TEXT
from tests.helpers.models import TinyTransformer, unchanged


def test_an_embedding_is_no_head():
    """An output layer that is the embedding, too, would train all of it: BERT's adapts its own dense layer and bias."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))
    summary = add_lora(model, rank=4)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.cls.predictions.transform.dense.weight.requires_grad
    # Dense layer, its norm, and the bias of the output layer.
    assert summary.head_parameters == 32 * 32 + 32 + 2 * 32 + 50


def test_modules_to_save(model: TinyTransformer):
    summary = add_lora(model, rank=2, modules_to_save=["blocks.0.key", "head"])
    assert summary.head == ("blocks.0.key", "head")
    assert model.blocks[0].key.weight.requires_grad
    assert not model.blocks[1].key.weight.requires_grad


def test_an_empty_list_trains_adapters_only(model: TinyTransformer):
    summary = add_lora(model, rank=2, modules_to_save=[])
    assert summary.head == ()
    assert summary.head_parameters == 0


def test_the_default_head_of_a_wrapped_model_is_the_wrappers_own():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = transformers.BertModel(transformers.BertConfig(**TEXT))
            self.norm = nn.LayerNorm(32)
            self.out = nn.Linear(32, 3)

    # BERT's pretrained pooler is part of the backbone, which the wrapper's head makes plain.
    assert add_lora(Wrapper(), rank=4).head == ("out",)


def test_a_head_that_was_frozen_stays_frozen_unless_named(model: TinyTransformer):
    model.head.requires_grad_(False)
    assert add_lora(copy.deepcopy(model), rank=2).head == ()
    assert add_lora(copy.deepcopy(model), rank=2, modules_to_save=["head"]).head == ("head",)


def test_a_frozen_teacher_beside_the_model_is_no_head(model: TinyTransformer):
    wrapper = nn.ModuleDict({"model": model, "teacher": nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)})
    assert add_lora(wrapper, rank=2).head == ("model.head",)
    assert not wrapper["teacher"][0].weight.requires_grad


def test_a_missing_head_lists_the_linear_layers(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"task head.*modules_to_save.*Linear layers seen: 0.query to 2.query"):
        add_lora(model.blocks)
    with pytest.raises(ValueError, match="modules_to_save to match modules but nothing matches 'classifier'"):
        add_lora(model, rank=2, modules_to_save=["classifier"])
    assert unchanged(model)


def test_a_target_in_a_module_that_is_trained_in_full(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"blocks\.1\.query is inside blocks\.1, which is trained in full"):
        add_lora(model, modules_to_save=["blocks.1", "head"])
    assert unchanged(model)
