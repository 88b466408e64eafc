"""add_lora over the model families, and its settings."""

import pytest
import torch
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers
from tests.helpers.families import (
    bert,
    deberta_v2,
    distilbert,
    gpt2,
    llama,
    llama_classifier,
    modernbert,
    roberta,
    run,
    t5,
    timm_vit,
    vit,
)
from tests.helpers.models import TinyTransformer, unchanged

FAMILIES = {
    # model: (query and value of the first layer, number of projections, layers, head)
    roberta: ("roberta.encoder.layer.0.attention.self.query", 4, 2, ["classifier.dense", "classifier.out_proj"]),
    bert: ("bert.encoder.layer.0.attention.self.value", 4, 2, ["qa_outputs"]),
    distilbert: ("distilbert.transformer.layer.0.attention.q_lin", 4, 2, ["pre_classifier", "classifier"]),
    deberta_v2: ("deberta.encoder.layer.0.attention.self.query_proj", 4, 2, ["pooler.dense", "classifier"]),
    modernbert: ("model.layers.0.attn.Wqkv", 4, 2, ["head.dense", "head.norm", "classifier"]),
    t5: ("decoder.block.0.layer.1.EncDecAttention.v", 12, 4, []),
    llama: ("model.layers.0.self_attn.v_proj", 4, 2, []),
    llama_classifier: ("model.layers.0.self_attn.q_proj", 4, 2, ["score"]),
    gpt2: ("transformer.h.0.attn.c_attn", 4, 2, []),
    vit: (None, 4, 2, ["classifier"]),
    timm_vit: ("blocks.0.attn.qkv", 4, 2, ["head"]),
}


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_family(build):
    """Query and value are found, the fresh model computes the same bit for bit, only adapters and head train."""
    example, projections, layers, head = FAMILIES[build]
    model = build().eval()
    with torch.no_grad():
        expected = run(model)
    summary = add_lora(model, rank=4)
    if example is not None:
        assert example in lora_layers(model)
    assert (summary.projections, summary.layers) == (projections, layers)
    assert summary.adapter_parameters == projections * 4 * (32 + 32)
    assert list(summary.head) == head
    with torch.no_grad():
        assert torch.equal(run(model), expected)

    run(model).square().sum().backward()
    with_gradient = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    used_head = set(head) - ({"pooler.dense"} if build is bert else set())
    assert with_gradient == set(lora_layers(model)) | used_head


def test_summary_line(model: TinyTransformer):
    summary = add_lora(model, rank=2)
    # 6 projections of 2 * (8 + 8); the head 8 * 2 + 2; in all 9 projections of 8 * 8 + 8 besides.
    assert str(summary) == (
        "3 layers, 6 projections adapted; trainable: 192 in adapters + 18 in head, 24.48% of 858 parameters"
    )


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = roberta()
    summary = add_lora(model, rank=4)
    assert summary.adapter_parameters == 1024
    assert all(p.is_meta for p in model.parameters())


def test_device_and_dtype(model: TinyTransformer):
    add_lora(model, rank=2, device="meta", dtype=torch.float64)
    layer = model.blocks[0].query
    assert layer.lora_A.is_meta
    assert layer.lora_A.dtype == torch.float64
    assert layer.base_weight.device.type == "cpu"


def test_adapting_twice(adapted: TinyTransformer):
    with pytest.raises(ValueError, match="adapts a model once"):
        add_lora(adapted)


def test_a_rank_that_does_not_fit_names_the_projection(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"Cannot adapt blocks\.0\.query\. Expected rank to be in \[1, 8\]"):
        add_lora(model, rank=9)
    assert unchanged(model)


def test_a_bare_layer_is_a_model():
    layer = TruncatedLoRALinear(nn.Linear(4, 4), rank=2)
    assert lora_layers(layer) == {"": layer}
