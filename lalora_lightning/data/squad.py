"""SQuAD 1.1 (arXiv 1606.05250) and 2.0 (arXiv 1806.03822)."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from transformers import DataCollatorWithPadding

from lalora_lightning.data.loading import load_splits
from lalora_lightning.data.squad_windows import collate, tokenize
from lalora_lightning.data.text import TextDataModule, map_rows

__all__ = ["SquadDataModule", "SquadVersion"]

SquadVersion = Literal["1.1", "2.0"]


class SquadDataModule(TextDataModule):
    """Questions and contexts, tokenized once and padded batch by batch. The validation split is also the test split.

    A long context is split into overlapping windows, see :func:`squad_windows.tokenize`. Batches of the validation
    split also contain what scoring needs, see :func:`squad_windows.collate`.

    Args:
        version: Version 2.0 has questions without an answer.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        path: The data set on the Hub or a local folder.
        max_length: Tokens in a window: question, part of the context and special tokens.
        stride: Tokens of the context that a window shares with the next.
        batch_size: Windows per batch and device.
        num_workers: Processes that prepare batches.
        max_train_rows: Number of training questions, drawn at random with a fixed seed; by default all of them.

    Raises:
        FileNotFoundError: In ``prepare_data`` and ``setup``: the data set or the tokenizer cannot be found or
            downloaded, or a split or columns are missing.
        ValueError: In ``prepare_data`` and ``setup``: the model accepts fewer tokens than ``max_length``, a question is
            too long for a window, or version 1.1 has a question without an answer.
    """

    def __init__(
        self,
        version: SquadVersion,
        tokenizer: str,
        path: str = "rajpurkar/squad",
        max_length: int = 384,
        stride: int = 128,
        batch_size: int = 16,
        num_workers: int = 2,
        max_train_rows: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, num_workers)
        self.save_hyperparameters()
        self.version = version
        self.path = path
        self.max_length = max_length
        self.stride = stride
        self.max_train_rows = max_train_rows

    @property
    def no_answer(self) -> bool:
        """Whether there are questions without an answer."""
        return self.version == "2.0"

    def tokenize(self) -> dict[str, Any]:
        """Split the contexts of the training and the validation split into tokenized windows."""
        if self.max_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"Expected max_length to be at most {self.tokenizer.model_max_length}, the longest input of "
                f"{self.tokenizer_name}, but got {self.max_length}."
            )
        columns, needed = ("context", "question", "answers"), ("train", "validation")
        splits = load_splits(self.path, None, columns, needed, self.max_train_rows)
        arguments = {
            "tokenizer": self.tokenizer,
            "max_length": self.max_length,
            "stride": self.stride,
            "no_answer": self.no_answer,
        }
        return {
            split: map_rows(
                splits[split],
                functools.partial(tokenize, scored=split == "validation", **arguments),
                batched=True,
                with_indices=True,
            )
            for split in needed
        }

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return :func:`squad_windows.collate` with the padding of the tokenizer."""
        return functools.partial(collate, pad=DataCollatorWithPadding(self.tokenizer))
