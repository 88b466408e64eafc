import collections
import os
import random
import re
import string
from pathlib import Path

import datasets
import pytest
import torch
import torch.multiprocessing
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import distributed
from torchmetrics.functional.text import squad as torchmetrics_squad
from transformers import PreTrainedTokenizerFast

from lalora_lightning.data import squad_windows
from lalora_lightning.data.squad import SquadDataModule
from lalora_lightning.data.squad_metric import Answer, SquadMetric, squad_scores
from lalora_lightning.modules.question_answering import best_spans, span_texts

REAL = Path(__file__).parents[2].parent / "shared" / "data"
Row = tuple[str, str, list[str]]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, **splits: list[Row]) -> Path:
    """Parquet in the Hub's layout of rows (question, context, answers), each answer where it first stands."""
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
    """A lower-casing word piece tokenizer that knows the 1,000 most frequent words and spells out the others."""
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


# The data


def test_windows_of_a_long_context(tmp_path: Path, letters: Path):
    """Three special tokens and a question of four words or five leave 10 or 9 of 17 tokens, with 4 shared."""
    data = load(write(tmp_path, train=ROWS, validation=ROWS), letters, max_length=17, stride=4, batch_size=20)
    (batch,) = data.val_dataloader()
    starts = [offsets[offsets[:, 0] >= 0][0, 0].item() // 2 for offsets in batch["offsets"]]
    lengths = [(offsets[:, 0] >= 0).sum().item() for offsets in batch["offsets"]]
    assert batch["question"] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert starts == [0, 6, 12, 18, 0, 5, 10, 15, 20, 0]
    assert lengths == [10, 10, 10, 8, 9, 9, 9, 9, 6, 2]
    # "c" is in the first window only, after 1 + 4 + 1 + 2 tokens; "w x" are tokens 22 and 23 of the context.
    assert batch["start_positions"].tolist() == [8, 0, 0, 0, 0, 0, 0, 7 + 7, 7 + 2, 6 + 1]
    assert batch["end_positions"].tolist() == [8, 0, 0, 0, 0, 0, 0, 7 + 8, 7 + 3, 6 + 1]
    assert batch["references"][4] == ["w x", "w"]
    assert batch["context"][-1] == "a z"
    # Padding is to the longest window of the batch.
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape == (10, 17)
    assert batch["attention_mask"].sum(1).tolist() == [17, 17, 17, 15, 17, 17, 17, 17, 14, 9]
    assert batch["offsets"].shape == (10, 17, 2)
    # What the model trains on carries nothing else.
    assert set(next(iter(data.train_dataloader()))) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "start_positions",
        "end_positions",
    }


def test_fewer_questions_to_train_on(tmp_path: Path, letters: Path):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    small = load(folder, letters, max_train_rows=2).train_dataloader().dataset
    assert len(small) == 2
    assert small[0] == load(folder, letters, max_train_rows=2).train_dataloader().dataset[0]


def test_tokenises_once(tmp_path: Path, letters: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    first = load(folder, letters)

    def fail(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(squad_windows, "_check", fail)
    again = load(folder, letters)
    assert again.val_dataloader().dataset[:] == first.val_dataloader().dataset[:]
    with pytest.raises(AssertionError, match="tokenised again"):
        load(folder, letters, stride=5)


def test_questions_without_answer(tmp_path: Path, letters: Path):
    rows = [ROWS[0], ("what is q ?", "a b c", [])]
    folder = write(tmp_path, train=rows, validation=rows)
    (batch,) = load(folder, letters, version="2.0").val_dataloader()
    assert batch["references"] == [["c"], []]
    assert batch["start_positions"].tolist() == [8, 0]
    with pytest.raises(ValueError, match=r"every question of version 1.1 to have an answer .* --data.version 2.0"):
        load(folder, letters)


def test_what_cannot_be_windows(tmp_path: Path, letters: Path):
    folder = write(tmp_path, train=ROWS, validation=ROWS)
    message = (
        r"stride of 10 but of max_length 17 only 10 tokens are left beside 3 special ones and the 4 of .*'what foll"
    )
    with pytest.raises(ValueError, match=message):
        load(folder, letters, max_length=17, stride=10)
    with pytest.raises(ValueError, match="only -2 tokens are left"):
        load(folder, letters, max_length=5, stride=2)
    with pytest.raises(ValueError, match=r"max_length to be at most 512, which is what .*letters.* takes, but got 513"):
        load(folder, letters, max_length=513)


def test_folders_that_lack_something(tmp_path: Path, letters: Path):
    with pytest.raises(FileNotFoundError, match=r"Cannot load the data set '.*none'.*--data.path"):
        load(tmp_path / "none", letters)
    with pytest.raises(FileNotFoundError, match="to have a validation split but its splits are train, test"):
        load(write(tmp_path / "no-validation", train=ROWS, test=ROWS), letters)
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"context": ["a"], "answer": ["a"]}).to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(FileNotFoundError, match="context, question, answers but its columns are context, answer"):
        load(tmp_path / "text", letters)
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*nowhere' by AutoTokenizer"):
        load(tmp_path / "none", tmp_path / "nowhere")


