"""The scores of the official evaluation scripts of SQuAD 1.1 and 2.0, gathered over windows, batches and processes."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.distributed

__all__ = ["Answer", "SquadMetric", "best_threshold", "exact_match", "f1_score", "normalize", "squad_scores"]


def normalize(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation, articles and extra spaces.

    >>> normalize("The  Beatles' (a band)")
    'beatles band'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if both texts are equal after normalization, else 0."""
    return float(normalize(prediction) == normalize(reference))


def f1_score(prediction: str, reference: str, no_answer: bool = False) -> float:
    """Return the harmonic mean of precision and recall over the normalized words.

    If one of the texts has no words after normalization, the result is 0. With ``no_answer`` (version 2.0), it is 1 if
    neither text has any words.

    >>> f1_score("the red house", "a big red house")
    0.8
    """
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    if not predicted or not expected:
        return float(no_answer and predicted == expected)
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    no_answer_probabilities: Sequence[float] | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Return the scores of the official evaluation scripts for a list of questions.

    Args:
        predictions: The best span for each question, even if the model prefers no answer.
        references: All correct answers for each question; empty if it has no answer.
        no_answer_probabilities: For each question, in [0, 1]. Given for version 2.0, None for version 1.1.
        threshold: Above this probability the prediction counts as no answer; version 2.0 only.

    Returns:
        ``exact_match`` and ``f1``, in percent. In version 2.0 also both scores over the questions with an answer
        (``has_answer_``) and without (``no_answer_``), if there are any, and ``best_exact_match`` and ``best_f1``, the
        scores at their best thresholds, which are ``best_exact_match_threshold`` and ``best_f1_threshold``.

    Raises:
        ValueError: A question has no answer in version 1.1.

    >>> squad_scores(["the Danube", "1806"], [["Danube"], ["August 1806", "6 August 1806"]])
    {'exact_match': 50.0, 'f1': 83.33...}
    """
    if no_answer_probabilities is None:
        if not all(references):
            raise ValueError("Expected every question to have an answer but some have none; score as version 2.0.")
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": _percent(max(exact_match(p, text) for text in texts) for p, texts in pairs),
            "f1": _percent(max(f1_score(p, text) for text in texts) for p, texts in pairs),
        }
    scores: dict[str, float] = {}
    best: dict[str, float] = {}
    answerable = [bool(texts) for texts in references]
    # As in the official script, answers that are empty after normalization do not count, unless all are empty.
    counted = [[text for text in texts if normalize(text)] or [""] for texts in references]
    pairs = list(zip(predictions, counted, strict=True))
    for name, raw in (
        ("exact_match", [max(exact_match(p, text) for text in texts) for p, texts in pairs]),
        ("f1", [max(f1_score(p, text, no_answer=True) for text in texts) for p, texts in pairs]),
    ):
        given = [
            score if probability <= threshold else float(not has)
            for score, probability, has in zip(raw, no_answer_probabilities, answerable, strict=True)
        ]
        scores[name] = _percent(given)
        for kind, which in (("has_answer", True), ("no_answer", False)):
            if which in answerable:
                scores[f"{kind}_{name}"] = _percent(s for s, has in zip(given, answerable, strict=True) if has is which)
        best[f"best_{name}"], best[f"best_{name}_threshold"] = best_threshold(
            raw, [bool(p) for p in predictions], answerable, no_answer_probabilities
        )
    return {**scores, **best}


def best_threshold(
    scores: Sequence[float], answered: Sequence[bool], answerable: Sequence[bool], probabilities: Sequence[float]
) -> tuple[float, float]:
    """Return the best mean score over all thresholds on the no-answer probability, in percent, and its threshold.

    As in the official script, no question counts as answered at first. Then the questions are answered one by one, in
    ascending order of their no-answer probabilities; ties keep the order of the questions. If several thresholds are
    equally good, the lowest one is returned.

    Args:
        scores: Score of each question if it is answered.
        answered: Whether the predicted text is not empty.
        answerable: Whether the question has an answer.
        probabilities: No-answer probabilities.
    """
    current = best = float(sum(not has for has in answerable))
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: probabilities[i]):
        current += scores[i] if answerable[i] else -float(answered[i])
        if current > best:
            best, threshold = current, probabilities[i]
    return 100 * best / len(scores), threshold


class Answer(NamedTuple):
    """The best answer in one or more windows of a context.

    Attributes:
        score: Sum of the start and end logits of the span.
        null_score: Sum of the start and end logits of the first token, which represents "no answer"; the lowest one of
            all windows.
        text: Text of the span.
        references: All correct answers.
    """

    score: float
    null_score: float
    text: str
    references: tuple[str, ...]

    def merge(self, other: "Answer") -> "Answer":
        """Return the best answer in the windows of both."""
        best = other if other.score > self.score else self
        return best._replace(null_score=min(self.null_score, other.null_score))

    @property
    def no_answer_probability(self) -> float:
        """Probability of no answer: the softmax over the scores of the span and of no answer."""
        return 1 / (1 + math.exp(min(self.score - self.null_score, 700.0)))


class SquadMetric:
    """Gathers answers by question over windows, batches and processes, and scores each question once.

    Args:
        no_answer: Score as version 2.0 instead of 1.1.
    """

    def __init__(self, no_answer: bool = False) -> None:
        self.no_answer = no_answer
        self._answers: dict[int, Answer] = {}

    def update(self, questions: Iterable[int], answers: Iterable[Answer]) -> None:
        """Add the answers of some windows, each with the number of its question."""
        for question, answer in zip(questions, answers, strict=True):
            known = self._answers.get(question)
            self._answers[question] = answer if known is None else known.merge(answer)

    def compute(self) -> dict[str, float]:
        """Return :func:`squad_scores` over the windows of all processes, and reset. All processes must call this."""
        parts = [self._answers]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, self._answers)
        self._answers = {}
        merged = SquadMetric()
        for part in parts:
            merged.update(part.keys(), part.values())
        # Sorted by question, because the best threshold depends on the order of equal probabilities.
        answers = [answer for _, answer in sorted(merged._answers.items())]
        return squad_scores(
            [answer.text for answer in answers],
            [answer.references for answer in answers],
            [answer.no_answer_probability for answer in answers] if self.no_answer else None,
        )


def _percent(scores: Iterable[float]) -> float:
    scores = list(scores)
    return 100 * sum(scores) / len(scores)
