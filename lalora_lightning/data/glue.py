"""The tasks of the GLUE benchmark (arXiv 1804.07461)."""

import functools
from typing import Any, Literal

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lalora_lightning.data.loading import load_splits
from lalora_lightning.data.text import TextDataModule, map_rows

__all__ = ["TEXT_COLUMNS", "GlueDataModule", "GlueTask"]

GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "mnli"]

TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}
"""The columns of each task's texts."""


class GlueDataModule(TextDataModule):
    """A GLUE task, tokenized once and padded batch by batch.

    The validation split is also the test split, because the labels of GLUE's test splits are not public. For MNLI it is
    the matched validation split.

    Args:
        task: Name of the task.
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        path: The data set on the Hub, or a folder with one subfolder per task.
        max_length: Longer texts are truncated to this number of tokens.
        batch_size: Texts per batch and device.
        num_workers: Processes that prepare batches.
        max_train_rows: Number of training rows, drawn at random with a fixed seed; by default all of them.

    Raises:
        FileNotFoundError: In ``prepare_data`` and ``setup``: the data set or the tokenizer cannot be found or
            downloaded, or columns are missing.
        ValueError: In ``prepare_data`` and ``setup``: a label is not one of the task's classes.
    """

    def __init__(
        self,
        task: GlueTask,
        tokenizer: str,
        path: str = "nyu-mll/glue",
        max_length: int = 512,
        batch_size: int = 32,
        num_workers: int = 2,
        max_train_rows: int | None = None,
    ) -> None:
        super().__init__(tokenizer, batch_size, num_workers)
        self.save_hyperparameters()
        self.task = task
        self.path = path
        self.max_length = max_length
        self.max_train_rows = max_train_rows

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 means regression."""
        return {"stsb": 1, "mnli": 3}.get(self.task, 2)

    def tokenize(self) -> dict[str, Any]:
        """Tokenize the training and the validation split."""
        texts = TEXT_COLUMNS[self.task]
        validation = "validation_matched" if self.task == "mnli" else "validation"
        splits = load_splits(
            self.path, self.task, (*texts, "label"), ("train", validation), max_train_rows=self.max_train_rows
        )
        if self.num_labels > 1:
            for split in ("train", validation):
                unknown = set(splits[split].unique("label")) - set(range(self.num_labels))
                if unknown:
                    raise ValueError(
                        f"Expected labels of {self.task} to be from 0 to {self.num_labels - 1} but its {split} split "
                        f"has {', '.join(map(str, sorted(unknown)))}."
                    )
        tokenize = functools.partial(_tokenize, tokenizer=self.tokenizer, texts=texts, max_length=self.max_length)
        return {
            name: map_rows(splits[split], tokenize, batched=True)
            for name, split in (("train", "train"), ("validation", validation))
        }

    def collator(self) -> DataCollatorWithPadding:
        """Return the collator that pads to the longest text of a batch."""
        return DataCollatorWithPadding(self.tokenizer)


def _tokenize(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], max_length: int
) -> dict[str, list]:
    encoded = tokenizer(*(rows[text] for text in texts), truncation=True, max_length=max_length)
    return {**encoded, "labels": rows["label"]}