# The scores


def official(
    predictions: dict[str, str], references: dict[str, list[str]], probabilities: dict[str, float] | None = None
) -> dict[str, float]:
    """The rules of the official scripts once more, word for word differently: by question id, all thresholds tried."""

    def words(text: str) -> list[str]:
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(?:an|a|the)\b", " ", text).split()

    def exact(a: str, b: str) -> float:
        return 1.0 if words(a) == words(b) else 0.0

    def f1(a: str, b: str) -> float:
        left, right = words(a), words(b)
        if probabilities is not None and not (left and right):
            return 1.0 if left == right else 0.0
        rest = collections.Counter(right)
        rest.subtract(left)
        same = len(right) - sum(n for n in rest.values() if n > 0)
        return 2 * same / (len(left) + len(right)) if same else 0.0

    def mean(scores: dict[str, float], ids: list[str]) -> float:
        return 100 * sum(scores[i] for i in ids) / len(ids)

    ids = list(predictions)
    result = {}
    for name, score in (("exact_match", exact), ("f1", f1)):
        if probabilities is None:
            result[name] = mean({i: max(score(predictions[i], r) for r in references[i]) for i in ids}, ids)
            continue
        raw = {i: max(score(predictions[i], r) for r in [r for r in references[i] if words(r)] or [""]) for i in ids}
        none = {i: 0.0 if references[i] else 1.0 for i in ids}
        at = {i: none[i] if probabilities[i] > 0.5 else raw[i] for i in ids}
        result[name] = mean(at, ids)
        for kind, which in (
            ("has_answer", [i for i in ids if references[i]]),
            ("no_answer", [i for i in ids if not references[i]]),
        ):
            if which:
                result[f"{kind}_{name}"] = mean(at, which)
        # A question without answer that is given some text scores nothing, whatever is left of the text.
        given = {i: raw[i] if references[i] or not predictions[i] else 0.0 for i in ids}
        tries = [(mean(none, ids), 0.0)]
        order = sorted(ids, key=lambda i: probabilities[i])
        for n, last in enumerate(order, 1):
            tries.append((mean({**none, **{i: given[i] for i in order[:n]}}, ids), probabilities[last]))
        best = max(score for score, _ in tries)
        result[f"best_{name}"] = best
        result[f"best_{name}_threshold"] = next(t for score, t in tries if score > best - 1e-9)
    return result


def test_scores_of_version_1_by_hand():
    def score(prediction: str, *references: str) -> tuple[float, float]:
        scores = squad_scores([prediction], [list(references)])
        return scores["exact_match"], scores["f1"]

    assert score("The Rolling  Stones", "rolling stones!") == (100, 100)
    # Punctuation goes without a space, articles with one; only ASCII punctuation and whole words count.
    assert score("well-known", "well known") == (0, 0)
    assert score("U.S.", "us") == (100, 100)
    assert score("theatre", "atre") == (0, 0)
    assert score("a-the-b", "atheb") == (100, 100)
    assert score("“Élan”", "élan") == (0, 0)
    assert score("ÉLAN vital", "élan") == (0, pytest.approx(200 / 3))
    # Precision 2/3, recall 2/4; a word counts as often as it stands in both.
    assert score("red red house", "red house on hill") == (0, pytest.approx(400 / 7))
    assert score("in 1806", "August 6, 1806", "1806", "in the year 1806") == (0, pytest.approx(80))
    # Nothing is left of either: equal, with no words in common.
    assert score("the", "a") == (100, 0)
    assert score("", "a b") == (0, 0)
    with pytest.raises(ValueError, match="Expected every question to have an answer but some have none"):
        squad_scores([""], [[]])


