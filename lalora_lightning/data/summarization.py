"""Texts with summaries, from the Hub or from a folder."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lalora_lightning.data.text import TextDataModule
from lalora_lightning.hub import load_splits


class SummarizationDataModule(TextDataModule):
    """A column of texts and a column of their summaries, tokenised and padded batch by batch.

    Batches hold ``input_ids`` and ``attention_mask`` ``(N, S)``, ``labels`` ``(N, T)`` padded with -100, and
    ``references``: the N summaries as text and in full length. Where the data set has no test split, the validation
    split takes its place.

    Args:
        path: The data set on the Hub, or a folder in the Hub's layout.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        config: A configuration on the Hub; of a folder the subfolder of that name, if it has one.
        source_column: Holds the texts.
        target_column: Holds the summaries.
        prefix: Put before every text; T5 knows its task by it.
        max_source_length: Tokens; longer texts are cut.
        max_target_length: Tokens; longer summaries are cut in the labels.
        batch_size: Texts in a batch, on each device.
        num_workers: Processes that prepare batches.
        max_train_rows: Train on so many rows only, drawn at random with a fixed seed.

    Raises:
        FileNotFoundError: From ``prepare_data`` and ``setup``: data set or tokenizer cannot be reached or found, or
            columns or the train or validation split are missing.
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

    def tokenise(self) -> dict[str, Any]:
        folder = Path(self.path)
        in_folder_itself = folder.is_dir() and not (folder / (self.config or "")).is_dir()
        config = None if in_folder_itself else self.config
        splits = load_splits(self.path, config, self.columns, ("train", "validation"), self.max_train_rows)
        tokenise = functools.partial(
            _tokenise, tokenizer=self.tokenizer, columns=self.columns, prefix=self.prefix, lengths=self.lengths
        )
        return {
            split: rows.map(copy.deepcopy(tokenise), batched=True, remove_columns=rows.column_names)
            for split, rows in splits.items()
        }

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return functools.partial(_collate, pad=DataCollatorForSeq2Seq(self.tokenizer))


def _tokenise(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, str], prefix: str, lengths: list[int]
) -> dict[str, list]:
    texts, summaries = [prefix + text for text in rows[columns[0]]], rows[columns[1]]
    # Encoder-decoders know no token types, which some tokenizers give unasked.
    encoded = tokenizer(texts, truncation=True, max_length=lengths[0], return_token_type_ids=False)
    labels = tokenizer(text_target=summaries, truncation=True, max_length=lengths[1])["input_ids"]
    return {**encoded, "labels": labels, "references": summaries}


def _collate(rows: list[dict[str, Any]], pad: DataCollatorForSeq2Seq) -> dict[str, Any]:
    references = [row.pop("references") for row in rows]
    return {**pad(rows), "references": references}
