"""Images with labels, from the Hub or from a folder."""

import functools
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lalora_lightning.data.loading import load_splits

__all__ = ["ImageDataModule"]


class ImageDataModule(LightningDataModule):
    """An image data set in the Hub's layout: an image column and a label column.

    Batches are ``(images, labels)``: ``(N, 3, image_size, image_size)`` float32 in [0, 1] and ``(N,)`` int64. Training
    images are flipped at random. Without a validation split, part of the training split is held out. Without a test
    split, the validation split is used for testing.

    Args:
        path: Name of a data set on the Hub, or a folder: parquet files in the Hub's layout, or images in one folder per
            class.
        label_column: By default the column of class labels; if there are several, the one with the most classes.
        image_size: Images are resized to squares with sides of this many pixels.
        batch_size: Images per batch and device.
        val_fraction: Fraction of the training split that is held out, in (0, 1).
        num_workers: Processes that decode images.
        seed: Seed of the held-out split.

    Raises:
        FileNotFoundError: In ``num_classes``, ``prepare_data`` and ``setup``: the data set cannot be found or
            downloaded, or has no training split, no image column or no label column.
    """

    def __init__(
        self,
        path: str,
        label_column: str | None = None,
        image_size: int = 224,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.path = path
        self.label_column = label_column
        self.image_size = image_size
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        self._splits: dict[str, datasets.Dataset] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes. Loads the data set."""
        features = load_splits(self.path)["train"].features
        return features[self._label_column(features)].num_classes

    def prepare_data(self) -> None:
        """Download the data set in one process."""
        load_splits(self.path)

    def setup(self, stage: str) -> None:
        """Load the splits and hold out the validation split if the data set has none."""
        if self._splits is not None:
            return
        loaded = load_splits(self.path)
        features = loaded["train"].features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise FileNotFoundError(
                f"Expected {self.path} to have an image column but its columns are {', '.join(features)}."
            )
        self._columns = images[0], self._label_column(features)
        if "validation" not in loaded:
            halves = loaded["train"].train_test_split(self.val_fraction, seed=self.seed)
            loaded |= {"train": halves["train"], "validation": halves["test"]}
        loaded.setdefault("test", loaded["validation"])
        self._splits = loaded

    def train_dataloader(self) -> DataLoader:
        """Return the training split, shuffled and flipped at random."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation split in order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Return the test split, or the validation split if there is no test split, in order."""
        return self._loader("test")

    def _label_column(self, features: datasets.Features) -> str:
        labels: dict[str, int] = {
            name: f.num_classes for name, f in features.items() if isinstance(f, datasets.ClassLabel)
        }
        wanted = self.label_column or max(labels, key=labels.__getitem__, default="label")
        if wanted not in labels:
            raise FileNotFoundError(
                f"Expected {self.path} to have {wanted!r} as a column of class labels but its columns are "
                f"{', '.join(features)}; {', '.join(labels) or 'none'} of them hold class labels."
            )
        return wanted

    def _loader(self, split: str, train: bool = False) -> DataLoader:
        assert self._splits is not None
        transform = v2.Compose(
            [
                # This comes before the conversion to a tensor, because the indices of a palette are not colors.
                v2.RGB(),
                v2.ToImage(),
                v2.Resize((self.image_size, self.image_size), antialias=True),
                v2.RandomHorizontalFlip(0.5 if train else 0.0),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            shuffle=train,
            num_workers=self.num_workers,
            collate_fn=functools.partial(_collate, transform=transform, columns=self._columns),
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _collate(rows: list[dict[str, Any]], transform: v2.Compose, columns: tuple[str, str]) -> tuple[Tensor, Tensor]:
    image, label = columns
    return torch.stack([transform(row[image]) for row in rows]), torch.tensor([row[label] for row in rows])
