"""The official evaluation of SQuAD 1.1 and 2.0, and the gathering of answers that it needs."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.distributed


def normalise(text: str) -> str:
    """Lower case without ASCII punctuation, articles and superfluous spaces.

    >>> normalise("The  Beatles' (a band)")
    'beatles band'
    """
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalise(prediction) == normalise(reference))


def f1_score(prediction: str, reference: str, no_answer: bool = False) -> float:
    """Harmonic mean of precision and recall over the normalised words.

    Where nothing is left of one, version 2.0 (``no_answer``) gives 1 if nothing is left of the other, else 0; version
    1.1 gives 0 always.

    >>> f1_score("the red house", "a big red house")
    0.8
    """
    predicted, expected = normalise(prediction).split(), normalise(reference).split()
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
    """What the official evaluation scripts report of a list of questions.

    Args:
        predictions: One text a question: the best answer, also where the model would rather give none.
        references: For each question all answers that count; none if it cannot be answered.
        no_answer_probabilities: For each question in [0, 1]; makes it version 2.0, None is version 1.1.
        threshold: Above this probability the answer given is none; version 2.0 only.

    Returns:
        ``exact_match`` and ``f1``, in percent. In version 2.0 also both for the questions with an answer
        (``has_answer_``) and without (``no_answer_``), where there are any, and ``best_exact_match`` and ``best_f1`` at
        the thresholds that suit them best, ``best_exact_match_threshold`` and ``best_f1_threshold``.

    Raises:
        ValueError: Version 1.1 and a question without answer.

    >>> squad_scores(["the Danube", "1806"], [["Danube"], ["August 1806", "6 August 1806"]])
    {'exact_match': 50.0, 'f1': 83.33...}
    """
    if no_answer_probabilities is None:
        if not all(references):
            raise ValueError("Expected every question to have an answer but some have none: score as version 2.0.")
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": _percent(max(exact_match(p, text) for text in texts) for p, texts in pairs),
            "f1": _percent(max(f1_score(p, text) for text in texts) for p, texts in pairs),
        }
    scores: dict[str, float] = {}
    best: dict[str, float] = {}
    answerable = [bool(texts) for texts in references]
    # The official rule: an answer of which nothing is left does not count, unless no other is there.
    counted = [[text for text in texts if normalise(text)] or [""] for texts in references]
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
    """The best mean score that a threshold on the no-answer probability can reach, in percent, and that threshold.

    As in the official script: questions answered one by one in the order of their probability, from none answered; ties
    keep the order given, and the lowest of equally good thresholds counts.
    """
    current = best = float(sum(not has for has in answerable))
    threshold = 0.0
    for i in sorted(range(len(scores)), key=lambda i: probabilities[i]):
        current += scores[i] if answerable[i] else -float(answered[i])
        if current > best:
            best, threshold = current, probabilities[i]
    return 100 * best / len(scores), threshold


class Answer(NamedTuple):
    """The best answer that some windows of a context give.

    Attributes:
        score: Logits of the span's start and end, summed.
        null_score: Lowest such sum of a window for having no answer.
        text: The span.
        references: All answers that count.
    """

    score: float
    null_score: float
    text: str
    references: tuple[str, ...]

    def merge(self, other: "Answer") -> "Answer":
        """The best answer of the windows of both."""
        best = other if other.score > self.score else self
        return best._replace(null_score=min(self.null_score, other.null_score))

    @property
    def no_answer_probability(self) -> float:
        """Softmax over the span and none."""
        return 1 / (1 + math.exp(min(self.score - self.null_score, 700.0)))


class SquadMetric:
    """Gathers the answers of windows, batches and processes by question, and scores each question once.

    Args:
        no_answer: Score as version 2.0, not 1.1.
    """

    def __init__(self, no_answer: bool = False) -> None:
        self.no_answer = no_answer
        self._answers: dict[int, Answer] = {}

    def update(self, questions: Iterable[int], answers: Iterable[Answer]) -> None:
        """Take the answers of some windows, each with the number of its question."""
        for question, answer in zip(questions, answers, strict=True):
            known = self._answers.get(question)
            self._answers[question] = answer if known is None else known.merge(answer)

    def compute(self) -> dict[str, float]:
        """Scores of :func:`squad_scores` over the windows that all processes have seen; forgets them.

        All processes must call this.
        """
        parts = [self._answers]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, self._answers)
        self._answers = {}
        merged = SquadMetric()
        for part in parts:
            merged.update(part.keys(), part.values())
        # In the order of the questions: the best threshold depends on it where probabilities are equal.
        answers = [answer for _, answer in sorted(merged._answers.items())]
        return squad_scores(
            [answer.text for answer in answers],
            [answer.references for answer in answers],
            [answer.no_answer_probability for answer in answers] if self.no_answer else None,
        )


def _percent(scores: Iterable[float]) -> float:
    scores = list(scores)
    return 100 * sum(scores) / len(scores)
