"""Small models of the families that query and value are found in."""

import timm
import torch
import transformers
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 50}
SPEECH = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT))


def bert() -> nn.Module:
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT))


def bert_classifier(pooler: float, encoder: float = 0.1) -> nn.Module:
    """A classifier with these biases: zero if the module has never been trained."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))
    nn.init.constant_(model.bert.pooler.dense.bias, pooler)
    nn.init.constant_(model.bert.encoder.layer[0].attention.self.query.bias, encoder)
    return model


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


def wav2vec2_ctc() -> nn.Module:
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SPEECH, vocab_size=12))


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
