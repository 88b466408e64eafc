"""Overlapping windows of long contexts, for extractive question answering."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

__all__ = ["collate", "tokenize"]


def tokenize(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    no_answer: bool,
    scored: bool,
) -> dict[str, list]:
    """Tokenize questions with their contexts and label the tokens of the answers; long contexts become several windows.

    In a window without the answer, and for a question without an answer, the label is the first token.

    Args:
        rows: Columns of the data set; each answer is a dict of ``text`` and ``answer_start``.
        indices: Numbers of the rows.
        tokenizer: A fast tokenizer that pads on the right.
        max_length: Tokens in a window.
        stride: Tokens of the context that a window shares with the next.
        no_answer: Whether questions may have no answer.
        scored: Add the columns ``question`` (the number of the row), ``context``, ``references`` (all answers) and
            ``offsets`` (start and end of each token in the context, in characters; -1 outside the context).

    Returns:
        The columns of the windows; there may be more windows than rows.

    Raises:
        ValueError: A question is too long for a window, or has no answer although ``no_answer`` is false.
    """
    # Some questions start with many spaces.
    questions = [question.strip() for question in rows["question"]]
    _require_room(questions, tokenizer, max_length, stride)
    if not no_answer:
        _require_answers(rows["answers"])
    encoded = tokenizer(
        questions,
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: dict[str, list] = {key: encoded[key] for key in tokenizer.model_input_names if key in encoded}
    windows.update(start_positions=[], end_positions=[])
    if scored:
        windows.update(question=[], context=[], references=[], offsets=[])
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        offsets = [
            (start, end) if part == 1 else (-1, -1)
            for (start, end), part in zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
        ]
        answers = rows["answers"][row]
        first, last = _span(offsets, answers["text"], answers["answer_start"])
        windows["start_positions"].append(first)
        windows["end_positions"].append(last)
        if scored:
            windows["question"].append(indices[row])
            windows["context"].append(rows["context"][row])
            windows["references"].append(answers["text"])
            windows["offsets"].append(offsets)
    return windows


def collate(rows: list[dict[str, Any]], pad: DataCollatorWithPadding) -> dict[str, Any]:
    """Return a padded batch of N windows.

    Args:
        rows: The windows.
        pad: Pads the model's inputs.

    Returns:
        The model's inputs. Scored windows also have the lists ``question``, ``context`` and ``references`` of length N,
        and ``offsets``, ``(N, T, 2)`` int64, padded with -1.
    """
    batch: dict[str, Any] = {}
    if "offsets" in rows[0]:
        rows = [dict(row) for row in rows]
        offsets = [torch.tensor(row.pop("offsets")) for row in rows]
        batch = {key: [row.pop(key) for row in rows] for key in ("question", "context", "references")}
        batch["offsets"] = pad_sequence(offsets, batch_first=True, padding_value=-1)
    return {**batch, **pad(rows)}


def _span(offsets: list[tuple[int, int]], texts: list[str], starts: list[int]) -> tuple[int, int]:
    """Return the first and last token of the first answer, or (0, 0) if it is not in the window."""
    context = [token for token, (start, _) in enumerate(offsets) if start >= 0]
    if not texts or not context:
        return 0, 0
    start, end = starts[0], starts[0] + len(texts[0])
    if offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return 0, 0
    inside = [token for token in context if offsets[token][1] > start and offsets[token][0] < end]
    return (inside[0], inside[-1]) if inside else (0, 0)


def _require_room(questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
    """Raise an error if a question leaves at most ``stride`` tokens for the context; the tokenizer does not."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for question, tokens in zip(questions, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
        left = max_length - special - len(tokens)
        if left <= stride:
            raise ValueError(
                f"Expected more tokens for the context than the stride of {stride} but max_length {max_length} leaves "
                f"{left}, after {special} special tokens and the {len(tokens)} of the question {question!r}; increase "
                "max_length or decrease stride."
            )


def _require_answers(answers: list[dict[str, list]]) -> None:
    if not all(answer["text"] for answer in answers):
        raise ValueError(
            "Expected every question of SQuAD 1.1 to have an answer but some have none; set `version` to 2.0."
        )
