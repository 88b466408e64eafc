"""Long contexts in overlapping windows, as extractive question answering needs them."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase


def tokenise(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    no_answer: bool,
    scored: bool,
) -> dict[str, list]:
    """Windows of questions and contexts, with the tokens of the answer as labels; several where a context is long.

    A window without the answer is labelled by its first token, as is a question without answer.

    Args:
        rows: Columns of the data set; each answer is a dict of ``text`` and ``answer_start``.
        indices: Numbers of the rows.
        tokenizer: A fast one, padding on the right.
        max_length: Tokens in a window.
        stride: Tokens of context that a window shares with the next.
        no_answer: Questions may have no answer.
        scored: Add the columns ``question``, the number of the row, ``context``, ``references``, all answers, and
            ``offsets``, first and one past the last character of each token, -1 outside the context.

    Raises:
        ValueError: A question leaves too few tokens for the context to advance, or has no answer but should.
    """
    # Some questions begin with many spaces.
    questions = [question.strip() for question in rows["question"]]
    _check(questions, rows["answers"], tokenizer, max_length, stride, no_answer)
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


def _span(offsets: list[tuple[int, int]], texts: list[str], starts: list[int]) -> tuple[int, int]:
    """First and last token of the first answer; of a window without it twice the first token of all."""
    context = [token for token, (start, _) in enumerate(offsets) if start >= 0]
    if not texts or not context:
        return 0, 0
    start, end = starts[0], starts[0] + len(texts[0])
    if offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return 0, 0
    inside = [token for token in context if offsets[token][1] > start and offsets[token][0] < end]
    return (inside[0], inside[-1]) if inside else (0, 0)


def _check(
    questions: list[str],
    answers: list[dict[str, list]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    no_answer: bool,
) -> None:
    # The tokenizer itself would panic or advance by nothing.
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for question, tokens in zip(questions, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
        if max_length - special - len(tokens) <= stride:
            raise ValueError(
                f"Expected a window to hold more context than the stride of {stride} but of max_length {max_length} "
                f"only {max_length - special - len(tokens)} tokens are left beside {special} special ones and the "
                f"{len(tokens)} of the question {question!r}."
            )
    if not no_answer and not all(answer["text"] for answer in answers):
        raise ValueError(
            "Expected every question of version 1.1 to have an answer but some have none; give --data.version 2.0."
        )


def collate(rows: list[dict[str, Any]], pad: DataCollatorWithPadding) -> dict[str, Any]:
    """A padded batch of N windows; what they carry for scoring as lists, the offsets as ``(N, T, 2)`` int64."""
    batch: dict[str, Any] = {}
    if "offsets" in rows[0]:
        rows = [dict(row) for row in rows]
        offsets = [torch.tensor(row.pop("offsets")) for row in rows]
        batch = {key: [row.pop(key) for row in rows] for key in ("question", "context", "references")}
        batch["offsets"] = pad_sequence(offsets, batch_first=True, padding_value=-1)
    return {**batch, **pad(rows)}
