"""What else is trained."""

import copy

import pytest
import transformers
from torch import nn

from lalora_lightning import add_lora
from tests.helpers.families import SMALL, TEXT, bert_classifier, gpt2, t5, wav2vec2_ctc
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


def encoder_decoder() -> nn.Module:
    vision = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))
    config = transformers.TrOCRConfig(
        vocab_size=50, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48
    )
    return transformers.VisionEncoderDecoderModel(encoder=vision, decoder=transformers.TrOCRForCausalLM(config))


LANGUAGE_MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "gpt2": gpt2,
    "t5": t5,
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)),
    # The output layer is not at the root, and every module there has a target.
    "trocr": encoder_decoder,
}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_output_layer_of_a_language_model_is_no_head(family: str):
    targets = ["query_key_value"] if family == "gpt-neox" else None
    assert add_lora(LANGUAGE_MODELS[family](), rank=2, target_modules=targets).head == ()


def test_the_output_layer_of_a_masked_language_model_is_no_head():
    """RoBERTa's is treated like BERT's: its dense layer learns, the matrix of the vocabulary does not, tied or not."""
    for tied in (True, False):
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT, tie_word_embeddings=tied))
        add_lora(model, rank=2)
        assert model.lm_head.dense.weight.requires_grad
        assert not model.lm_head.decoder.weight.requires_grad


def test_the_output_layer_of_a_ctc_model_is_a_head():
    assert add_lora(wav2vec2_ctc(), rank=2).head == ("lm_head",)


class Decoder(nn.Module):
    """A language model outside of transformers, with an output layer of any name."""

    def __init__(self, classes: int, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.positions = nn.Embedding(20, 8)
        self.blocks = TinyTransformer().blocks
        self.output = nn.Linear(8, classes, bias=bias)


def test_language_models_outside_of_transformers():
    assert add_lora(Decoder(50, bias=False), rank=2).head == ()
    tied = Decoder(50, bias=True)
    tied.output.weight = tied.embedding.weight
    assert add_lora(tied, rank=2).head == ()
    assert add_lora(Decoder(50, bias=True), rank=2).head == ("output",)
    assert add_lora(Decoder(2, bias=False), rank=2).head == ("output",)


def test_as_many_classes_as_tokens_are_classes():
    config = transformers.LlamaConfig(**TEXT, pad_token_id=0, num_labels=50)
    assert add_lora(transformers.LlamaForSequenceClassification(config), rank=2).head == ("score",)


def test_a_pooler_that_was_never_trained_belongs_to_the_head():
    assert add_lora(bert_classifier(pooler=0.0), rank=2).head == ("bert.pooler.dense", "classifier")
    assert add_lora(bert_classifier(pooler=0.1), rank=2).head == ("classifier",)
    # Nothing of it was trained, so nothing is known of the pooler.
    assert add_lora(bert_classifier(pooler=0.0, encoder=0.0), rank=2).head == ("classifier",)
    frozen = bert_classifier(pooler=0.0)
    frozen.bert.pooler.requires_grad_(False)
    assert add_lora(frozen, rank=2).head == ("classifier",)

    # A head of one's own may not use the pooler at all, which would be an unused parameter with DDP.
    wrapper = nn.ModuleDict({"backbone": bert_classifier(pooler=0.0).bert, "out": nn.Linear(32, 3)})
    assert add_lora(wrapper, rank=2).head == ("out",)
