"""The default targets give the paper's parameter counts on full-size models (design on the meta device, no weights)."""

import pytest
import timm
import torch
import transformers

from lalora_lightning import add_lora


@pytest.fixture(autouse=True)
def _on_meta():
    with torch.device("meta"):
        yield


def test_roberta_base_has_0_3_million_at_rank_8():
    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    summary = add_lora(transformers.RobertaForSequenceClassification(config), rank=8, alpha=8.0)
    assert summary.adapter_parameters == 294_912
    assert (summary.layers, summary.projections) == (12, 24)


@pytest.mark.parametrize(("rank", "share"), [(4, 0.08), (8, 0.16), (16, 0.32)])
def test_deberta_v3_base(rank: int, share: float):
    config = transformers.DebertaV2Config(
        vocab_size=128_100,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )
    summary = add_lora(transformers.DebertaV2ForQuestionAnswering(config), rank=rank)
    assert round(100 * summary.trainable_share, 2) == share


@pytest.mark.parametrize(
    ("name", "share"),
    [("vit_base_patch16_224.augreg_in21k", 0.43), ("vit_large_patch16_224.augreg_in21k", 0.29)],
)
def test_vit_with_its_head_for_cifar100(name: str, share: float):
    summary = add_lora(timm.create_model(name, num_classes=100), rank=8)
    assert round(100 * summary.trainable_share, 2) == share
    assert summary.head == ("head",)


def test_llama_7b():
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    summary = add_lora(transformers.LlamaForCausalLM(config), rank=16, alpha=32.0, target_modules=targets)
    # 32 blocks of 3 * (4096 + 4096) and 2 * (4096 + 11008), times 16: 28,049,408 of 6.77 billion with the adapters.
    assert summary.adapter_parameters == 28_049_408
    assert (summary.layers, summary.projections) == (32, 160)
    assert f"{100 * summary.trainable_share:.2f}" == "0.41"


def test_t5_small_adapts_every_attention_of_a_block_together():
    summary = add_lora(transformers.T5ForConditionalGeneration(transformers.T5Config()), rank=8)
    # 6 encoder blocks with one attention, 6 decoder blocks with two; query and value of 512 x 512.
    assert (summary.layers, summary.projections) == (12, 36)
    assert summary.adapter_parameters == 36 * 8 * (512 + 512)
