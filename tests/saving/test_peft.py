"""Adapters that go to PEFT and come from it; PEFT's own loading and forward are the oracle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lalora_lightning import (
    add_lora,
    load_peft_adapter,
    lora_layers,
    merge_lora,
    push_peft_adapter,
    save_peft_adapter,
    trim_lora,
)
from tests.helpers.models import TinyTransformer

BERT_LIKE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IDS = torch.arange(12).view(2, 6) + 3
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**BERT_LIKE)), {"input_ids": IDS}),
    "deberta-v3": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**BERT_LIKE)), {"input_ids": IDS}),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**BERT_LIKE, num_key_value_heads=1)),
        {"input_ids": IDS},
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
        {"input_ids": IDS},
    ),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(**{k: v for k, v in BERT_LIKE.items() if k != "vocab_size"}, image_size=16, patch_size=8)
        ),
        {"pixel_values": IMAGES},
    ),
    "timm vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
        ),
        {"x": IMAGES},
    ),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def outputs(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        out = model(**FAMILIES[family][1])
    return out if isinstance(out, Tensor) else out.logits


def trained(family: str) -> nn.Module:
    """Adapters and head that do something, at mixed ranks."""
    model = build(family)
    add_lora(model, rank=4, alpha=6.0)
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.set_rank(1 + i % 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips(tmp_path: Path, family: str):
    """Ours, PEFT loading both forms, trimmed, merged, and read back: one function."""
    model = trained(family)
    expected = outputs(model, family)
    assert not torch.allclose(outputs(build(family), family), expected, atol=1e-3)
    for uniform in (False, True):
        folder = tmp_path / str(uniform)
        save_peft_adapter(model, folder, uniform=uniform)
        same(outputs(PeftModel.from_pretrained(build(family), folder).eval(), family), expected)
        again = build(family)
        load_peft_adapter(again, folder)
        same(outputs(again, family), expected)
    trim_lora(model)
    same(outputs(model, family), expected)
    save_peft_adapter(model, tmp_path / "trimmed", uniform=False)
    same(outputs(PeftModel.from_pretrained(build(family), tmp_path / "trimmed").eval(), family), expected)
    merge_lora(model)
    same(outputs(model, family), expected)


@pytest.mark.parametrize("uniform", [True, False, 16])
def test_transformers_load_adapter_reads_it(uniform: bool | int, tmp_path: Path):
    model = trained("llama")
    save_peft_adapter(model, tmp_path / "adapter", uniform=uniform)
    plain = build("llama")
    plain.load_adapter(tmp_path / "adapter")
    same(outputs(plain, "llama"), outputs(model, "llama"))


def test_the_uniform_form_keeps_the_rules_of_engines_without_patterns(tmp_path: Path):
    """vLLM's, as vllm.lora.peft_helper.PEFTHelper checks them, and one shape of lora_A and lora_B a projection."""
    model = trained("llama")
    save_peft_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert not config.get("use_dora", False)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(lora_layers(model))
    for key, value in tensors.items():
        side = key.rpartition(".lora_")[2]
        assert key.startswith("base_model.model.model.layers.")
        assert value.shape[0 if side == "A.weight" else 1] == 4


def test_the_mixed_form_scales_by_one_for_readers_that_ignore_the_patterns_scale(tmp_path: Path):
    save_peft_adapter(trained("roberta"), tmp_path, uniform=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["r"] == config["lora_alpha"]


def test_a_name_that_ends_like_another_keeps_its_own_rank(tmp_path: Path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
            self.inner = nn.ModuleDict({"block": nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})})

        def forward(self, x: Tensor) -> Tensor:
            for block in (self.block, self.inner["block"]):
                x = block["value"](block["query"](x))
            return x

    torch.manual_seed(0)
    model = Twice()
    add_lora(model, rank=4, modules_to_save=[])
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B)
        layer.set_rank(4 - i)
    save_peft_adapter(model, tmp_path, uniform=False)
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    torch.manual_seed(0)
    theirs = PeftModel.from_pretrained(Twice(), tmp_path)
    same(theirs(x), model(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_is_a_starting_point(tmp_path: Path, rslora: bool):
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["query", "value", "dense"],
        rank_pattern={"layer.0.attention.self.query": 2},
        alpha_pattern={"layer.1.attention.self.value": 3},
        use_rslora=rslora,
        init_lora_weights=False,
        modules_to_save=["classifier"],
    )
    theirs = get_peft_model(build("roberta"), config).eval()
    nn.init.normal_(theirs.base_model.model.classifier.modules_to_save["default"].out_proj.weight)
    theirs.save_pretrained(tmp_path)
    model = build("roberta")
    load_peft_adapter(model, tmp_path)
    same(outputs(model, "roberta"), outputs(theirs, "roberta"))
    layers = lora_layers(model)
    query = layers["roberta.encoder.layer.0.attention.self.query"]
    assert (int(query.rank), query.max_rank) == (2, 4)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name} == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }


