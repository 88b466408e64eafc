"""The tasks of the GLUE benchmark."""

import copy
import functools
from typing import Any, Literal

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from lalora_lightning.data.text import TextDataModule
from lalora_lightning.hub import load_splits

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


class GlueDataModule(TextDataModule):
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
        ValueError: From the same: there are labels outside the task's classes.
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
        super().__init__(tokenizer, batch_size, num_workers)
        self.save_hyperparameters()
        self.task = task
        self.path = path
        self.max_length = max_length
        self.max_train_rows = max_train_rows

    @property
    def num_labels(self) -> int:
        """Size of the head; 1 is regression."""
        return {"stsb": 1, "mnli": 3}.get(self.task, 2)

    def tokenise(self) -> dict[str, Any]:
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
        tokenise = functools.partial(_tokenise, tokenizer=self.tokenizer, texts=texts, max_length=self.max_length)
        return {
            name: splits[split].map(copy.deepcopy(tokenise), batched=True, remove_columns=splits[split].column_names)
            for name, split in (("train", "train"), ("validation", validation))
        }

    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)


def _tokenise(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], max_length: int
) -> dict[str, list]:
    encoded = tokenizer(*(rows[text] for text in texts), truncation=True, max_length=max_length)
    return {**encoded, "labels": rows["label"]}
