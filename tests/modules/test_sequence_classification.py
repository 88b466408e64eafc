"""The metrics against scikit-learn and scipy, and a tiny model that learns."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from scipy import stats
from sklearn import metrics as reference
from torch import nn
from torch.utils.data import DataLoader

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from tests.helpers.training import new_trainer

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**CONFIG)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def batches(labels: torch.Tensor, size: int = 32) -> DataLoader:
    """Texts with token 5 if the label is 1 or larger and token 6 if it is 2."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 20, (len(labels), 6), generator=generator)
    ids[:, 1] = torch.where(labels >= 0.5, 5, ids[:, 1])
    ids[:, 2] = torch.where(labels >= 1.5, 6, ids[:, 2])
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=size)


class Answers(nn.Module):
    """In place of a model: returns ``logits[i]`` for a row whose first token is i."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids[:, 0]], loss=torch.tensor(0.0))


def score(folder: str, tmp_path: Path, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    module = SequenceClassificationModule(folder, num_labels=logits.shape[1])
    module.model = Answers(logits)
    rows = [{"input_ids": torch.tensor([i]), "labels": label} for i, label in enumerate(labels)]
    (scores,) = new_trainer(tmp_path).test(module, DataLoader(rows, batch_size=32), verbose=False)
    return scores


@pytest.mark.parametrize("num_labels", [2, 3])
def test_metrics_of_classification(folder: str, tmp_path: Path, num_labels: int):
    labels = torch.randint(num_labels, (250,))
    logits = torch.randn(250, num_labels) + nn.functional.one_hot(labels, num_labels)
    answers = logits.argmax(1).numpy()
    expected = {
        "test/accuracy": reference.accuracy_score(labels.numpy(), answers),
        "test/matthews": reference.matthews_corrcoef(labels.numpy(), answers),
    }
    if num_labels == 2:
        expected["test/f1"] = reference.f1_score(labels.numpy(), answers)
    assert score(folder, tmp_path, logits, labels) == pytest.approx(expected, abs=1e-5)


def test_metrics_of_regression(folder: str, tmp_path: Path):
    labels = 5 * torch.rand(250)
    logits = labels[:, None] + torch.randn(250, 1)
    answers = logits.squeeze(1)
    expected = {
        "test/pearson": stats.pearsonr(answers, labels)[0],
        "test/spearman": stats.spearmanr(answers, labels)[0],
    }
    assert score(folder, tmp_path, logits, labels) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_learns_with_the_callback(folder: str, tmp_path: Path, num_labels: int):
    labels = torch.arange(96) % max(2, num_labels)
    loader = batches(labels.float() if num_labels == 1 else labels, size=16)
    module = SequenceClassificationModule(folder, num_labels, learning_rate=0.02, gradient_checkpointing=True)
    callback = LaLoraCallback(rank=4, gamma=4.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=40)
    trainer.fit(module, loader, loader)
    assert "val/loss" in trainer.callback_metrics
    (scores,) = trainer.test(module, loader, verbose=False)
    assert len(lora_layers(module)) == 4
    assert scores.get("test/accuracy", scores.get("test/pearson")) > 0.95
    assert sum(callback.history[-1][1]) > 2


def test_a_model_that_does_not_exist(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"Cannot load '.*nothing' with AutoModelForSequenceClassification .*`name`"
    ):
        SequenceClassificationModule(str(tmp_path / "nothing"), 2)
