"""What a PEFT folder holds besides adapters: heads, tied parameters, buffers; PEFT's own loading is the oracle."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lalora_lightning import add_lora, load_peft_adapter, lora_layers, save_peft_adapter
from tests.helpers.families import TEXT
from tests.helpers.models import TinyTransformer, unchanged

IDS = torch.arange(12).view(2, 6) + 3
X = torch.linspace(-1, 1, 6 * 5 * 8).view(6, 5, 8)


def outputs(model: nn.Module) -> Tensor:
    if not hasattr(model, "config") or not hasattr(model.config, "is_encoder_decoder"):
        return model(X)
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **inputs).logits


def train(model: nn.Module, **settings: Any) -> nn.Module:
    """A few steps in training mode, then mixed ranks."""
    add_lora(model, rank=4, **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(4):
        optimizer.zero_grad()
        outputs(model.train()).square().mean().backward()
        optimizer.step()
    for i, layer in enumerate(lora_layers(model).values()):
        layer.set_rank(1 + i % 4)
    return model.eval()


@torch.no_grad()
def require_round_trip(base: nn.Module, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Check that PEFT and load_peft_adapter compute what the model computes, and return the configuration."""
    expected = outputs(model)
    assert (outputs(base.eval()) - expected).abs().max() > 1e-3
    for uniform in (True, False):
        save_peft_adapter(model, folder, uniform=uniform, overwrite=True)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        ours = copy.deepcopy(base)
        load_peft_adapter(ours, folder)
        for got in (outputs(theirs), outputs(ours.eval())):
            assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    return json.loads((folder / "adapter_config.json").read_text())


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("build", "trained", "names"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)), "lm_head", {"model.embed_tokens"}),
        (lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)), "embed_tokens", {"lm_head"}),
        (gpt2, "wte", {"transformer.wte", "lm_head"}),
        (t5, "shared", {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
    ],
)
def test_a_tied_parameter_is_saved_under_all_of_its_names(
    build: Callable[[], nn.Module], trained: str, names: set[str], tmp_path: Path
):
    base = build()
    config = require_round_trip(base, train(copy.deepcopy(base), modules_to_save=[trained]), tmp_path)
    assert names <= set(config["modules_to_save"])


class Head(nn.Module):
    """A parameter of its own, tied layers inside, parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(8))])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()) * self.scale + self.shifts[0]


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(8))])
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](x + self.shifts[0]) + self.heads[1](x)


@pytest.mark.parametrize(
    "head",
    [Head, Listed, lambda: parametrizations.weight_norm(nn.Linear(8, 2)), lambda: nn.Sequential(nn.Linear(8, 2))],
)
def test_heads_of_several_modules(head: Callable[[], nn.Module], tmp_path: Path):
    base = TinyTransformer()
    base.head = head()
    require_round_trip(base, train(copy.deepcopy(base), modules_to_save=["head"]), tmp_path)


def test_a_head_whose_parameter_has_two_names(tmp_path: Path):
    base = BertForMaskedLM(BertConfig(**TEXT))
    config = require_round_trip(base, train(copy.deepcopy(base)), tmp_path)
    assert config["modules_to_save"] == ["cls.predictions"]


class Normalized(TinyTransformer):
    """Statistics that move in training, before a frozen backbone and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.instance = nn.InstanceNorm1d(5, track_running_stats=True)
        self.mix = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.mix(self.instance(self.norm(2 * x + 1))))


def test_buffers_that_training_moved_are_saved(tmp_path: Path):
    base = Normalized()
    config = require_round_trip(base, train(copy.deepcopy(base), modules_to_save=["head"]), tmp_path)
    assert {"norm", "instance", "mix"} <= set(config["modules_to_save"])
    load_peft_adapter(base, tmp_path)
    assert not base.norm.weight.requires_grad
    assert base.head[0].weight.requires_grad
    card = (tmp_path / "README.md").read_text()
    assert "| trained in full | head |" in card


def test_buffers_beside_adapted_layers_are_named(tmp_path: Path, adapted: TinyTransformer):
    adapted.blocks[1].register_buffer("average", torch.zeros(8))
    adapted.blocks[1].register_buffer("index", torch.arange(8))
    adapted.register_buffer("constant", torch.ones(8), persistent=False)
    with pytest.warns(UserWarning, match=r"lacks the buffers of blocks\.1, because"):
        save_peft_adapter(adapted, tmp_path)


def test_a_trained_bias_of_an_adapted_layer_is_refused(tmp_path: Path, adapted: TinyTransformer):
    adapted.blocks[0].query.base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the bias of blocks\.0\.query is trained"):
        save_peft_adapter(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_trained_module_around_adapted_layers_is_refused(tmp_path: Path, adapted: TinyTransformer):
    adapted.blocks[0].gain = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"here blocks\.0, where blocks\.0\.query is adapted"):
        save_peft_adapter(adapted, tmp_path)


def test_an_adapted_layer_in_two_places_is_refused(tmp_path: Path):
    model = TinyTransformer()
    model.blocks[2].query = model.blocks[0].query
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"blocks\.0\.query is an attribute of several modules"):
        save_peft_adapter(model, tmp_path)


def test_a_block_and_a_head_in_two_places(tmp_path: Path):
    base = TinyTransformer()
    base.blocks[2] = base.blocks[0]
    base.other = nn.ModuleDict({"head": base.head})
    config = require_round_trip(base, train(copy.deepcopy(base), modules_to_save=["head"]), tmp_path)
    assert config["modules_to_save"] == ["head", "other.head"]


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True))


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_that_trained_tied_parameters_apart_is_refused(saved: list[str], tmp_path: Path):
    base = tied_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight and lm_head\.weight are tied in the model"):
        load_peft_adapter(base, tmp_path)
    assert unchanged(base)


def test_a_tied_parameter_that_an_earlier_version_wrote_under_one_name_is_read(tmp_path: Path):
    base = tied_llama()
    model = train(copy.deepcopy(base), modules_to_save=["lm_head"])
    save_peft_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config["modules_to_save"] = ["model.embed_tokens"]
    del config["auto_mapping"]  # which 0.1.0 did not write
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_peft_adapter(base, tmp_path)
    torch.testing.assert_close(outputs(base.eval()), outputs(model), rtol=0, atol=1e-6)


def test_an_adapter_that_peft_saved_again_is_read(tmp_path: Path):
    """Also one with a frozen weight that is tied to another one: the decoder of BERT's head, and its embeddings."""
    base = BertForMaskedLM(BertConfig(**TEXT))
    model = train(copy.deepcopy(base))
    save_peft_adapter(model, tmp_path / "ours")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    load_peft_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(outputs(base.eval()), outputs(model), rtol=0, atol=1e-6)
    assert not base.bert.embeddings.word_embeddings.weight.requires_grad
