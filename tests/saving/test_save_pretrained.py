"""Folders that transformers' save_pretrained writes from an adapted model."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lalora_lightning import add_lora, load_lora_state_dict, lora_layers, merge_lora, save_peft_adapter
from lalora_lightning.transformers_trainer import LaLoraTrainerCallback
from tests.helpers import families
from tests.helpers.families import TEXT
from tests.helpers.models import TinyTransformer, unchanged


def said(function: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("La-LoRA")]


def trained(model: nn.Module) -> nn.Module:
    add_lora(model, rank=4)
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.3)
        layer.set_rank(1 + i % 4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data.add_(0.1)
    return model.eval()


def test_save_pretrained_of_an_adapted_model_warns_once(tmp_path: Path):
    model = trained(families.llama())
    messages = said(lambda: [model.save_pretrained(tmp_path), model.save_pretrained(tmp_path)])
    assert len(messages) == 1
    for part in ("LlamaForCausalLM", "save_peft_adapter(model, folder)", "merge_lora(model, remove=True)"):
        assert part in messages[0]
    assert len(said(lambda: trained(families.llama()).save_pretrained(tmp_path))) == 1


def test_other_ways_to_save_say_nothing(tmp_path: Path):
    model = trained(families.llama())
    assert said(model.state_dict) == []
    assert said(lambda: [torch.save(model, tmp_path / "model"), copy.deepcopy(model), pickle.dumps(model)]) == []
    assert said(lambda: save_peft_adapter(model, tmp_path / "adapter")) == []
    merge_lora(model, remove=True)
    assert said(lambda: model.save_pretrained(tmp_path / "merged")) == []
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(families.run(merged), families.run(model))


def test_a_model_of_huggingface_hub_and_a_compiled_one_warn(tmp_path: Path):
    class Shared(TinyTransformer, PyTorchModelHubMixin):
        pass

    assert len(said(lambda: trained(Shared()).save_pretrained(tmp_path))) == 1
    compiled = torch.compile(trained(families.llama()), backend="eager")
    assert len(said(lambda: compiled.save_pretrained(tmp_path))) == 1


def test_the_checkpoints_of_transformers_trainer_warn_once_and_are_read(tmp_path: Path):
    base = families.llama()
    model = copy.deepcopy(base)
    add_lora(model, rank=4)
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]
    settings = {"save_steps": 2, "max_steps": 4, "report_to": "none", "use_cpu": True, "learning_rate": 0.01}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, disable_tqdm=True, **settings)
    assert len(said(Trainer(model, arguments, train_dataset=rows, callbacks=[LaLoraTrainerCallback()]).train)) == 1
    load_lora_state_dict(base, tmp_path / "checkpoint-4")
    torch.testing.assert_close(families.run(base.eval()), families.run(model.eval()))


@pytest.mark.parametrize("family", ["roberta", "t5", "llama", "gpt2"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_folder_of_save_pretrained_is_read(tmp_path: Path, family: str, size: str):
    base = getattr(families, family)().eval()
    model = trained(copy.deepcopy(base))
    model.save_pretrained(tmp_path, max_shard_size=size)
    load_lora_state_dict(base, tmp_path)
    assert torch.equal(families.run(base), families.run(model))


def test_a_folder_with_a_trained_tied_embedding_is_read(tmp_path: Path):
    base = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()
    model = copy.deepcopy(base)
    add_lora(model, rank=2, modules_to_save=["embed_tokens"])
    model.model.embed_tokens.weight.data.add_(torch.randn_like(model.model.embed_tokens.weight))
    model.save_pretrained(tmp_path)
    load_lora_state_dict(base, tmp_path)
    assert torch.equal(families.run(base), families.run(model))


def test_folders_without_weights_with_an_adapter_or_damaged_ones_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        load_lora_state_dict(TinyTransformer(), tmp_path)
    save_peft_adapter(trained(TinyTransformer()), tmp_path / "adapter")
    with pytest.raises(ValueError, match="got a PEFT adapter; use load_peft_adapter"):
        load_lora_state_dict(TinyTransformer(), tmp_path / "adapter")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    model = TinyTransformer()
    with pytest.raises(ValueError, match="is damaged"):
        load_lora_state_dict(model, tmp_path)
    assert unchanged(model)
