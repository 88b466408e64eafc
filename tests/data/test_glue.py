from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lalora_lightning.data.glue import TEXT_COLUMNS, GlueDataModule


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """Save a tokenizer of whole words, with [CLS] first and [SEP] after each text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(folder: Path, task: str, **rows: list) -> str:
    for split in ("train", "validation", "test"):
        (folder / task).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(tokenizer: str, path: str, task: str, **arguments: object) -> GlueDataModule:
    data = GlueDataModule(task, tokenizer, path, num_workers=0, batch_size=2, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_pairs_are_joined_cut_and_padded(tokenizer: str, tmp_path: Path):
    path = write(
        tmp_path / "glue", "mrpc", sentence1=["a b", "c"], sentence2=["d", "a b c d a b c d"], label=[1, 0], idx=[0, 1]
    )
    data = load(tokenizer, path, "mrpc", max_length=8)
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3, 7, 3, 0, 0], [2, 6, 3, 4, 5, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert batch["labels"].tolist() == [1, 0]
    assert data.num_labels == 2


def test_regression_keeps_its_targets(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "glue", "stsb", sentence1=["a"], sentence2=["b"], label=[2.6])
    data = load(tokenizer, path, "stsb")
    (batch,) = data.test_dataloader()
    torch.testing.assert_close(batch["labels"], torch.tensor([2.6]))
    assert data.num_labels == 1


def test_max_train_rows_draws_the_same_training_rows_every_time(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "glue", "cola", sentence=list("abcd") * 5, label=[0, 1] * 10)
    data = load(tokenizer, path, "cola", max_train_rows=6)
    assert len(data.train_dataloader().dataset) == 6
    assert len(data.val_dataloader().dataset) == 20
    rows = [row["input_ids"] for row in data.train_dataloader().dataset]
    assert rows == [
        row["input_ids"] for row in load(tokenizer, path, "cola", max_train_rows=6).train_dataloader().dataset
    ]


def test_prepared_data_are_read_from_the_cache(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "glue", "cola", sentence=["a", "b"], label=[0, 1])
    first, second = (load(tokenizer, path, "cola").train_dataloader().dataset for _ in range(2))
    assert first.cache_files == second.cache_files != []
    assert first._fingerprint == second._fingerprint


def test_what_is_missing_is_said(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "glue", "cola", sentence=["a"], label=[0])
    with pytest.raises(FileNotFoundError, match=r"Cannot load the data set '.*glue/rte'.*`path`"):
        load(tokenizer, path, "rte")
    write(tmp_path / "glue", "qnli", sentence=["a"], label=[0])
    with pytest.raises(
        FileNotFoundError, match="to have the columns question, sentence, label but its columns are sent"
    ):
        load(tokenizer, path, "qnli")
    with pytest.raises(FileNotFoundError, match=r"with AutoTokenizer .*`name`"):
        load(str(tmp_path / "nothing"), path, "cola")


def test_labels_outside_the_classes(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "glue", "cola", sentence=["a", "b", "c"], label=[0, 2, -1])
    with pytest.raises(ValueError, match="Expected labels of cola to be from 0 to 1 but its train split has -1, 2"):
        load(tokenizer, path, "cola")


@pytest.mark.parametrize("task", ["cola", "mrpc", "sst2", "stsb"])
def test_real_data(tokenizer: str, task: str):
    path = Path(__file__).parents[3] / "shared" / "data" / "glue"
    if not path.is_dir():
        pytest.skip("real data are not here")
    data = load(tokenizer, str(path), task, max_train_rows=50)
    assert len(data.train_dataloader().dataset) == 50
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].dtype == (torch.float32 if task == "stsb" else torch.int64)
    assert set(TEXT_COLUMNS) == {"cola", "sst2", "mrpc", "stsb", "qnli", "rte", "mnli"}
