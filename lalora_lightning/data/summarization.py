"""Texts with summaries, from the Hub or from a folder."""

import functools
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lalora_lightning.hub import load_pretrained, load_splits


class SummarizationDataModule(LightningDataModule):
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
        super().__init__()
        self.save_hyperparameters()
        self.path, self.config, self.tokenizer_name = path, config, tokenizer
        self.columns, self.prefix = (source_column, target_column), prefix
        self.lengths = [max_source_length, max_target_length]
        self.batch_size, self.num_workers = batch_size, num_workers
        self.max_train_rows = max_train_rows
        self._splits: dict[str, Any] = {}

    def prepare_data(self) -> None:
        # What is tokenised here is read from the cache of datasets in setup, by every process.
        self._tokenised()

    def setup(self, stage: str) -> None:
        self._splits = self._splits or self._tokenised()

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test" if "test" in self._splits else "validation")

    def _tokenised(self) -> dict[str, Any]:
        self.tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_name)
        folder = Path(self.path)
        in_folder_itself = folder.is_dir() and not (folder / (self.config or "")).is_dir()
        splits = load_splits(self.path, None if in_folder_itself else self.config, self.columns)
        if "validation" not in splits:
            found = ", ".join(splits)
            raise FileNotFoundError(f"Expected {self.path} to have a validation split but its splits are {found}.")
        if self.max_train_rows is not None and self.max_train_rows < len(splits["train"]):
            splits["train"] = splits["train"].shuffle(seed=0).select(range(self.max_train_rows))

        # Only what decides the outcome is handed over: the cache of datasets goes by it.
        tokenise = functools.partial(
            _tokenise, tokenizer=self.tokenizer, columns=self.columns, prefix=self.prefix, lengths=self.lengths
        )
        return {
            split: rows.map(tokenise, batched=True, remove_columns=rows.column_names) for split, rows in splits.items()
        }

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=functools.partial(_collate, pad=DataCollatorForSeq2Seq(self.tokenizer)),
            persistent_workers=self.num_workers > 0,
        )


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
