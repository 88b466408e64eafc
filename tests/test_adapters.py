"""Finding projections and heads in the model families, freezing, counting, and what is refused."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora, lora_layers, merge_lora, trim_lora, unmerge_lora
from lalora_lightning.adapters import group_names
from tests.conftest import TinyTransformer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 50}


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT))


def bert() -> nn.Module:
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    return transformers.DistilBertForSequenceClassification(config)


def deberta_v2() -> nn.Module:
    return transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**TEXT))


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def llama_classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TEXT, pad_token_id=0))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)


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


def run(model: nn.Module) -> torch.Tensor:
    """The model's first output on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, (transformers.ViTForImageClassification, timm.models.VisionTransformer)):
        out = model(torch.randn(2, 3, 16, 16, generator=generator))
    else:
        inputs = {"input_ids": torch.randint(3, 50, (2, 7), generator=generator)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


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


def test_an_embedding_is_no_head():
    """An output layer that is the embedding, too, would train all of it: BERT's adapts its own dense layer and bias."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))
    summary = add_lora(model, rank=4)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.cls.predictions.transform.dense.weight.requires_grad
    # Dense layer, its norm, and the bias of the output layer.
    assert summary.head_parameters == 32 * 32 + 32 + 2 * 32 + 50


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


@pytest.mark.parametrize(
    ("names", "group_by", "expected"),
    [
        (["encoder.layer.0.q", "encoder.layer.0.v", "encoder.layer.1.q"], "block", [[0, 1], [2]]),
        # T5: the block, not the sub-layer; encoder and decoder apart.
        (["enc.block.0.layer.0.q", "dec.block.0.layer.0.q", "dec.block.0.layer.1.q"], "block", [[0], [1, 2]]),
        # Every name begins with the index of a Sequential.
        (["0.blocks.0.q", "0.blocks.0.v", "0.blocks.1.q"], "block", [[0, 1], [2]]),
        # One block alone, and names without an index.
        (["blocks.0.q", "blocks.0.v"], "block", [[0, 1]]),
        (["encoder.q", "encoder.v"], "block", [[0], [1]]),
        (["b.0.self.q", "b.0.self.v", "b.0.cross.q"], "parent", [[0, 1], [2]]),
        (["b.0.q", "b.0.v"], "module", [[0], [1]]),
        (["b.0.q", "b.0.v", "b.1.q"], lambda name: name[-1], [[0, 2], [1]]),
    ],
)  # fmt: skip
def test_group_names(names, group_by, expected):
    assert list(group_names(names, group_by).values()) == [[names[i] for i in group] for group in expected]


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


def unchanged(model: nn.Module) -> bool:
    return not lora_layers(model) and all(p.requires_grad for p in model.parameters())


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


def test_a_missing_head_lists_the_linear_layers(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"task head.*modules_to_save.*Linear layers seen: 0.query to 2.query"):
        add_lora(model.blocks)
    with pytest.raises(ValueError, match="modules_to_save to match modules but nothing matches 'classifier'"):
        add_lora(model, rank=2, modules_to_save=["classifier"])
    assert unchanged(model)


def test_a_target_that_is_not_linear(model: TinyTransformer):
    with pytest.raises(TypeError, match=r"match blocks.0 \(Attention\)"):
        add_lora(model, target_modules=["blocks.0", "blocks.1.query"])
    assert unchanged(model)


def test_a_target_whose_weight_is_tied(model: TinyTransformer):
    model.blocks[2].value.weight = model.blocks[0].query.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.query and blocks\.2\.value share one"):
        add_lora(model)
    model.blocks[2].value = model.blocks[0].value
    with pytest.raises(ValueError, match=r"blocks\.0\.value and blocks\.2\.value share one"):
        add_lora(model)
    assert unchanged(model)


def test_a_target_in_a_module_that_is_trained_in_full(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"blocks\.1\.query lies in blocks\.1, which is trained in full"):
        add_lora(model, modules_to_save=["blocks.1", "head"])
    assert unchanged(model)


def test_adapting_twice(adapted: TinyTransformer):
    with pytest.raises(ValueError, match="adapts a model once"):
        add_lora(adapted)


def test_a_rank_that_does_not_fit_names_the_projection(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"Cannot adapt blocks\.0\.query\. Expected rank to be in \[1, 8\]"):
        add_lora(model, rank=9)
    assert unchanged(model)


def test_an_unknown_group_by():
    with pytest.raises(ValueError, match=r"but got 'layer'"):
        group_names(["a.0.q"], "layer")


@pytest.mark.parametrize("function", [merge_lora, unmerge_lora, trim_lora])
def test_a_model_without_layers(function, model: TinyTransformer):
    with pytest.raises(ValueError, match="call add_lora"):
        function(model)


def test_a_bare_layer_is_a_model():
    layer = TruncatedLoRALinear(nn.Linear(4, 4), rank=2)
    assert lora_layers(layer) == {"": layer}
