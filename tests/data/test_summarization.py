from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lalora_lightning.data.summarization import SummarizationDataModule

ROWS = {"article": ["a b", "c d a b c d a b"], "highlights": ["a, b", "d c b a"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer", "abcd")


def save_tokenizer(folder: Path, words: Iterable[str]) -> str:
    """Save a tokenizer of whole words: <pad> 0, </s> 1, <unk> 2, then the words. It ends texts with </s>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def write(folder: Path, splits: Iterable[str] = ("train", "validation", "test"), **rows: list) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def load(path: str, tokenizer: str, **arguments: object) -> SummarizationDataModule:
    data = SummarizationDataModule(path, tokenizer, num_workers=0, **{"batch_size": 2, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def test_texts_are_prefixed_cut_and_padded(tokenizer: str, tmp_path: Path):
    data = load(write(tmp_path, **ROWS), tokenizer, prefix="d ", max_source_length=6, max_target_length=4)
    (batch,) = data.val_dataloader()
    # A text that is cut still ends in </s>.
    assert batch["input_ids"].tolist() == [[6, 3, 4, 1, 0, 0], [6, 5, 6, 3, 4, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 2, [1] * 6]
    assert batch["labels"].tolist() == [[2, 4, 1, -100], [6, 5, 4, 1]]
    assert batch["labels"].dtype == torch.int64
    # References are complete: they keep their end and the words that the tokenizer does not know.
    assert batch["references"] == ["a, b", "d c b a"]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "references"}


def test_the_prefix_is_t5s_by_default(tokenizer: str, tmp_path: Path):
    (batch,) = load(write(tmp_path, **ROWS), tokenizer).val_dataloader()
    assert batch["input_ids"][0].tolist() == [2, 3, 4, 1] + [0] * 6


def test_columns_with_other_names(tokenizer: str, tmp_path: Path):
    path = write(tmp_path, id=["x"], dialogue=["a b c"], summary=["b"])
    data = load(path, tokenizer, source_column="dialogue", target_column="summary", prefix="")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1]]
    assert batch["labels"].tolist() == [[4, 1]]


def test_a_configuration_is_a_subfolder_where_there_is_one(tokenizer: str, tmp_path: Path):
    write(tmp_path / "hub" / "3.0.0", article=["a"], highlights=["b"])
    (batch,) = load(str(tmp_path / "hub"), tokenizer, config="3.0.0").test_dataloader()
    assert batch["references"] == ["b"]
    path = write(tmp_path / "flat", article=["a"], highlights=["c"])
    (batch,) = load(path, tokenizer, config="3.0.0").test_dataloader()
    assert batch["references"] == ["c"]


def test_without_a_test_split_the_validation_split_is_tested_on(tokenizer: str, tmp_path: Path):
    write(tmp_path, ["train"], article=["a"], highlights=["a"])
    data = load(write(tmp_path, ["validation"], article=["b"], highlights=["b"]), tokenizer)
    assert [batch["references"] for batch in data.test_dataloader()] == [["b"]]


def test_max_train_rows_draws_the_same_rows_every_time(tokenizer: str, tmp_path: Path):
    path = write(tmp_path, article=["a"] * 50, highlights=[str(i) for i in range(50)])
    first, second = (
        [row["references"] for row in load(path, tokenizer, max_train_rows=5).train_dataloader().dataset]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 5
    assert first != [str(i) for i in range(5)]
    assert len(load(path, tokenizer, max_train_rows=500).train_dataloader().dataset) == 50


def test_training_rows_are_shuffled_and_others_are_not(tokenizer: str, tmp_path: Path):
    names = [str(i) for i in range(50)]
    data = load(write(tmp_path, article=["a"] * 50, highlights=names), tokenizer, batch_size=50)
    (train,), (val,) = data.train_dataloader(), data.val_dataloader()
    assert train["references"] != names
    assert sorted(train["references"]) == sorted(names)
    assert val["references"] == names


def test_tokenized_rows_are_read_from_the_cache(tokenizer: str, tmp_path: Path):
    path = write(tmp_path / "data", **ROWS)

    def cached() -> set[str]:
        splits = load(path, tokenizer).splits.values()
        return {file["filename"] for rows in splits for file in rows.cache_files}

    first = cached()
    written = {file: Path(file).stat().st_mtime_ns for file in first}
    assert len(first) == 3
    assert cached() == first
    assert {file: Path(file).stat().st_mtime_ns for file in first} == written


def test_incomplete_folders(tokenizer: str, tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"the columns article, highlights but its columns are dialogue, summary\."
    ):
        load(write(tmp_path / "columns", dialogue=["a"], summary=["b"]), tokenizer)
    with pytest.raises(FileNotFoundError, match=r"Expected .* to have a train split but its splits are test\."):
        load(write(tmp_path / "no-train", ["test"], **ROWS), tokenizer)
    with pytest.raises(FileNotFoundError, match=r"have a validation split but its splits are train, test\."):
        load(write(tmp_path / "no-validation", ["train", "test"], **ROWS), tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Cannot load the data set '.*empty'.*`path`"):
        load(str(tmp_path / "empty"), tokenizer)
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*none' with AutoTokenizer.*`name`"):
        load(write(tmp_path / "data", **ROWS), str(tmp_path / "none"))
