"""The adapter_config.json, compared with the one that PEFT writes for the same adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    get_peft_model,
)
from torch import nn

from lalora_lightning import add_lora, lora_layers, save_peft_adapter
from tests.helpers import families

DEFAULTS = LoraConfig().to_dict()
CASES: list[tuple[Callable[[], nn.Module], str | list[str], list[str] | None]] = [
    (families.llama, ["q_proj", "v_proj"], None),
    (families.llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], None),
    (families.roberta, ["query", "value"], ["classifier"]),
    (families.t5, ["q", "v"], None),
    (families.gpt2, ["c_attn"], None),
    (families.timm_vit, ["qkv"], ["head"]),
]


def adapted(build: Callable[[], nn.Module], targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    add_lora(model, rank=4, target_modules=targets)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without differences that mean nothing: an order, and an empty name."""
    targets, name = sorted(config["target_modules"]), config["base_model_name_or_path"] or None
    return {**config, "target_modules": targets, "base_model_name_or_path": name}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("build", "targets", "in_full"), CASES)
def test_each_setting_is_that_of_peft(
    build: Callable[[], nn.Module], targets: list[str], in_full: list[str] | None, tmp_path: Path
):
    save_peft_adapter(adapted(build, targets), tmp_path / "ours")
    rank = written(tmp_path / "ours")["r"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=in_full)
    get_peft_model(build(), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (comparable(written(tmp_path / side)) for side in ("ours", "theirs"))
    assert ours == {key: theirs[key] for key in ours}
    # What is not written is what PEFT assumes.
    assert {key: theirs[key] for key in theirs.keys() - ours.keys()} == {
        key: DEFAULTS[key] for key in theirs.keys() - ours.keys()
    }
    read = [PeftConfig.from_pretrained(tmp_path / side).to_dict() for side in ("ours", "theirs")]
    assert comparable(read[0]) == comparable(read[1])


@pytest.mark.parametrize(
    ("build", "targets", "auto"),
    [
        (families.llama, ["q_proj", "v_proj"], AutoPeftModelForCausalLM),
        (families.roberta, ["query", "value"], AutoPeftModelForSequenceClassification),
        (families.roberta, ["query", "value"], AutoPeftModel),
    ],
)
def test_auto_classes_of_peft_load_base_model_and_adapter(
    build: Callable[[], nn.Module], targets: list[str], auto: type, tmp_path: Path
):
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    model = type(build()).from_pretrained(tmp_path / "base")
    add_lora(model.eval(), rank=4, target_modules=targets)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    save_peft_adapter(model, tmp_path / "adapter")
    theirs = auto.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = families.run(model)
        torch.testing.assert_close(families.run(theirs.base_model.model), expected, rtol=0, atol=1e-5)
