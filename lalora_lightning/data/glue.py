"""The tasks of the GLUE benchmark."""

import functools
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from lalora_lightning.hub import load_pretrained, load_splits

Task = Literal["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "mnli"]
TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}


class GlueDataModule(LightningDataModule):
    """A task of GLUE, tokenised and padded batch by batch. The validation split is also what is tested on.

    GLUE keeps the labels of its test splits to itself; of MNLI the matched validation split is used.

    Args:
        task: Name of the task.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        path: The data set on the Hub, or a folder with one subfolder a task.
        max_length: Tokens; longer texts are cut.
        batch_size: Texts in a batch, on each device.
        num_workers: Processes that prepare batches.
        max_train_rows: Train on so many rows only, drawn at random with a fixed seed.

    Raises:
        FileNotFoundError: From ``prepare_data`` and ``setup``: data set or tokenizer cannot be reached or found, or
            columns are missing.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: str,
        path: str = "nyu-mll/glue",
        max_length: int = 512,
        batch_size: int = 32,
        num_workers: int = 2,
        max_train_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.task = task
        self.tokenizer_name = tokenizer
        self.path = path
        self.max_length = max_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_train_rows = max_train_rows
        self._splits: dict[str, Any] = {}

    @property
    def num_labels(self) -> int:
        """Size of the head; 1 is regression."""
        return {"stsb": 1, "mnli": 3}.get(self.task, 2)

    def prepare_data(self) -> None:
        # What is tokenised here is read from the cache of datasets in setup, by every process.
        self._tokenised()

    def setup(self, stage: str) -> None:
        self._splits = self._splits or self._tokenised()

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation_matched" if self.task == "mnli" else "validation")

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _tokenised(self) -> dict[str, Any]:
        self.tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_name)
        texts = TEXT_COLUMNS[self.task]
        splits = load_splits(self.path, self.task, columns=(*texts, "label"))
        if self.max_train_rows is not None and self.max_train_rows < len(splits["train"]):
            splits["train"] = splits["train"].shuffle(seed=0).select(range(self.max_train_rows))

        # Only what decides the outcome is handed over: the cache of datasets goes by it.
        tokenise = functools.partial(_tokenise, tokenizer=self.tokenizer, texts=texts, max_length=self.max_length)
        return {
            split: rows.map(tokenise, batched=True, remove_columns=rows.column_names)
            for split, rows in splits.items()
            if not split.startswith("test")
        }

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=DataCollatorWithPadding(self.tokenizer),
            persistent_workers=self.num_workers > 0,
        )


def _tokenise(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], max_length: int
) -> dict[str, list]:
    encoded = tokenizer(*(rows[text] for text in texts), truncation=True, max_length=max_length)
    return {**encoded, "labels": rows["label"]}
