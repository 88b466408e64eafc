"""SQuAD 1.1 and 2.0."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

from transformers import DataCollatorWithPadding

from lalora_lightning.data.squad_windows import collate, tokenise
from lalora_lightning.data.text import TextDataModule
from lalora_lightning.hub import load_splits

Version = Literal["1.1", "2.0"]


class SquadDataModule(TextDataModule):
    """Questions and contexts, tokenised and padded batch by batch. The validation split is also what is tested on.

    A context that is too long gives several overlapping windows, see :func:`tokenise`, and batches of the validation
    split carry what turns a span of tokens into a scored answer, see :func:`collate`.

    Args:
        version: 2.0 has questions without answer.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        path: The data set on the Hub or a local folder.
        max_length: Tokens in a window: question, piece of context and special tokens.
        stride: Tokens of context that a window shares with the next.
        batch_size: Windows in a batch, on each device.
        num_workers: Processes that prepare batches.
        max_train_rows: Train on so many questions only, drawn at random with a fixed seed.

    Raises:
        FileNotFoundError: From ``prepare_data`` and ``setup``: data set or tokenizer cannot be reached or found, or
            a split or columns are missing.
        ValueError: From the same: the model takes fewer tokens than ``max_length``, a question leaves too few for the
            context to advance, or version 1.1 has a question without answer.
    """

    def __init__(
        self,
        version: Version,
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
        """Whether there are questions without answer."""
        return self.version == "2.0"

    def tokenise(self) -> dict[str, Any]:
        if self.max_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"Expected max_length to be at most {self.tokenizer.model_max_length}, which is what "
                f"{self.tokenizer_name} takes, but got {self.max_length}."
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
            split: splits[split].map(
                copy.deepcopy(functools.partial(tokenise, scored=split == "validation", **arguments)),
                batched=True,
                with_indices=True,
                remove_columns=splits[split].column_names,
            )
            for split in needed
        }

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return functools.partial(collate, pad=DataCollatorWithPadding(self.tokenizer))
