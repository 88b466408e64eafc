"""The tasks of comparisons."""

from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from recipes.comparison import tasks
from recipes.comparison.tasks import TaskSettings, build_task
from tests.data.test_commonsense import build_model
from tests.data.test_glue import tokenizer, write  # noqa: F401
from tests.recipes.comparison.test_compare import run


def test_one_seed_gives_one_order(settings: TaskSettings):
    task = build_task("digits", settings)
    orders = [[y.tolist() for _, y in task.loaders(seed, "test")[0]["train_dataloaders"]] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_rows_to_train_on_to_choose_with_and_to_test_are_different_rows(settings: TaskSettings):
    task = build_task("digits", settings)
    fit, chosen_on = task.loaders(0, "selection")
    again, tested_on = task.loaders(1, "test")
    train, selection, test = (
        {tuple(image.flatten().tolist()) for image in loader.dataset.tensors[0]}
        for loader in (fit["train_dataloaders"], chosen_on["dataloaders"], tested_on["dataloaders"])
    )
    # No two of the digits are the same.
    assert (len(train), len(selection), len(test)) == (958, 240, 599)
    assert len(train | selection | test) == 1797
    # The same rows for each seed, and whatever is scored.
    assert fit["train_dataloaders"].dataset.tensors[0].equal(again["train_dataloaders"].dataset.tensors[0])


def test_glue(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights this large make predictions differ enough for torchmetrics before 1.9 to correlate them.
    encoder = BertModel(BertConfig(vocab_size=8, initializer_range=0.5, **size))
    # As in sentence encoders, the encoder has been trained and its pooler has not.
    for block in encoder.encoder.layer:
        torch.nn.init.normal_(block.attention.self.query.bias)
    encoder.save_pretrained(tokenizer)
    rows = {"sentence1": ["a b"] * 9, "sentence2": ["c", "d", "a"] * 3, "label": [0.0, 2.5, 5.0] * 3}
    data = write(tmp_path / "glue", "stsb", **rows)
    settings = TaskSettings(glue_path=data, model=tokenizer, epochs=2, batch_size=3, max_train_rows=6)
    (record,) = run(settings, tmp_path / "a.jsonl", tasks=["glue/stsb"], methods=["lora:rank=2"], seeds=[0])
    assert record["metric"] == "test/pearson"
    assert record["steps"] == 4
    assert sorted(record["scores"]) == ["test/pearson", "test/spearman"]
    # Where its folder is does not matter, what is in it does.
    assert record["task_settings"]["model"] == f"{tmp_path.name}/tokenizer"
    assert [record["task_settings"][f"{rows}_rows"] for rows in ("train", "selection", "test")] == [4, 2, 9]
    assert record["score"] == record["scores"]["test/pearson"]

    # LoRA at rank 2 on query and value of two blocks of width 16, and the head: the pooler and the output.
    assert record["trainable_parameters"] == 2 * 2 * 2 * 32 + (16 * 16 + 16) + (16 + 1)

    task = build_task("glue/stsb", settings)
    assert [len(task.loaders(0, rows)[1]["dataloaders"].dataset) for rows in ("selection", "test")] == [2, 9]
    data_module = task.loaders(0, "test")[0]["datamodule"]
    orders = []
    for seed in (3, 3, 4):
        pl.seed_everything(seed)
        orders.append(list(data_module.train_dataloader().sampler))
    assert orders[0] == orders[1] != orders[2]


def test_next_tokens_of_dialogsum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The score is the share of the right next tokens, computed here one text at a time."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = build_model(tmp_path / "llama")
    data = tmp_path / "dialogsum"
    data.mkdir()
    texts = ["the answer is true", "the answer", "true is the answer", "is the the answer the"]
    for split in ("train", "test"):
        rows = {"dialogue": ["unused"] * 20, "summary": texts * 5}
        datasets.Dataset.from_dict(rows).to_parquet(data / f"{split}.parquet")
    size = {"steps": 3, "batch_size": 4, "max_length": 5, "max_train_rows": 15}
    settings = TaskSettings(dialogsum_path=str(data), language_model=str(folder), **size)
    (record,) = run(settings, tmp_path / "a.jsonl", tasks=["dialogsum"], methods=["lora:rank=2"], seeds=[0])
    assert record["metric"] == "test/token_accuracy"
    assert [record["task_settings"][f"{rows}_rows"] for rows in ("train", "selection", "test")] == [12, 3, 20]

    task = build_task("dialogsum", settings)
    module = task.new_module(1e-2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=20, enable_model_summary=False, **quiet)
    trainer.fit(module, **task.loaders(0, "test")[0])
    module.eval()
    right = []
    encode = AutoTokenizer.from_pretrained(folder)
    for text in texts * 5:
        tokens = torch.tensor(encode(text)["input_ids"][:5])
        predicted = module.model(tokens[None]).logits[0, :-1].argmax(-1)
        right += (predicted == tokens[1:]).tolist()
    (scores,) = trainer.test(module, **task.loaders(0, "test")[1], verbose=False)
    assert scores["test/token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


def test_cifar10_adapts_to_the_classes_that_were_not_pretrained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "data").mkdir()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split, count in (("train", 50), ("test", 10)):
        images = [Image.new("RGB", (32, 32), (5 * i, 0, 0)) for i in range(count)]
        rows = {"img": images, "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    seen = []

    def pretrain(model: Any, data: Any, steps: int) -> dict[str, torch.Tensor]:
        seen.append(data.tensors[1].tolist())
        return {name: value for name, value in model.state_dict().items() if not name.startswith("model.head.")}

    monkeypatch.setattr(tasks.digits, "pretrain", pretrain)
    settings = TaskSettings(cifar10_path=str(tmp_path / "data"), steps=2, batch_size=5, cache=tmp_path)
    task = build_task("cifar10", settings)
    build_task("cifar10", settings)
    # Each image and its mirror image, once: the second time the backbone is there.
    assert seen == [[0, 1, 2, 3, 4] * 10]
    (images, labels), *_ = task.loaders(0, "test")[1]["dataloaders"]
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images[:, 0, 0, 0].tolist() == pytest.approx([5 * i / 255 for i in range(5, 10)])
    fit, chosen_on = task.loaders(0, "selection")
    trained = fit["train_dataloaders"].dataset.tensors
    (selection, chosen), *_ = chosen_on["dataloaders"]
    assert trained[1].bincount().tolist() == [8, 8, 8, 8, 8]
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4]
    # Neither an image nor its mirror image is on both sides; each image here has its own color.
    assert not set(trained[0][:, 0, 0, 0].tolist()) & set(selection[:, 0, 0, 0].tolist())
    backbones = [task.new_module(1e-3).model.blocks[0].attn.qkv.weight for _ in range(2)]
    assert torch.equal(*backbones)
