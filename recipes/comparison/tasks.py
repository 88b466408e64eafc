"""The tasks on which methods are compared: a pretrained backbone with a new head, data, and a score.

A fifth of the training rows is held out to choose learning rates. These rows are the same for all runs, and no run is
trained on them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoTokenizer

from lalora_lightning.data.glue import GlueDataModule
from lalora_lightning.data.loading import load_pretrained, load_splits
from lalora_lightning.files import replaced_when_complete
from lalora_lightning.modules.image_classification import ImageClassificationModule
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from lalora_lightning.modules.task import TaskModule
from recipes import digits
from recipes.comparison.next_token import NextTokenModule, collator, load_texts

__all__ = ["CIFAR10_BACKBONE", "GLUE_METRICS", "TASKS", "ComparisonTask", "Scored", "TaskSettings", "build_task"]

Scored = Literal["selection", "test"]
"""The rows on which a run is scored: those to choose a learning rate with, or the test rows."""

_SELECTION_SHARE = 0.2

CIFAR10_BACKBONE = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 4, "mlp_ratio": 2}
GLUE_METRICS = {"mrpc": "accuracy", "cola": "matthews", "stsb": "pearson", "sst2": "accuracy"}


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Settings of the tasks.

    Attributes:
        glue_path: GLUE on the Hub, or a folder with a subfolder for each task.
        cifar10_path: CIFAR-10 on the Hub, or a folder in the Hub's layout.
        dialogsum_path: DialogSum on the Hub, or a folder in the Hub's layout.
        model: The text encoder, on the Hub or a local model folder.
        language_model: The decoder, on the Hub or a local model folder.
        max_train_rows: Number of texts, of which a fifth is held out to choose learning rates; all by default.
        max_length: Maximum number of tokens of a text; longer texts are truncated.
        epochs: Length of a run on GLUE.
        steps: Length of a run on other data, in optimizer steps.
        batch_size: Rows in a batch; by default 64 images or 32 texts.
        cache: Folder for the small backbones that this recipe pretrains.
    """

    glue_path: str = "nyu-mll/glue"
    cifar10_path: str = "uoft-cs/cifar10"
    dialogsum_path: str = "knkarthick/dialogsum"
    model: str = "roberta-base"
    language_model: str = "HuggingFaceTB/SmolLM2-135M"
    max_train_rows: int | None = None
    max_length: int = 128
    epochs: int = 3
    steps: int = 300
    batch_size: int | None = None
    cache: Path = Path("runs/backbones")


@dataclasses.dataclass(frozen=True)
class ComparisonTask:
    """A model to adapt, data, and a score.

    Attributes:
        name: The name of the task in ``--tasks``.
        settings: Everything that the scores depend on, except method, seed and learning rate.
        metric: Name of the test metric that is the score, such as ``test/accuracy``; in [-1, 1], higher is better.
        learning_rate: Middle of the default grid of peak learning rates.
        steps: Length of a run in optimizer steps; -1 if it is given in epochs.
        epochs: Length of a run in epochs; None if it is given in steps.
        new_module: A function from a learning rate to the backbone with a randomly initialized head.
        loaders: A function from a seed and the rows that are scored to the arguments of ``Trainer.fit`` and
            ``Trainer.test`` that hold the data. The same seed results in the same order of the training rows.
        backbone: A hash of the backbone's weights, if this recipe pretrains it; otherwise None.
    """

    name: str
    settings: dict[str, Any]
    metric: str
    learning_rate: float
    steps: int
    epochs: int | None
    new_module: Callable[[float], TaskModule]
    loaders: Callable[[int, Scored], tuple[dict[str, Any], dict[str, Any]]]
    backbone: str | None = None


def build_task(name: str, settings: TaskSettings) -> ComparisonTask:
    """Load the data of a task and return the task.

    Raises:
        ValueError: There is no task of this name.
        FileNotFoundError: Data or model cannot be found or downloaded.
    """
    if name not in TASKS:
        raise ValueError(f"Expected a task to be one of {', '.join(TASKS)} but got {name!r}.")
    return TASKS[name](settings)


