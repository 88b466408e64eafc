"""Names that end alike or hold characters of regular expressions, as PEFT matches them."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lalora_lightning import add_lora, load_peft_adapter, lora_layers, save_peft_adapter
from lalora_lightning.saving.peft_names import exact_pattern, pattern_value, target_modules, with_namesakes

X = torch.linspace(-1, 1, 24).view(3, 8)


class Chain(nn.Module):
    """Linear layers under given names, one after the other; a dot makes a module of modules."""

    def __init__(self, names: Sequence[str], head: str = "head") -> None:
        super().__init__()
        self.names = [*names, head]
        for name in self.names:
            parent, parts = self, name.split(".")
            for part in parts[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(parts[-1], nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x).tanh()
        return x


def adapt(base: nn.Module, targets: Any, head: str = "head") -> nn.Module:
    model = copy.deepcopy(base)
    add_lora(model, rank=4, target_modules=targets, modules_to_save=re.escape(head))
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B)
        layer.set_rank(1 + i % 4)
    for parameter in model.get_submodule(head).parameters():
        parameter.data.add_(0.1)
    return model


@torch.no_grad()
def require_round_trip(base: nn.Module, model: nn.Module, folder: Path) -> dict[str, Any]:
    assert (base(X) - model(X)).abs().max() > 1e-3
    for uniform in (True, False):
        save_peft_adapter(model, folder, uniform=uniform, overwrite=True)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        ours = copy.deepcopy(base)
        load_peft_adapter(ours, folder)
        for got in (theirs(X), ours(X)):
            torch.testing.assert_close(got, model(X), rtol=0, atol=1e-6)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    "names",
    [
        ["c++.q", "a(b.q", "x|y.q", "en-de.q", "a*.q"],
        ["[ab].q", "a.q"],
        ["c+.q", "c.q", "cc.q"],
        ["a.q", "aXq.q", "a_q"],
        ["layer.1.q", "layer.11.q", "inner.layer.1.q", "q"],
    ],
)
def test_every_layer_keeps_its_rank(names: list[str], tmp_path: Path):
    base = Chain(names)
    require_round_trip(base, adapt(base, names), tmp_path)


def test_a_layer_that_is_not_adapted_gets_no_adapter_in_peft(tmp_path: Path):
    base = Chain(["q", "inner.q"])
    config = require_round_trip(base, adapt(base, "q"), tmp_path)
    assert config["target_modules"] == "q"
    theirs = PeftModel.from_pretrained(base, tmp_path)
    assert {name.partition(".lora_")[0] for name, _ in theirs.named_parameters() if "lora_" in name} == {
        "base_model.model.q"
    }


@pytest.mark.parametrize("head", ["fc", "h*", "b+", "en-de"])
def test_a_head_whose_name_other_modules_end_with(head: str, tmp_path: Path):
    base = Chain(["block.q", "block.fc", "block.c_fc"], head)
    config = require_round_trip(base, adapt(base, ["q"], head), tmp_path)
    assert config["modules_to_save"] == [head]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("proj", r"ends with proj, here block\.q_proj, where block\.q_proj is adapted"),
        ("h(", r"Expected names that PEFT can read as regular expressions but got h\( \("),
        ("[qx]_proj", r"as a regular expression \[qx\]_proj matches block\.q_proj"),
    ],
)
def test_heads_that_peft_would_confuse_with_adapted_layers_are_refused(head: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        save_peft_adapter(adapt(Chain(["block.q_proj"], head), ["q_proj"], head), tmp_path)


def test_a_head_inside_of_a_module_of_the_same_name_is_refused(tmp_path: Path):
    base = Chain(["q"])
    base.head.head = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"ends with head, here head and again head\.head inside of it"):
        save_peft_adapter(adapt(base, ["q"]), tmp_path)


@pytest.mark.parametrize("pattern", ["towers.c+.q", "towers.[ab].q", "c.q", "^towers.d.q", r"towers\.\w\.q"])
def test_patterns_of_peft_mean_the_same_here(pattern: str, tmp_path: Path):
    base = Chain(["towers.c+.q", "towers.c.q", "towers.[ab].q", "towers.a.q", "towers.d.q"])
    settings = {"target_modules": ["q"], "alpha_pattern": {pattern: 32}, "init_lora_weights": False}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, **settings))
    theirs.save_pretrained(tmp_path)
    load_peft_adapter(base, tmp_path)
    torch.testing.assert_close(base(X), theirs(X), rtol=0, atol=1e-6)


def test_names_stay_plain_where_they_are_clear():
    names = ["a.q", "b.q", "inner.a.q", "c+.q"]
    assert exact_pattern("b.q", names) == "b.q"
    assert exact_pattern("a.q", names) == r"^a\.q"
    assert exact_pattern("c+.q", names) == r"^c\+\.q"
    assert pattern_value({"b.q": 1, "q": 2}, "b.q", 8) == 1
    assert pattern_value({"v": 1}, "b.q", 8) == 8


def test_targets_have_the_shortest_names_that_select_nothing_else():
    names = ["", "a", "a.q", "a.v", "b", "b.q", "b.v", "inner.a.q", "inner.q_proj"]
    assert target_modules(["a.q", "b.q", "inner.a.q"], names) == ["q"]
    assert target_modules(["a.q", "inner.a.q", "b.v"], names) == ["a.q", "b.v"]
    assert target_modules(["inner.a.q", "b.q", "a.v", "b.v"], names) == ["b.q", "inner.a.q", "v"]
    assert target_modules(["a.q", "b.q"], names) == r"a\.q|b\.q"


def test_namesakes_keep_the_names_of_the_targets_short():
    names = ["", "a", "a.q", "a.v", "b", "b.q", "b.v", "b.k"]
    adapted = ["a.q", "a.v", "b.q", "b.k"]
    assert with_namesakes(["a.q"], adapted, names) == ["a.q", "b.q"]
    assert target_modules(["a.q", "b.q"], names) == ["q"]
    # b.v is not adapted, so that a.v needs its whole name.
    assert with_namesakes(["a.v", "b.q"], adapted, names) == ["a.q", "a.v", "b.q"]
    assert with_namesakes(["b.k"], adapted, names) == ["b.k"]
    # No names but a regular expression select inner.q without b.inner.q, and q without a.q.
    assert with_namesakes(["q"], ["q", "inner.q"], ["q", "a.q", "inner.q", "b.inner.q"]) == ["q"]
