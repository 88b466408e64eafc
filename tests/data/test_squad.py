import collections
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lalora_lightning.data import squad_windows
from lalora_lightning.data.squad import SquadDataModule

Row = tuple[str, str, list[str]]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, **splits: list[Row]) -> Path:
    """Write rows (question, context, answers) as parquet in the Hub's layout; each answer is where it first occurs."""
    for split, rows in splits.items():
        data = {
            "id": [f"{split}-{i}" for i in range(len(rows))],
            "title": [""] * len(rows),
            "context": [context for _, context, _ in rows],
            "question": [question for question, _, _ in rows],
            "answers": [
                {"text": answers, "answer_start": [context.index(answer) for answer in answers]}
                for _, context, answers in rows
            ],
        }
        features = datasets.Features(
            {
                **{name: datasets.Value("string") for name in ("id", "title", "context", "question")},
                "answers": {
                    "text": datasets.List(datasets.Value("string")),
                    "answer_start": datasets.List(datasets.Value("int32")),
                },
            }
        )
        (folder / "plain_text").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(data, features).to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    return folder


def write_tokenizer(folder: Path, texts: list[str]) -> Path:
    """Save a word piece tokenizer, lower case, of the 1,000 most frequent words; it splits others into letters."""
    normalizer, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = collections.Counter(
        word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted(set("".join(words)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = dict.fromkeys(
        [*special, *letters, *(f"##{letter}" for letter in letters), *(word for word, _ in words.most_common(1000))]
    )
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def load(folder: Path, tokenizer: Path, **arguments: object) -> SquadDataModule:
    data = SquadDataModule(
        **{
            "version": "1.1",
            "tokenizer": str(tokenizer),
            "path": str(folder),
            "batch_size": 4,
            "num_workers": 0,
            **arguments,
        }
    )
    data.prepare_data()
    data.setup("fit")
    return data


LETTERS = [chr(ord("a") + i) for i in range(26)]
ROWS = [
    ("  what follows b ?", " ".join(LETTERS), ["c"]),
    ("what is near v ?", " ".join(LETTERS), ["w x", "w"]),
    ("what is z ?", "a z", ["z"]),
]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("letters"), [" ".join(LETTERS), *(row[0] for row in ROWS)])


def test_windows_of_a_long_context(tmp_path: Path, letters: Path):
    """Three special tokens and a question of four or five words leave 10 or 9 of 17 tokens; windows share 4."""
    data = load(write(tmp_path, train=ROWS, validation=ROWS), letters, max_length=17, stride=4, batch_size=20)
    (batch,) = data.val_dataloader()
    starts = [offsets[offsets[:, 0] >= 0][0, 0].item() // 2 for offsets in batch["offsets"]]
    lengths = [(offsets[:, 0] >= 0).sum().item() for offsets in batch["offsets"]]
    assert batch["question"] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert starts == [0, 6, 12, 18, 0, 5, 10, 15, 20, 0]
    assert lengths == [10, 10, 10, 8, 9, 9, 9, 9, 6, 2]
    # "c" is only in the first window, after 1 + 4 + 1 + 2 tokens; "w x" are tokens 22 and 23 of the context.
    assert batch["start_positions"].tolist() == [8, 0, 0, 0, 0, 0, 0, 7 + 7, 7 + 2, 6 + 1]
    assert batch["end_positions"].tolist() == [8, 0, 0, 0, 0, 0, 0, 7 + 8, 7 + 3, 6 + 1]
    assert batch["references"][4] == ["w x", "w"]
    assert batch["context"][-1] == "a z"
    # Padded to the longest window of the batch.
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (10, 17)
    assert batch["attention_mask"].sum(1).tolist() == [17, 17, 17, 15, 17, 17, 17, 17, 14, 9]
    assert batch["offsets"].shape == (10, 17, 2)
    # Training batches hold the model's inputs only.
    assert set(next(iter(data.train_dataloader()))) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }


def test_max_train_rows_is_a_number_of_questions(tmp_path: Path, letters: Path):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    small = load(folder, letters, max_train_rows=2).train_dataloader().dataset
    assert len(small) == 2
    assert small[0] == load(folder, letters, max_train_rows=2).train_dataloader().dataset[0]


def test_tokenized_windows_are_read_from_the_cache(tmp_path: Path, letters: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    first = load(folder, letters)

    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(squad_windows, "_require_room", fail)
    again = load(folder, letters)
    assert again.val_dataloader().dataset[:] == first.val_dataloader().dataset[:]
    with pytest.raises(AssertionError, match="tokenized again"):
        load(folder, letters, stride=5)


def test_questions_without_answer(tmp_path: Path, letters: Path):
    rows = [ROWS[0], ("what is q ?", "a b c", [])]
    folder = write(tmp_path, train=rows, validation=rows)
    (batch,) = load(folder, letters, version="2.0").val_dataloader()
    assert batch["references"] == [["c"], []]
    assert batch["start_positions"].tolist() == [8, 0]
    with pytest.raises(ValueError, match=r"every question of SQuAD 1.1 to have an answer .* `version` to 2.0"):
        load(folder, letters)


def test_windows_without_room_for_the_context(tmp_path: Path, letters: Path):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    message = r"stride of 10 but max_length 17 leaves 10, after 3 special tokens and the 4 of the question 'what foll"
    with pytest.raises(ValueError, match=message):
        load(folder, letters, max_length=17, stride=10)
    with pytest.raises(ValueError, match="max_length 5 leaves -2"):
        load(folder, letters, max_length=5, stride=2)
    message = r"max_length to be at most 512, the longest input of .*letters.*, but got 513"
    with pytest.raises(ValueError, match=message):
        load(folder, letters, max_length=513)


def test_incomplete_folders(tmp_path: Path, letters: Path):
    with pytest.raises(FileNotFoundError, match=r"Cannot load the data set '.*none'.*`path`"):
        load(tmp_path / "none", letters)
    with pytest.raises(FileNotFoundError, match="to have a validation split but its splits are train, test"):
        load(write(tmp_path / "no-validation", train=ROWS, test=ROWS), letters)
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"context": ["a"], "answer": ["a"]}).to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(FileNotFoundError, match="context, question, answers but its columns are context, answer"):
        load(tmp_path / "text", letters)
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*nowhere' with AutoTokenizer"):
        load(tmp_path / "none", tmp_path / "nowhere")