def _digits(settings: TaskSettings) -> ComparisonTask:
    """All ten digits rotated by 90 degrees; the backbone is pretrained on the upright digits 0 to 4."""
    rows, test = digits.rotated_digits()
    backbone = _cached(settings.cache / "digits.pt", digits.pretrained_backbone)
    train, selection = _without_selection(*rows.tensors)
    scored: dict[Scored, TensorDataset] = {"selection": selection, "test": test}
    return _images("digits", settings, train, scored, digits.new_model, backbone)


def _cifar10(settings: TaskSettings) -> ComparisonTask:
    """Classes 5 to 9 of CIFAR-10; the backbone is a small vision transformer pretrained on classes 0 to 4."""
    images, labels = _cifar10_images(settings.cifar10_path, "train")
    test_images, test_labels = _cifar10_images(settings.cifar10_path, "test")
    known, test_new = labels < 5, test_labels >= 5

    def pretrained() -> dict[str, Tensor]:
        pl.seed_everything(0, verbose=False)
        return digits.pretrain(_new_vit(1e-3), _with_mirror_images(images[known], labels[known]), steps=3000)

    train, selection = _without_selection(images[~known], labels[~known] - 5)
    test = TensorDataset(test_images[test_new], test_labels[test_new] - 5)
    backbone = _cached(settings.cache / f"cifar10-{2 * len(labels)}.pt", pretrained)
    scored: dict[Scored, TensorDataset] = {"selection": selection, "test": test}
    return _images("cifar10", settings, _with_mirror_images(*train.tensors), scored, _new_vit, backbone)


def _images(
    name: str,
    settings: TaskSettings,
    train: TensorDataset,
    scored: Mapping[Scored, TensorDataset],
    new_model: Callable[[float], ImageClassificationModule],
    backbone: dict[str, Tensor],
) -> ComparisonTask:
    batch_size = settings.batch_size or 64
    missing, unexpected = new_model(1e-3).load_state_dict(backbone, strict=False)
    if unexpected or not all(parameter.startswith("model.head.") for parameter in missing):
        raise ValueError(f"Expected the weights of the backbone of {name} in {settings.cache}; delete this folder.")

    def new_module(learning_rate: float) -> ImageClassificationModule:
        module = new_model(learning_rate)
        module.load_state_dict(backbone, strict=False)
        return module

    return ComparisonTask(
        name,
        settings={
            "steps": settings.steps,
            "batch_size": batch_size,
            "train_rows": len(train),
            "selection_rows": len(scored["selection"]),
            "test_rows": len(scored["test"]),
        },
        metric="test/accuracy",
        learning_rate=5e-3,
        steps=settings.steps,
        epochs=None,
        new_module=new_module,
        loaders=functools.partial(_loaders, train, scored, (batch_size, 500), None),
        backbone=_hash(backbone),
    )


def _glue(settings: TaskSettings, task: str) -> ComparisonTask:
    """A GLUE task. It is tested on the validation split, since the labels of the test split are not public."""
    batch_size = settings.batch_size or 32
    data = GlueDataModule(
        task,  # type: ignore[arg-type]
        settings.model,
        settings.glue_path,
        settings.max_length,
        batch_size,
        num_workers=0,
        max_train_rows=settings.max_train_rows,
    )
    data.setup("fit")
    parts = data.splits["train"].train_test_split(_SELECTION_SHARE, seed=0)
    data.splits = {**data.splits, "train": parts["train"], "selection": parts["test"]}

    def loaders(seed: int, rows: Scored) -> tuple[dict[str, Any], dict[str, Any]]:
        # The seed of the process determines the order of the rows.
        return {"datamodule": data}, {"dataloaders": data.loader("validation" if rows == "test" else rows)}

    return ComparisonTask(
        f"glue/{task}",
        settings={
            "model": _last_folders(settings.model),
            "epochs": settings.epochs,
            "batch_size": batch_size,
            "max_length": settings.max_length,
            "train_rows": len(data.splits["train"]),
            "selection_rows": len(data.splits["selection"]),
            "test_rows": len(data.splits["validation"]),
        },
        metric=f"test/{GLUE_METRICS[task]}",
        learning_rate=5e-4,
        steps=-1,
        epochs=settings.epochs,
        new_module=lambda learning_rate: SequenceClassificationModule(settings.model, data.num_labels, learning_rate),
        loaders=loaders,
    )


