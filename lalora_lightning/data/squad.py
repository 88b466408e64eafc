"""SQuAD 1.1 and 2.0."""

import functools
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from lalora_lightning.data.squad_windows import collate, tokenise
from lalora_lightning.hub import load_pretrained, load_splits

Version = Literal["1.1", "2.0"]


class SquadDataModule(LightningDataModule):
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
        super().__init__()
        self.save_hyperparameters()
        self.version = version
        self.tokenizer_name = tokenizer
        self.path = path
        self.max_length = max_length
        self.stride = stride
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_train_rows = max_train_rows
        self._splits: dict[str, Any] = {}

    @property
    def no_answer(self) -> bool:
        """Whether there are questions without answer."""
        return self.version == "2.0"

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
        return self.val_dataloader()

    def _tokenised(self) -> dict[str, Any]:
        # On the right, so that the first token of a window is never padding.
        self.tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_name, padding_side="right")
        if self.max_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"Expected max_length to be at most {self.tokenizer.model_max_length}, which is what "
                f"{self.tokenizer_name} takes, but got {self.max_length}."
            )
        splits = load_splits(self.path, columns=("context", "question", "answers"))
        if "validation" not in splits:
            raise FileNotFoundError(
                f"Expected {self.path} to have a validation split but its splits are {', '.join(splits)}."
            )
        if self.max_train_rows is not None and self.max_train_rows < len(splits["train"]):
            splits["train"] = splits["train"].shuffle(seed=0).select(range(self.max_train_rows))

        # Only what decides the outcome is handed over: the cache of datasets goes by it.
        arguments = {
            "tokenizer": self.tokenizer,
            "max_length": self.max_length,
            "stride": self.stride,
            "no_answer": self.no_answer,
        }
        return {
            split: splits[split].map(
                functools.partial(tokenise, scored=split == "validation", **arguments),
                batched=True,
                with_indices=True,
                remove_columns=splits[split].column_names,
            )
            for split in ("train", "validation")
        }

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=functools.partial(collate, pad=DataCollatorWithPadding(self.tokenizer)),
            persistent_workers=self.num_workers > 0,
        )
