"""PEFT folders that hold what no adapter can: the documented error, and a model that is left as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lalora_lightning import load_peft_adapter, save_peft_adapter
from tests.helpers.models import TinyTransformer, unchanged

A, B = (f"base_model.model.blocks.0.query.lora_{side}.weight" for side in "AB")
HEAD = "base_model.model.head.weight"


def changed_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    weights = {**load_file(folder / "adapter_model.safetensors"), **tensors}
    save_file({key: value for key, value in weights.items() if value is not None}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {"(": 8}}, "missing \\), unterminated subpattern"),
        ({"alpha_pattern": ["q"]}, "expected alpha_pattern to be an object"),
        ({"alpha_pattern": {".*": "16"}}, "lora_alpha to be positive and finite but got '16'"),
        ({"lora_alpha": None}, "got None"),
        ({"lora_alpha": "16"}, "got '16'"),
        ({"lora_alpha": True}, "got True"),
        ({"lora_alpha": -1}, "got -1"),
        ({"lora_alpha": 0}, "got 0"),
        ({"lora_alpha": float("nan")}, "got nan"),
        ({"lora_alpha": 10**400}, "too large|got 1"),
        ({"use_rslora": "false"}, "use_rslora a bool"),
    ],
)
def test_settings(adapted: TinyTransformer, tmp_path: Path, config: dict[str, Any], message: str):
    save_peft_adapter(adapted, tmp_path)
    changed_folder(tmp_path, config, {})
    model = TinyTransformer()
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path)
    assert unchanged(model)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: torch.zeros(0, 8), B: torch.zeros(8, 0)}, "its rank is 0"),
        ({A: torch.tensor(1.0)}, "blocks.0.query"),
        ({A: torch.zeros(4)}, "expected lora_A and lora_B of shapes"),
        ({A: torch.ones(4, 8, dtype=torch.int32)}, "expected lora_A to hold finite floating-point numbers"),
        ({A: torch.ones(4, 8, dtype=torch.bool)}, "expected lora_A to hold finite"),
        ({B: torch.full((8, 4), float("nan"))}, "expected lora_B to hold finite"),
        ({B: torch.full((8, 4), float("inf"))}, "expected lora_B to hold finite"),
        ({B: None}, "lora_B is missing"),
        ({HEAD: torch.ones(2, 8, dtype=torch.int64)}, r"head\.weight does not fit the model"),
        ({HEAD: torch.full((2, 8), float("nan"))}, r"head\.weight does not fit the model"),
        ({A: torch.ones(4, 8).to(torch.float8_e4m3fn)}, "Float8"),
        ({HEAD: torch.ones(2, 8, dtype=torch.complex64)}, r"head\.weight does not fit the model"),
    ],
)
def test_tensors(adapted: TinyTransformer, tmp_path: Path, tensors: dict[str, Tensor | None], message: str):
    save_peft_adapter(adapted, tmp_path)
    changed_folder(tmp_path, {}, tensors)
    model = TinyTransformer()
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path)
    assert unchanged(model)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\ufeff{}", '"LORA"', "null"])
def test_configurations_that_are_no_object(adapted: TinyTransformer, tmp_path: Path, text: str):
    save_peft_adapter(adapted, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="Expected"):
        load_peft_adapter(TinyTransformer(), tmp_path)
