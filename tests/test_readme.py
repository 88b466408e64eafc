"""The Python of the README and of two pages that continue it, run as it stands."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lalora_lightning import lora_layers
from tests.helpers.models import TinyTransformer
from tests.helpers.training import TinyClassifier

README = Path(__file__).parents[1] / "README.md"


def python_snippets(page: str, section: str = "") -> list[str]:
    """Return the Python of a page, or of the section with this heading."""
    text = (README.parent / page).read_text(encoding="utf-8")
    part = text if not section else text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snippets = python_snippets("README.md")
    assert len(snippets) == 5
    callback_snippets = python_snippets("docs/callback.md")
    assert len(callback_snippets) == 3
    loop_snippets = python_snippets("docs/interoperability.md", "Training loops")
    assert len(loop_snippets) == 2
    monkeypatch.chdir(tmp_path)
    # Small models stand for those on the Hub.
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    berts = [bert, copy.deepcopy(bert)]
    monkeypatch.setattr(
        "transformers.AutoModelForSequenceClassification.from_pretrained", lambda *_, **__: berts.pop(0)
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: vit)

    module = TinyClassifier()
    module.model = TinyTransformer(width=16)
    x = torch.randn(6, 4, 5, 16)
    labels = torch.arange(4) % 2
    ids = torch.randint(20, (4, 6))
    names = {
        "torch": torch,
        "module": module,
        "data": DataLoader(TensorDataset(x[0], labels), batch_size=4),
        "texts": DataLoader([{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)], batch_size=2),
        "images": DataLoader(TensorDataset(torch.rand(4, 3, 16, 16), labels), batch_size=2),
        "model": TinyTransformer(width=16),
        "network": TinyTransformer(width=16),
        "batches": [(inputs, labels) for inputs in x],
    }
    for snippet in snippets:
        exec(snippet, names)
    assert names["trainer"].global_step == 3
    assert (tmp_path / "adapter.pt").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    # The last line trimmed the model to its ranks.
    assert names["model"].blocks[0].query.max_rank == names["allocator"].ranks[0]

    for snippet in callback_snippets:
        exec(snippet, names)
    assert names["callback"].adapter_settings.rank == 16
    assert names["callback"].adapter_settings.target_modules == ["to_q", "to_v"]
    for adapted in (bert, vit):
        assert all(layer.lora_B.any() for layer in lora_layers(adapted).values())

    names["model"] = TinyTransformer(width=16)
    for snippet in loop_snippets:
        exec(snippet, names)
    assert all(layer.lora_B.any() for layer in lora_layers(names["model"]).values())
    assert names["fabric"] is not None
    assert all(layer.lora_B.any() for layer in lora_layers(names["network"]).values())
    assert all(layer.lora_B.any() for layer in lora_layers(names["classifier"]).values())


def test_snippets_about_targets_rank_and_budget(capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {}
    snippets = python_snippets("docs/choosing.md")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, names)
    assert names["allocator"].condensed
    # The costs are equal, so each of the two layers of 128 parameters a rank has at most 4 and 2 on average.
    assert "1,024 of 2,048 adapter parameters kept" in capsys.readouterr().out
    assert int(names["allocator"].ranks.sum()) <= 4
    assert names["callback"].condensing.average_rank == 2


def test_files_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


@pytest.mark.parametrize("page", ["reliability", "interoperability"])
def test_tests_named_in_the_docs_exist(page: str):
    text = (README.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    # A file whose name occurs in two folders is named by its path.
    named = re.findall(r"`(?:((?:tests/[\w/]+/)?test_\w+\.py))?(?:::(test_\w+))?`", text)
    assert len(named) > 10
    file = ""
    for name, function in named:
        file = name or file
        if function:
            (path,) = Path(__file__).parent.rglob(file.removeprefix("tests/"))
            assert f"\ndef {function}(" in path.read_text(encoding="utf-8"), function
