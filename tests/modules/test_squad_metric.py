"""The scores against a second implementation, and from logits through windows and processes to scores."""

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
from torch import distributed
from torchmetrics.functional.text import squad as torchmetrics_squad

from lalora_lightning.modules.question_answering import best_spans, span_texts
from lalora_lightning.modules.squad_metric import Answer, SquadMetric, squad_scores
from tests.data.test_squad import _cache, load, write_tokenizer  # noqa: F401
from tests.helpers.processes import in_processes

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def official(
    predictions: dict[str, str], references: dict[str, list[str]], probabilities: dict[str, float] | None = None
) -> dict[str, float]:
    """The rules of the official scripts, implemented a second time: by question id, all thresholds tried."""

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
        # Any text scores 0 for a question without an answer, even if normalization leaves nothing of it.
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
    # Punctuation is deleted, articles become a space; only ASCII punctuation and whole words count.
    assert score("well-known", "well known") == (0, 0)
    assert score("U.S.", "us") == (100, 100)
    assert score("theatre", "atre") == (0, 0)
    assert score("a-the-b", "atheb") == (100, 100)
    assert score("“Élan”", "élan") == (0, 0)
    assert score("ÉLAN vital", "élan") == (0, pytest.approx(200 / 3))
    # Precision 2/3, recall 2/4; a word counts as often as it occurs in both.
    assert score("red red house", "red house on hill") == (0, pytest.approx(400 / 7))
    assert score("in 1806", "August 6, 1806", "1806", "in the year 1806") == (0, pytest.approx(80))
    # Normalization leaves nothing of either: equal, but no words in common.
    assert score("the", "a") == (100, 0)
    assert score("", "a b") == (0, 0)
    with pytest.raises(ValueError, match="Expected every question to have an answer but some have none"):
        squad_scores([""], [[]])


def test_scores_of_version_2_by_hand():
    """Five questions, the last two without an answer."""
    predictions = ["the cat", "red house", "no", "dog", ""]
    references = [["cat"], ["house on hill", "the"], ["yes"], [], []]
    scores = squad_scores(predictions, references, [0.1, 0.5, 0.6, 0.4, 0.2])
    f1 = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    # At a probability of exactly one half the answer counts. The third does not, the fourth is wrong, the fifth right.
    assert scores["exact_match"] == pytest.approx(100 * 2 / 5)
    assert scores["f1"] == pytest.approx(100 * (1 + f1 + 0 + 0 + 1) / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(100 / 3)
    assert scores["has_answer_f1"] == pytest.approx(100 * (1 + f1) / 3)
    assert scores["no_answer_exact_match"] == scores["no_answer_f1"] == 50
    # Sums by threshold: none answered 2, then the first 3, the fifth (empty) 3, the fourth 2, the second 2.4.
    assert scores["best_exact_match"] == scores["best_f1"] == pytest.approx(60)
    assert scores["best_exact_match_threshold"] == scores["best_f1_threshold"] == 0.1
    # No answers at all is best: the threshold is 0, as in the official script.
    scores = squad_scores(["a b", "c"], [[], []], [0.3, 0.9])
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (100, 0)
    assert "has_answer_f1" not in scores
    # Version 2.0: two texts that normalization empties are equal. An empty reference does not count beside another.
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
        pytest.skip("without the real data")
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
        # torchmetrics differs only for answers that normalization empties; it computes in float32.
        theirs = torchmetrics_squad(
            [{"prediction_text": p, "id": str(i)} for i, p in enumerate(predictions)],
            [{"answers": {"text": r, "answer_start": [0]}, "id": str(i)} for i, r in enumerate(references)],
        )
        assert scores == pytest.approx({name: score.item() for name, score in theirs.items()}, rel=1e-5)


def _compare(
    predictions: list[str], references: list[list[str]], version: str, draw: random.Random
) -> dict[str, float]:
    ids = [str(i) for i in range(len(predictions))]
    # Rounded, so that there are equal ones.
    probabilities = [round(draw.random(), 2) for _ in ids] if version == "2.0" else None
    scores = squad_scores(predictions, references, probabilities)
    expected = official(
        dict(zip(ids, predictions, strict=True)),
        dict(zip(ids, references, strict=True)),
        dict(zip(ids, probabilities, strict=True)) if probabilities else None,
    )
    assert scores == pytest.approx(expected, abs=1e-9)
    return scores


def test_windows_of_one_question_have_one_answer():
    """The best span over all windows and batches, against the lowest score of no answer."""
    metric = SquadMetric(no_answer=True)
    metric.update([1, 0], [Answer(1.0, 5.0, "dog", ("cat",)), Answer(2.0, 2.5, "x", ())])
    metric.update([1, 1], [Answer(3.0, 3.5, "cat", ("cat",)), Answer(2.0, 2.9, "cow", ("cat",))])
    scores = metric.compute()
    # The first is answered (3.0 over 2.9, right); the other is not (2.0 under 2.5, right).
    assert scores["f1"] == 100
    sigmoid = torch.sigmoid(torch.tensor(2.9 - 3.0, dtype=torch.float64)).item()
    assert scores["best_f1_threshold"] == pytest.approx(sigmoid)
    # compute has reset the metric. Windows seen twice, as with uneven processes, count once.
    metric.update([4, 4, 2], [Answer(1.0, 0.0, "a b", ("b",))] * 2 + [Answer(-torch.inf, 9.9, "", ("b",))])
    assert metric.compute()["f1"] == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_score_what_both_have_seen(tmp_path: Path):
    def work() -> dict[str, float]:
        rank = int(os.environ["LOCAL_RANK"])
        # Not destroyed: the process ends, and waiting for the other one to take leave can take forever.
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        metric = SquadMetric()
        # One window of question 0 in each process, the better in the second; question 2 is padding, seen by both.
        seen = [[(0, 1.0, "dog"), (2, 1.0, "cow")], [(0, 2.0, "cat"), (1, 1.0, "cow"), (2, 1.0, "cow")]][rank]
        metric.update([q for q, _, _ in seen], [Answer(score, 0.0, text, ("cat",)) for _, score, text in seen])
        scores = metric.compute()
        distributed.barrier()
        return scores

    first, second = in_processes(2, tmp_path, work)
    assert first == second == squad_scores(["cat", "x", "x"], [["cat"]] * 3)


@pytest.mark.parametrize(("version", "name"), [("1.1", "squad"), ("2.0", "squad_v2")])
def test_logits_at_the_reference_return_its_text(version: str, name: str, tmp_path: Path):
    """Through tokens and windows and back, for 300 real questions, each scored over all its windows."""
    if not (REAL / name).exists():
        pytest.skip("without the real data")
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
