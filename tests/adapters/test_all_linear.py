"""``target_modules="all-linear"``: the linear layers that PEFT adapts for the same word, without the task head."""

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lalora_lightning import add_lora, lora_layers
from tests.helpers import families
from tests.helpers.families import TEXT, run
from tests.helpers.models import MixtureOfExperts, TinyTransformer, unchanged


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=50,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def trained_in_full(model: nn.Module) -> set[str]:
    """The linear layers that are trained in full."""
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
    }


@pytest.mark.parametrize(
    ("build", "task_type", "in_full"),
    [
        (families.roberta, "SEQ_CLS", {"classifier.dense", "classifier.out_proj"}),
        # The new pooler is a part of the head.
        (families.deberta_v2, "SEQ_CLS", {"pooler.dense", "classifier"}),
        (families.modernbert, "SEQ_CLS", {"head.dense", "classifier"}),
        (families.t5, "SEQ_2_SEQ_LM", set()),
        (families.llama, "CAUSAL_LM", set()),
        (families.llama_classifier, "SEQ_CLS", {"score"}),
        (families.gpt2, "CAUSAL_LM", set()),
        (whisper, None, set()),
        (families.vit, None, {"classifier"}),
        (swin, None, {"classifier"}),
        (lambda: families.bert_classifier(pooler=0.1), "SEQ_CLS", {"classifier"}),
        (lambda: families.bert_classifier(pooler=0.0), "SEQ_CLS", {"bert.pooler.dense", "classifier"}),
    ],
)
def test_the_set_is_that_of_peft(build: Callable[[], nn.Module], task_type: str | None, in_full: set[str]):
    model = build()
    add_lora(model, rank=2, target_modules="all-linear")
    theirs = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", task_type=task_type))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A") and "modules_to_save" not in name
    }
    assert trained_in_full(model) == in_full
    assert set(lora_layers(model)) == adapted - in_full


@pytest.mark.parametrize("build", [families.gpt2, families.modernbert, families.timm_vit])
def test_a_fused_projection_is_adapted_as_query_key_and_value(build: Callable[[], nn.Module]):
    model = build().eval()
    base = run(model)
    add_lora(model, rank=2, target_modules="all-linear")
    torch.testing.assert_close(run(model), base)
    fused = [layer for name, layer in lora_layers(model).items() if name.endswith(("c_attn", "Wqkv", "qkv"))]
    assert [layer.out_slices for layer in fused] == [((0, 32), (32, 64), (64, 96))] * 2


def test_models_that_peft_does_not_know():
    """PEFT takes the word for models of transformers only."""
    vit = families.timm_vit()
    add_lora(vit, rank=2, target_modules="all-linear")
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(lora_layers(vit)) == {f"blocks.{i}.{kind}" for i in range(2) for kind in kinds}
    assert trained_in_full(vit) == {"head"}

    # A fused parameter, and an attention whose output projection is read.
    torchs = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=3)
    add_lora(torchs, rank=2, target_modules="all-linear")
    block = "encoder.layers.encoder_layer_1"
    assert {name.removeprefix(f"{block}.") for name in lora_layers(torchs) if name.startswith(block)} == {
        "self_attention.in_proj",
        "self_attention.out_proj",
        "mlp.0",
        "mlp.3",
    }
    assert trained_in_full(torchs) == {"heads.head"}

    # Without query and value, the blocks are what is repeated.
    mixer = timm.create_model("mixer_s32_224", img_size=64, num_classes=3)
    add_lora(mixer, rank=2, target_modules="all-linear")
    assert len(lora_layers(mixer)) == 8 * 4
    assert trained_in_full(mixer) == {"head"}

    # Swin's attention orders query, key and value one after the other, TinyViT's head by head.
    tiny = timm.create_model("tiny_vit_5m_224")
    add_lora(tiny, rank=2, target_modules="all-linear")
    assert {len(layer.out_slices) for layer in lora_layers(tiny).values()} == {1}


def test_what_is_named_to_be_trained_in_full_is_not_adapted(model: TinyTransformer):
    add_lora(model, rank=2, target_modules="all-linear", modules_to_save=["blocks.2", "head"])
    assert not any(name.startswith(("blocks.2", "head")) for name in lora_layers(model))
    assert {"blocks.2.query", "head"} <= trained_in_full(model)


def test_a_frozen_network_beside_a_trainable_one_gets_no_adapters():
    pair = nn.ModuleDict({"student": TinyTransformer(), "teacher": TinyTransformer().requires_grad_(False)})
    add_lora(pair, rank=2, target_modules="all-linear")
    assert all(name.startswith("student.blocks") for name in lora_layers(pair))
    assert trained_in_full(pair) == {"student.head"}


def test_layers_narrower_than_the_rank_and_experts_are_named():
    model = MixtureOfExperts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add_lora(model, rank=2, target_modules="all-linear")
    messages = [str(w.message) for w in caught if "La-LoRA" in str(w.message)]
    assert messages[0] == (
        "La-LoRA: not adapted, because they are narrower than rank 2: model.layers.0.mlp.shared_expert_gate, "
        "model.layers.1.mlp.shared_expert_gate."
    )
    assert "model.layers.0.mlp.experts.gate_up_proj and 3 more" in messages[1]
    assert len(messages) == 2


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="Expected a backbone with linear layers but found none"):
        add_lora(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), target_modules="all-linear")


def test_a_model_without_a_head():
    llama = transformers.LlamaModel(transformers.LlamaConfig(**TEXT))
    add_lora(llama, rank=2, target_modules="all-linear")
    assert len(lora_layers(llama)) == 2 * 7
    assert trained_in_full(llama) == set()


def test_a_model_without_blocks_does_not_tell_its_head():
    """Its last layer would be frozen at its random weights, as ResNet's ``fc`` would."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"Expected a backbone of several blocks.* modules_to_save=\[\]"):
        add_lora(network, rank=2, target_modules="all-linear")
    assert unchanged(network)
    summary = add_lora(copy.deepcopy(network), rank=2, target_modules="all-linear", modules_to_save=["2"])
    assert summary.projections == 1
    assert add_lora(network, rank=2, target_modules="all-linear", modules_to_save=[]).projections == 2