def _dialogsum(settings: TaskSettings) -> ComparisonTask:
    """The summaries of dialogues, as texts for a causal language model."""
    batch_size = settings.batch_size or 32
    tokenizer = load_pretrained(AutoTokenizer, settings.language_model)
    texts = load_texts(settings.dialogsum_path, "summary", tokenizer, settings.max_length, settings.max_train_rows)
    parts = texts["train"].train_test_split(_SELECTION_SHARE, seed=0)
    scored: dict[Scored, Any] = {"selection": parts["test"], "test": texts["test"]}
    collate = collator(tokenizer)

    return ComparisonTask(
        "dialogsum",
        settings={
            "model": _last_folders(settings.language_model),
            "steps": settings.steps,
            "batch_size": batch_size,
            "max_length": settings.max_length,
            "train_rows": len(parts["train"]),
            "selection_rows": len(parts["test"]),
            "test_rows": len(texts["test"]),
        },
        metric="test/token_accuracy",
        learning_rate=5e-3,
        steps=settings.steps,
        epochs=None,
        new_module=functools.partial(NextTokenModule, settings.language_model),
        loaders=functools.partial(_loaders, parts["train"], scored, (batch_size, 100), collate),
    )


def _loaders(
    train: Any,
    scored: Mapping[Scored, Any],
    batch_sizes: tuple[int, int],
    collate: Callable[[list[Any]], Any] | None,
    seed: int,
    rows: Scored,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return loaders of the training rows, in an order that only depends on the seed, and of the scored rows."""
    order = torch.Generator().manual_seed(seed)
    training = DataLoader(train, batch_sizes[0], True, drop_last=True, generator=order, collate_fn=collate)
    scoring = DataLoader(scored[rows], batch_sizes[1], collate_fn=collate)
    return {"train_dataloaders": training}, {"dataloaders": scoring}


def _last_folders(model: str) -> str:
    """Return the last two parts of a path, because the location of the folder does not matter."""
    return "/".join(Path(model).parts[-2:])


def _without_selection(images: Tensor, labels: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """Return the rows to train on, and those to choose a learning rate with."""
    rows = range(len(labels))
    train, selection = train_test_split(rows, test_size=_SELECTION_SHARE, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[selection], labels[selection])


def _with_mirror_images(images: Tensor, labels: Tensor) -> TensorDataset:
    return TensorDataset(torch.cat([images, images.flip(3)]), torch.cat([labels, labels]))


def _new_vit(learning_rate: float) -> ImageClassificationModule:
    return ImageClassificationModule(
        "vit_tiny_patch16_224",
        num_classes=5,
        pretrained=False,
        learning_rate=learning_rate,
        model_args=CIFAR10_BACKBONE,
    )


def _cifar10_images(path: str, split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) in [0, 1] and labels (N,)."""
    rows = load_splits(path, columns=("img", "label"), splits=("train", "test"))[split]
    images = torch.stack([pil_to_tensor(image) for image in rows["img"]])
    return images.float() / 255, torch.tensor(rows["label"])


def _hash(tensors: Mapping[str, Tensor]) -> str:
    values = hashlib.sha256()
    for name in sorted(tensors):
        values.update(name.encode() + tensors[name].numpy().tobytes())
    return values.hexdigest()[:16]


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from a file; create the file if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {name: value.cpu() for name, value in make().items()}
        # Another comparison may write the same file.
        with replaced_when_complete(path) as temporary:
            torch.save(made, temporary)
    return torch.load(path, weights_only=True)


TASKS: dict[str, Callable[[TaskSettings], ComparisonTask]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "dialogsum": _dialogsum,
    **{f"glue/{task}": functools.partial(_glue, task=task) for task in GLUE_METRICS},
}
