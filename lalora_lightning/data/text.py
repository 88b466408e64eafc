"""What the data modules for text share: tokenised once, padded batch by batch."""

import os
from collections.abc import Callable
from typing import Any

import pyarrow.compute
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from lalora_lightning.hub import load_pretrained


class TextDataModule(LightningDataModule):
    """A data module whose subclasses say how to tokenise and how to make a batch.

    Training batches hold texts of about one length, drawn anew for every epoch: less padding, in less time. Where there
    is no test split, the validation split is tested on.

    Args:
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        batch_size: Rows in a batch, on each device.
        num_workers: Processes that prepare batches.

    Attributes:
        splits: Tokenised rows by the name of their split, from ``setup`` on.
    """

    def __init__(self, tokenizer: str, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.splits: dict[str, Any] = {}

    def tokenise(self) -> dict[str, Any]:
        """The splits "train", "validation" and perhaps "test", ready for batches.

        The functions it maps over rows take only what decides the outcome: the cache of datasets goes by it. They take
        copies of the tokenizer, because a call changes a tokenizer of transformers 4: it keeps the truncation.
        """
        raise NotImplementedError

    def collator(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Makes a batch of rows; can be sent to other processes."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        # What one process tokenises here, all read from the cache in setup.
        if not self.splits:
            self._load()

    def setup(self, stage: str) -> None:
        self.splits = self.splits or self._load()

    def train_dataloader(self) -> DataLoader:
        # Batches of the paper's sets drawn at random are 22% to 62% padding, these 1% to 4%. The Trainer would shuffle
        # any other sampler in several processes; its own takes its seed from the same place.
        processes, rank = self.processes()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        lengths = _lengths(self.splits["train"])
        sampler = DistributedLengthGroupedSampler(self.batch_size, None, processes, rank, seed, lengths=lengths)
        return self.loader("train", sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return self.loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test" if "test" in self.splits else "validation")

    def processes(self) -> tuple[int, int]:
        """How many processes train, and which of them this is."""
        replica = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return replica["num_replicas"], replica["rank"]

    def loader(self, split: str, sampler: Sampler | None = None, **arguments: Any) -> DataLoader:
        """A loader of a split; ``arguments`` take the place of the usual ones of ``DataLoader``."""
        usual = {"batch_size": self.batch_size, "collate_fn": self.collator()}
        return DataLoader(
            self.splits[split],
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **{**usual, **arguments},
        )

    def _load(self) -> dict[str, Any]:
        # On the right, so that the first token of a text is never padding.
        self.tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_name, padding_side="right")
        return self.tokenise()


def _lengths(rows: Any) -> list[int]:
    """Tokens of each row, read without making lists of them."""
    tables = rows.with_format("arrow").iter(10_000)
    return [n for table in tables for n in pyarrow.compute.list_value_length(table["input_ids"]).to_pylist()]
