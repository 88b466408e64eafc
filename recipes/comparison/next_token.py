"""A causal language model that predicts the next token of texts, and the texts."""

import functools
from typing import Any

from datasets import Dataset
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from lalora_lightning.data.loading import load_splits
from lalora_lightning.data.text import map_rows
from lalora_lightning.modules.causal_lm import CausalLMModule

__all__ = ["NextTokenModule", "collator", "load_texts"]


class NextTokenModule(CausalLMModule):
    """A causal language model that is tested by how often its most likely next token is right.

    Batches contain ``input_ids``, ``attention_mask`` and ``labels``, each ``(N, S)`` int64. Labels of padding are -100.
    Logs ``test/token_accuracy``.

    Args:
        name: A model on the Hub or a local model folder, with its tokenizer.
        learning_rate: Peak of the schedule.
    """

    def __init__(self, name: str, learning_rate: float) -> None:
        super().__init__(name, learning_rate=learning_rate, weight_decay=0.01, warmup=0.06)
        size = self.model.config.vocab_size
        self.token_accuracy = MulticlassAccuracy(size, average="micro", ignore_index=-100)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the accuracy of all tokens but the first of each text."""
        predicted = self.model(**batch).logits[:, :-1].argmax(-1)
        self.token_accuracy(predicted, batch["labels"][:, 1:])
        self.log("test/token_accuracy", self.token_accuracy)

    def on_test_epoch_end(self) -> None:
        """There are no answers to count."""


def load_texts(
    path: str, column: str, tokenizer: PreTrainedTokenizerBase, max_length: int, max_train_rows: int | None = None
) -> dict[str, Dataset]:
    """Return the tokens of a column of texts, as the splits "train" and "test".

    Args:
        path: The data set on the Hub, or a folder in the Hub's layout.
        column: The column.
        tokenizer: The tokenizer.
        max_length: Longer texts are truncated to this number of tokens.
        max_train_rows: Number of training texts, drawn at random with a fixed seed; by default all of them.

    Raises:
        FileNotFoundError: The data set cannot be found or downloaded.
    """
    splits = load_splits(path, columns=(column,), splits=("train", "test"), max_train_rows=max_train_rows)
    tokenize = functools.partial(_tokenize, tokenizer=tokenizer, column=column, max_length=max_length)
    return {name: map_rows(splits[name], tokenize, batched=True) for name in ("train", "test")}


def collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the function that pads texts to a batch with labels."""
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _tokenize(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> dict[str, list]:
    return dict(tokenizer(rows[column], truncation=True, max_length=max_length, return_token_type_ids=False))
