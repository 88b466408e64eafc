"""Which layers are adapted."""

import copy
from collections import OrderedDict

import pytest
import timm
import torch
import transformers
from torch import nn
from torchmetrics import Metric

from lalora_lightning import (
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
)
from tests.helpers.families import timm_vit
from tests.helpers.models import TinyTransformer, unchanged


def test_fused_projections_leave_the_key_as_it_is():
    model = timm_vit()
    add_lora(model, rank=4)
    layer = model.blocks[0].attn.qkv
    nn.init.normal_(layer.lora_B)
    increment = layer.increment()
    assert increment[:32].any()
    assert not increment[32:64].any()
    assert increment[64:].any()


def test_a_fused_projection_named_by_the_user_is_adapted_whole():
    model = timm_vit()
    add_lora(model, rank=4, target_modules=["qkv"])
    assert model.blocks[0].attn.qkv.out_slices == ((0, 96),)


def test_heads_one_after_the_other_are_adapted_whole():
    """A third of such a projection is no query: MaxViT's attention has q, k, v of head 1, then of head 2, ..."""
    attention = timm.models.maxxvit.AttentionCl(dim=64, dim_head=32)
    model = nn.Sequential(OrderedDict(attention=attention, head=nn.Linear(64, 2)))
    add_lora(model, rank=4)
    assert model.attention.qkv.out_slices == ((0, 192),)
    attention = timm.models.maxxvit.AttentionCl(dim=64, dim_head=32, head_first=False)
    model = nn.Sequential(OrderedDict(attention=attention, head=nn.Linear(64, 2)))
    add_lora(model, rank=4)
    assert model.attention.qkv.out_slices == ((0, 64), (128, 192))


def test_cross_attention_that_fuses_key_and_value_is_not_taken_for_query_and_value():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config)
    add_lora(model, rank=4)
    assert list(lora_layers(model)) == ["transformer.h.0.attn.c_attn"]


def test_targets_by_name_by_longer_name_and_by_regular_expression(model: TinyTransformer):
    for target, expected in (
        (["key"], ["blocks.0.key", "blocks.1.key", "blocks.2.key"]),
        (["1.key", "0.query"], ["blocks.0.query", "blocks.1.key"]),
        (r"blocks\.[02]\.(key|value)", ["blocks.0.key", "blocks.0.value", "blocks.2.key", "blocks.2.value"]),
    ):
        adapted = copy.deepcopy(model)
        add_lora(adapted, rank=2, target_modules=target)
        assert list(lora_layers(adapted)) == expected


def test_targets_that_match_nothing_list_the_linear_layers(model: TinyTransformer):
    with pytest.raises(
        ValueError, match=r"nothing matches 'qurey'.*seen: blocks.0.query to blocks.2.query \(3\), .*, head\."
    ):
        add_lora(model, target_modules=["value", "qurey"])
    with pytest.raises(ValueError, match=r"nothing matches 'blocks.9.\*'"):
        add_lora(model, target_modules="blocks.9.*")
    with pytest.raises(ValueError, match=r"found none; name the layers to adapt.*Linear layers seen: 0 to 1 \(2\)\."):
        add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert unchanged(model)


def test_a_target_that_is_not_linear(model: TinyTransformer):
    with pytest.raises(TypeError, match=r"match blocks.0 \(Attention\)"):
        add_lora(model, target_modules=["blocks.0", "blocks.1.query"])
    assert unchanged(model)


def test_a_target_whose_weight_is_tied(model: TinyTransformer):
    model.blocks[2].value.weight = model.blocks[0].query.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.query and blocks\.2\.value share one"):
        add_lora(model)
    model.blocks[2].value = nn.Linear(8, 8)
    model.blocks[2].value.weight = model.blocks[0].value.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.value and blocks\.2\.value share one"):
        add_lora(model)
    assert unchanged(model)


def test_a_module_under_two_names_is_one_module(model: TinyTransformer):
    """An alias of the backbone, and a projection that two blocks share."""
    outer = nn.Module()
    outer.model = model
    outer.backbone = model.blocks
    outer.first_query = model.blocks[0].query
    model.blocks[2].value = model.blocks[0].value
    summary = add_lora(outer, rank=2)
    assert summary.projections == 5
    assert summary.head == ("model.head",)
    layer = model.blocks[0].query
    assert isinstance(layer, TruncatedLoRALinear)
    assert outer.first_query is outer.backbone[0].query is layer
    assert model.blocks[2].value is model.blocks[0].value
    x = torch.randn(2, 5, 8)
    for adapter in lora_layers(outer).values():
        nn.init.normal_(adapter.lora_B)
    adapted = model(x)
    other = copy.deepcopy(outer)
    merge_lora(other, remove=True)
    assert type(other.first_query) is type(other.model.blocks[2].value) is nn.Linear
    assert other.first_query is other.model.blocks[0].query
    torch.testing.assert_close(other.model(x), adapted)
    fresh = copy.deepcopy(outer)
    for adapter in lora_layers(fresh).values():
        nn.init.zeros_(adapter.lora_B)
    load_lora_state_dict(fresh, lora_state_dict(outer))
    torch.testing.assert_close(fresh.model(x), adapted)


class Distilled(nn.Module):
    """A student beside a frozen teacher, and a network inside of a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.student = TinyTransformer()
        self.teacher = TinyTransformer().requires_grad_(False)
        self.metric = NetworkMetric()


class NetworkMetric(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.network = TinyTransformer()

    def update(self) -> None: ...

    def compute(self) -> None: ...


@pytest.mark.parametrize("target_modules", [None, ["query", "value"]])
def test_frozen_networks_beside_a_trainable_one_and_networks_in_metrics_are_left_alone(target_modules: list | None):
    model = Distilled()
    summary = add_lora(model, rank=2, target_modules=target_modules)
    assert all(name.startswith("student.blocks") for name in lora_layers(model))
    assert len(lora_layers(model)) == 6
    assert summary.head == ("student.head",)
    # A teacher alone can still be adapted, by its name.
    model = Distilled()
    add_lora(model, rank=2, target_modules=r"teacher\..*query", modules_to_save=[])
    assert list(lora_layers(model)) == [f"teacher.blocks.{i}.query" for i in range(3)]


def test_a_backbone_that_is_frozen_as_a_whole_is_adapted(model: TinyTransformer):
    model.blocks.requires_grad_(False)
    add_lora(model, rank=2)
    assert len(lora_layers(model)) == 6


def test_a_block_of_a_hierarchical_model_is_a_layer():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2)
    )
    assert add_lora(swin, rank=2).layers == 3
    config = transformers.SwinConfig(image_size=32, window_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2])
    assert add_lora(transformers.SwinForImageClassification(config), rank=2).layers == 3


def test_the_word_for_the_default():
    default, by_name = (TinyTransformer(), TinyTransformer())
    add_lora(default)
    add_lora(by_name, target_modules="query-value")
    assert list(lora_layers(by_name)) == list(lora_layers(default))