def adapter_of_peft(folder: Path, **settings: Any) -> Path:
    known = {key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__}
    config = LoraConfig(r=2, target_modules=["query", "value"], **known)
    get_peft_model(build("roberta"), config).save_pretrained(folder)
    # What only a later PEFT than the installed one can be told.
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**written, **{key: settings[key] for key in settings.keys() - known.keys()}}))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"Expected a plain LoRA adapter without biases .*{message}"):
        load_peft_adapter(build("roberta"), adapter_of_peft(tmp_path, **settings))


def test_an_adapter_of_another_model_names_what_does_not_fit_and_changes_nothing(tmp_path: Path):
    model = TinyTransformer()
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query: the model has no linear layer") as error:
        load_peft_adapter(model, adapter_of_peft(tmp_path))
    assert "layer.1.attention.self.value" in str(error.value)
    assert not lora_layers(model)
    wider = RobertaForSequenceClassification(RobertaConfig(**{**BERT_LIKE, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"shapes \(2, 32\) and \(32, 2\) but got \(2, 16\) and \(16, 2\)"):
        load_peft_adapter(wider, tmp_path)
    assert all(p.requires_grad for p in wider.parameters())


def test_files_that_are_missing_or_cut_short(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_peft_adapter(build("roberta"), tmp_path)
    adapter_of_peft(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="it cannot be read"):
        load_peft_adapter(build("roberta"), tmp_path)


def test_an_export_of_nothing_of_merged_layers_or_into_a_full_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="call add_lora"):
        save_peft_adapter(build("roberta"), tmp_path)
    model = trained("roberta")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_peft_adapter(model, tmp_path)
    save_peft_adapter(model, tmp_path, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {
        "notes.txt",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    merge_lora(model)
    with pytest.raises(ValueError, match=r"query is merged; call unmerge_lora"):
        save_peft_adapter(model, tmp_path / "other")


def test_parameters_of_the_model_itself_cannot_be_saved(tmp_path: Path):
    model = trained("timm vit")
    model.cls_token.requires_grad_(True)
    with pytest.raises(ValueError, match="the model has some of its own"):
        save_peft_adapter(model, tmp_path)


def test_the_model_card_says_what_it_is(tmp_path: Path):
    model = trained("llama")
    model.config._name_or_path = "someone/base"
    save_peft_adapter(model, tmp_path, facts={"accuracy": 0.87, "gamma": 2.0})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.to_dict()["library_name"] == "peft"
    assert "la-lora" in card.data.tags
    assert "| accuracy | 0.87 |" in card.text
    ranks = {name: int(layer.rank) for name, layer in lora_layers(model).items()}
    assert len(set(ranks.values())) > 1
    assert all(f"| {name} | {rank} |" in card.text for name, rank in ranks.items())
    assert f"| ranks | {sum(ranks.values())} in 4 projections" in card.text


class Hub:
    """A folder that stands for the Hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, **arguments: Any) -> str:
        assert arguments == {"revision": "main", "token": None, "allow_patterns": list(FILES)}
        return str(self.folder / repo_id)


FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_to_the_hub_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model = trained("roberta")
    assert push_peft_adapter(model, "me/adapter", facts={"accuracy": 0.9}) == "https://hub/me/adapter/commit/1"
    assert {file.name for file in (tmp_path / "me" / "adapter").iterdir()} == {*FILES, "README.md"}
    loaded = build("roberta")
    load_peft_adapter(loaded, "me/adapter", revision="main")
    same(outputs(loaded, "roberta"), outputs(model, "roberta"))


def test_without_a_network_the_hub_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'me/adapter' to be a folder or a repository on the Hub"):
        load_peft_adapter(build("roberta"), "me/adapter")


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path):
    model = trained("llama")
    model.config._name_or_path = str(tmp_path)
    save_peft_adapter(model, tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None


def test_overwriting_keeps_a_readme_of_somebody_s_own(tmp_path: Path):
    (tmp_path / "README.md").write_text("My project.")
    save_peft_adapter(trained("llama"), tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == "My project."
    save_peft_adapter(trained("llama"), tmp_path / "other", facts={"accuracy": 0.1})
    save_peft_adapter(trained("llama"), tmp_path / "other", overwrite=True, facts={"accuracy": 0.2})
    assert "| accuracy | 0.2 |" in (tmp_path / "other" / "README.md").read_text()


def test_a_rank_above_the_weight_s_is_told(tmp_path: Path):
    model = build("llama")
    add_lora(model, rank=12, init="pissa", target_modules=["q_proj"])
    save_peft_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="its rank of 24 is more than the weight's smaller side of 16"):
        load_peft_adapter(build("llama"), tmp_path)


def test_a_lightning_module_is_not_the_model_itself(tmp_path: Path):
    module = L.LightningModule()
    module.model = trained("roberta")
    for function in (save_peft_adapter, load_peft_adapter):
        with pytest.raises(ValueError, match=r"got the LightningModule .* such as module\.model"):
            function(module, tmp_path)


def test_an_adapter_in_half_precision_is_trained_in_float32(adapted: TinyTransformer, tmp_path: Path):
    save_peft_adapter(adapted, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    load_peft_adapter(model := TinyTransformer(), tmp_path)
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {torch.float32}