def test_scores_of_version_2_by_hand():
    """Five questions, the last two without answer; scores 1, 1/2, 0 by F1 where answered."""
    predictions = ["the cat", "red house", "no", "dog", ""]
    references = [["cat"], ["house on hill", "the"], ["yes"], [], []]
    scores = squad_scores(predictions, references, [0.1, 0.5, 0.6, 0.4, 0.2])
    f1 = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    # At one half exactly an answer is given still; the third is withdrawn, the fourth is wrong, the fifth right.
    assert scores["exact_match"] == pytest.approx(100 * 2 / 5)
    assert scores["f1"] == pytest.approx(100 * (1 + f1 + 0 + 0 + 1) / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(100 / 3)
    assert scores["has_answer_f1"] == pytest.approx(100 * (1 + f1) / 3)
    assert scores["no_answer_exact_match"] == scores["no_answer_f1"] == 50
    # None answered: 2. The first: 3. The fifth, of no text: 3. The fourth: 2. The second: 2.4.
    assert scores["best_exact_match"] == scores["best_f1"] == pytest.approx(60)
    assert scores["best_exact_match_threshold"] == scores["best_f1_threshold"] == 0.1
    # All withdrawn is best: the threshold is 0, as the official script has it.
    scores = squad_scores(["a b", "c"], [[], []], [0.3, 0.9])
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (100, 0)
    assert "has_answer_f1" not in scores
    # Nothing is left of either: version 2.0 counts that. A reference of which nothing is left does not count.
    assert squad_scores(["the"], [["a"]], [0.0])["f1"] == 100
    assert squad_scores(["the"], [["a", "b"]], [0.0])["exact_match"] == 0


TRICKY = [
    "",
    "the",
    "The!",
    "a",
    "1806",
    "“quoted”",
    "Café",
    "cafe\u0301",
    "½ cup",
    "U.S.",
    "U. S.",
    "an  apple\ta day",
    "東京",
    ".",
]


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_scores_of_tricky_texts_are_the_official_ones(version: str):
    draw = random.Random(0)
    references = [draw.choices(TRICKY, k=draw.randint(version == "1.1", 3)) for _ in range(300)]
    _compare(draw.choices(TRICKY, k=300), references, version, draw)


@pytest.mark.parametrize(("version", "name"), [("1.1", "squad"), ("2.0", "squad_v2")])
def test_scores_of_real_answers_are_the_official_ones(version: str, name: str):
    path = REAL / name / "validation.parquet"
    if not path.exists():
        pytest.skip("needs the real data")
    rows = datasets.Dataset.from_parquet(str(path))
    references = [answers["text"] for answers in rows["answers"]]
    draw = random.Random(0)
    predictions = []
    for context, texts in zip(rows["context"], references, strict=True):
        words = (draw.choice(texts) if texts and draw.random() < 0.7 else context).split()
        start = draw.randrange(len(words))
        part = " ".join(words[start * draw.randint(0, 1) :][: draw.randint(1, 6)])
        predictions.append(draw.choice([part, part, part.upper(), f"The {part}.", f"({part})", "", *texts]))
    assert len(predictions) >= 200
    scores = _compare(predictions, references, version, draw)
    assert 0 < scores["exact_match"] < scores["f1"] < 100
    if version == "1.1":
        # Apart from answers of which nothing is left, the same in float32.
        theirs = torchmetrics_squad(
            [{"prediction_text": p, "id": str(i)} for i, p in enumerate(predictions)],
            [{"answers": {"text": r, "answer_start": [0]}, "id": str(i)} for i, r in enumerate(references)],
        )
        assert scores == pytest.approx({name: score.item() for name, score in theirs.items()}, rel=1e-5)


def _compare(
    predictions: list[str], references: list[list[str]], version: str, draw: random.Random
) -> dict[str, float]:
    ids = [str(i) for i in range(len(predictions))]
    # Rounded, so that some are equal.
    probabilities = [round(draw.random(), 2) for _ in ids] if version == "2.0" else None
    scores = squad_scores(predictions, references, probabilities)
    expected = official(
        dict(zip(ids, predictions, strict=True)),
        dict(zip(ids, references, strict=True)),
        dict(zip(ids, probabilities, strict=True)) if probabilities else None,
    )
    assert scores == pytest.approx(expected, abs=1e-9)
    return scores


# From logits to scores


def test_windows_of_one_question_give_one_answer():
    """Its best span over all windows and batches, against the lowest score of none."""
    metric = SquadMetric(no_answer=True)
    metric.update([1, 0], [Answer(1.0, 5.0, "dog", ("cat",)), Answer(2.0, 2.5, "x", ())])
    metric.update([1, 1], [Answer(3.0, 3.5, "cat", ("cat",)), Answer(2.0, 2.9, "cow", ("cat",))])
    scores = metric.compute()
    # The first is answered (3.0 over 2.9, right); the other is not (2.0 under 2.5, right).
    assert scores["f1"] == 100
    sigmoid = torch.sigmoid(torch.tensor(2.9 - 3.0, dtype=torch.float64)).item()
    assert scores["best_f1_threshold"] == pytest.approx(sigmoid)
    # Forgotten after that; seen twice, as with uneven processes, is counted once.
    metric.update([4, 4, 2], [Answer(1.0, 0.0, "a b", ("b",))] * 2 + [Answer(-torch.inf, 9.9, "", ("b",))])
    assert metric.compute()["f1"] == 50


def _one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = SquadMetric()
    # One window of question 0 in each process, the better in the second; question 2 is padding, seen by both.
    seen = [[(0, 1.0, "dog"), (2, 1.0, "cow")], [(0, 2.0, "cat"), (1, 1.0, "cow"), (2, 1.0, "cow")]][rank]
    metric.update([q for q, _, _ in seen], [Answer(score, 0.0, text, ("cat",)) for _, score, text in seen])
    scores = metric.compute()
    (Path(folder) / str(rank)).write_text(str(scores))
    distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_score_what_both_have_seen(tmp_path: Path):
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")
    assert (
        (tmp_path / "0").read_text()
        == (tmp_path / "1").read_text()
        == str(squad_scores(["cat", "x", "x"], [["cat"]] * 3))
    )


@pytest.mark.parametrize(("version", "name"), [("1.1", "squad"), ("2.0", "squad_v2")])
def test_logits_that_mark_the_reference_give_its_text(version: str, name: str, tmp_path: Path):
    """Through tokens, windows and back; 300 real questions, of which each is scored over all its windows."""
    if not (REAL / name).exists():
        pytest.skip("needs the real data")
    rows = datasets.Dataset.from_parquet(str(REAL / name / "validation.parquet")).select(range(300))
    rows.to_parquet(tmp_path / "validation.parquet")
    rows.select(range(1)).to_parquet(tmp_path / "train.parquet")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", rows["context"])
    data = load(tmp_path, tokenizer, version=version, max_length=192, stride=60, batch_size=32)
    texts: dict[int, str] = {}
    windows = 0
    metric = SquadMetric(data.no_answer)
    for batch in data.val_dataloader():
        windows += len(batch["question"])
        start = 9 * torch.nn.functional.one_hot(batch["start_positions"], batch["input_ids"].shape[1]).float()
        end = 9 * torch.nn.functional.one_hot(batch["end_positions"], batch["input_ids"].shape[1]).float()
        scores, first, last = best_spans(start, end, batch["offsets"][..., 0] >= 0)
        spans = span_texts(batch["context"], batch["offsets"], first, last)
        nulls = (start[:, 0] + end[:, 0]).tolist()
        metric.update(batch["question"], map(Answer, scores.tolist(), nulls, spans, map(tuple, batch["references"])))
        texts.update({q: t for q, t, s in zip(batch["question"], spans, scores.tolist(), strict=True) if s == 18})
    assert windows > 450
    answerable = {i: answers["text"][0] for i, answers in enumerate(rows["answers"]) if answers["text"]}
    assert texts == answerable
    assert metric.compute()["f1"] == 100
