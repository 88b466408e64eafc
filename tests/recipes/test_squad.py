"""The SQuAD recipe as a user runs it, cut short."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.test_squad import write
from tests.modules.test_question_answering import number_in_letters, write_model
from tests.recipes.test_recipes import recipe


def test_squad_2_on_a_local_folder(tmp_path: Path):
    data = write(
        tmp_path / "data", train=number_in_letters(160, unanswerable=0.5), validation=number_in_letters(40, 0.5)
    )
    out = recipe(
        "squad",
        "--data.version=2.0",
        f"--data.path={data}",
        f"--model.name={write_model(tmp_path / 'model')}",
        "--data.max_length=24",
        "--data.stride=4",
        "--data.num_workers=0",
        "--model.learning_rate=0.03",
        "--lalora.rank=4",
        "--trainer.max_epochs=7",
        "--trainer.accelerator=cpu",
        cwd=tmp_path,
    ).stdout
    folder = tmp_path / "lightning_logs" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["test/f1"] > 90
    assert report["test/best_f1"] >= report["test/f1"]
    # 2 layers, query and value, rank 4: 4 * 4 * (32 + 32), and the head's 32 * 2 + 2.
    assert report["trainable parameters"] == 1090
    assert len(report["ranks"]) == 2
    assert "test/no_answer_exact_match" in out
    adapter = torch.load(folder / "adapter.pt", weights_only=True)
    assert adapter["model.bert.encoder.layer.0.attention.self.query.lora_A"].shape == (4, 32)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["squad", *arguments])
        # It would go on for the tests that follow.
        monkeypatch.setattr("recipes.cli.quiet", lambda: None)
        with pytest.raises(SystemExit):
            runpy.run_module("recipes.squad", run_name="__main__")

    return run


@pytest.mark.parametrize(("version", "path", "epochs"), [("1.1", "squad", 10), ("2.0", "squad_v2", 12)])
def test_squad_shows_its_settings(
    version: str, path: str, epochs: int, in_process: Callable[..., None], capsys: pytest.CaptureFixture
):
    in_process(f"--data.version={version}", "--print_config")
    config = capsys.readouterr().out
    for line in (
        f"version: '{version}'",
        f"path: rajpurkar/{path}\n",
        f"max_epochs: {epochs}\n",
        "name: microsoft/deberta-v3-base",
        "learning_rate: 0.001",
        "batch_size: 16",
        "monitor: val/f1",
        "rank: 8",
    ):
        assert line in config


def test_squad_in_an_unknown_version(in_process: Callable[..., None], capsys: pytest.CaptureFixture):
    in_process("--data.version=3.0")
    assert "Expected a typing.Literal['1.1', '2.0']. Got value: 3.0" in capsys.readouterr().err
