"""Lower the ranks of a trained PEFT adapter, on a tiny encoder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from recipes.benchmarks import conversion
from recipes.comparison.tasks import TaskSettings
from tests.data.test_glue import _cache, tokenizer, write  # noqa: F401


def test_conversion(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture):  # noqa: F811
    pytest.importorskip("peft.tuners.lora.conversion", reason="a newer peft converts adapters to LoRA")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=8, initializer_range=0.5, **size))
    for block in encoder.encoder.layer:
        # The encoder has been trained and its pooler has not, so the pooler is part of the head.
        torch.nn.init.normal_(block.attention.self.query.bias)
    encoder.save_pretrained(tokenizer)
    rows = {"sentence1": ["a b"] * 9, "sentence2": ["c", "d", "a"] * 3, "label": [0.0, 2.5, 5.0] * 3}
    data = write(tmp_path / "glue", "stsb", **rows)
    settings = TaskSettings(glue_path=data, model=tokenizer, epochs=3, batch_size=3)
    conversion.main(settings, seeds=1, learning_rate=1e-2, rank=8, to=2, json=tmp_path / "out.json")
    results = {r["conversion"]: r for r in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert tuple(results) == conversion.CONVERSIONS
    # Per rank and block: four projections of 16 x 16 and two of 16 x 32.
    assert results["as trained"]["parameters"] == 8 * 2 * (4 * 32 + 2 * 48)
    assert results["as trained"]["error"] == 0
    limit = results["PEFT, one rank"]["parameters"]
    assert limit == 2 * 2 * (4 * 32 + 2 * 48)
    assert limit >= results["condense_lora"]["parameters"] > 0.9 * limit
    # At equal parameters, what carries the most per parameter carries at least as much as the same rank everywhere.
    assert 0 < results["condense_lora"]["error"] <= results["PEFT, one rank"]["error"]
    assert "condense_lora" in capsys.readouterr().out
