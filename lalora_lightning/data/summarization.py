"""Texts with summaries, from the Hub or from a folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lalora_lightning.data.loading import load_splits
from lalora_lightning.data.text import TextDataModule, map_rows

__all__ = ["SummarizationDataModule"]


class SummarizationDataModule(TextDataModule):
    """A column of texts and a column of summaries, tokenized once and padded batch by batch.

    Batches contain ``input_ids`` and ``attention_mask`` ``(N, S)``, ``labels`` ``(N, T)`` padded with -100, and
    ``references``: the N full summaries as text. Without a test split, the validation split is used for testing.

    Args:
        path: The data set on the Hub, or a folder in the Hub's layout.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        config: A configuration on the Hub, or the subfolder of that name in a local folder, if it has one.
        source_column: The column of the texts.
        target_column: The column of the summaries.
        prefix: Text that is inserted before every text, from which T5 recognizes its task.
        max_source_length: Longer texts are truncated to this number of tokens.
        max_target_length: In the labels, longer summaries are truncated to this number of tokens.
        batch_size: Texts per batch and device.
        num_workers: Processes that prepare batches.
        max_train_rows: Number of training rows, drawn at random with a fixed seed; by default all of them.

    Raises:
        FileNotFoundError: In ``prepare_data`` and ``setup``: the data set or the tokenizer cannot be found or
            downloaded, or columns, the training split or the validation split are missing.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        config: str | None = None,
        source_column: str = "article",
        target_column: str = "highlights",
        prefix: str = "summarize: ",
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 2,
        max_train_rows: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, num_workers)
        self.save_hyperparameters()
        self.path, self.config = path, config
        self.columns, self.prefix = (source_column, target_column), prefix
        self.lengths = [max_source_length, max_target_length]
        self.max_train_rows = max_train_rows

    def tokenize(self) -> dict[str, Any]:
        """Tokenize the texts, after adding the prefix, and the summaries of all splits."""
        folder = Path(self.path)
        in_folder_itself = folder.is_dir() and not (folder / (self.config or "")).is_dir()
        config = None if in_folder_itself else self.config
        splits = load_splits(self.path, config, self.columns, ("train", "validation"), self.max_train_rows)
        tokenize = functools.partial(
            _tokenize, tokenizer=self.tokenizer, columns=self.columns, prefix=self.prefix, lengths=self.lengths
        )
        return {split: map_rows(rows, tokenize, batched=True) for split, rows in splits.items()}

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the function that pads texts and labels and keeps the references as text."""
        return functools.partial(_collate, pad=DataCollatorForSeq2Seq(self.tokenizer))


def _tokenize(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, str], prefix: str, lengths: list[int]
) -> dict[str, list]:
    texts, summaries = [prefix + text for text in rows[columns[0]]], rows[columns[1]]
    # Some tokenizers return token types by default, which encoder-decoder models do not accept.
    encoded = tokenizer(texts, truncation=True, max_length=lengths[0], return_token_type_ids=False)
    labels = tokenizer(text_target=summaries, truncation=True, max_length=lengths[1])["input_ids"]
    return {**encoded, "labels": labels, "references": summaries}


def _collate(rows: list[dict[str, Any]], pad: DataCollatorForSeq2Seq) -> dict[str, Any]:
    references = [row.pop("references") for row in rows]
    return {**pad(rows), "references": references}
