"""Adapt a model to handwritten digits in six ways and compare them, without network access or a GPU.

The data are scikit-learn's 1,797 digits (8x8 pixels). A small vision transformer is pretrained on the upright digits 0
to 4. Its frozen backbone is then adapted to all ten digits, rotated by 90 degrees. A new head alone is not enough for
this task.

    python -m recipes.digits --help
"""

import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import LaLoraCallback, lora_layers, lora_state_dict
from lalora_lightning.modules.image_classification import ImageClassificationModule
from lalora_lightning.tables import text_table
from recipes.comparison.ranks import adapter_parameters
from recipes.console import mean_and_spread, quiet

__all__ = [
    "ADAPTATIONS",
    "BACKBONE",
    "Adaptation",
    "NamedProgressBar",
    "Result",
    "main",
    "new_model",
    "new_trainer",
    "pretrain",
    "pretrained_backbone",
    "rotated_digits",
    "split_digits",
    "summary",
    "upright_digits",
]

BACKBONE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 6, "num_heads": 4, "mlp_ratio": 2}


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A row of the table.

    Attributes:
        name: Name of its folder.
        title: What is adapted and how.
        learning_rate: Peak learning rate of AdamW: the best on held-out rows, see docs/results.md.
        settings: Arguments of LaLoraCallback; None to train a new head only.
    """

    name: str
    title: str
    learning_rate: float
    settings: dict[str, Any] | None


_ALL = {"target_modules": "all-linear"}

ADAPTATIONS = (
    Adaptation("head", "new head only", 8e-2, None),
    Adaptation("lora", "query and value, LoRA at rank 8", 2e-2, {"rank": 8, "fixed_ranks": True}),
    Adaptation("lalora", "query and value, ranks grow to 8", 2e-2, {"rank": 8, "log_sparsity": True}),
    Adaptation("lora-all", "all linear layers, LoRA at rank 2", 1e-2, {"rank": 2, "fixed_ranks": True, **_ALL}),
    Adaptation(
        "lalora-all",
        "all linear layers, grow to 2, by kind",
        2e-2,
        {"rank": 8, "average_rank": 2, "group_by": "kind", **_ALL},
    ),
    Adaptation(
        "condensed-all",
        "all linear layers, rank 8 condensed to 2",
        1e-2,
        {"rank": 8, "fixed_ranks": True, "condense_to": 2, "group_by": "module", **_ALL},
    ),
)


@dataclasses.dataclass
class Result:
    """A run: test accuracy in percent, adapter parameters that are deployed, seconds of training."""

    title: str
    accuracy: float
    parameters: int
    seconds: float


def main(seeds: int = 1, steps: int = 300, batch_size: int = 64, output: Path = Path("runs/digits")) -> None:
    """Adapt a small vision transformer to rotated digits in six ways.

    Args:
        seeds: Number of runs of each; with several, the table shows mean and standard deviation.
        steps: Optimizer steps of a run.
        batch_size: Images in a batch.
        output: Folder for logs, figures and adapters.
    """
    quiet()
    train, test = rotated_digits()
    backbone = pretrained_backbone()
    results = []
    for seed, adaptation in itertools.product(range(seeds), ADAPTATIONS):
        pl.seed_everything(seed, verbose=False)
        model = new_model(adaptation.learning_rate)
        model.load_state_dict(backbone, strict=False)
        callbacks: list[pl.Callback] = [NamedProgressBar(f"{adaptation.title}, seed {seed}")]
        if adaptation.settings is None:
            model.requires_grad_(False)
            model.model.head.requires_grad_(True)
        else:
            callbacks.append(LaLoraCallback(**adaptation.settings))
        folder = output / adaptation.name / f"seed-{seed}"
        loggers = [TensorBoardLogger(folder, "", "tensorboard"), CSVLogger(folder, "", "csv")]
        trainer = new_trainer(steps, callbacks, loggers)
        order = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True, generator=order))
        seconds = time.perf_counter() - start
        (scores,) = trainer.test(model, DataLoader(test, len(test)), verbose=False)
        results.append(Result(adaptation.title, 100 * scores["test/accuracy"], adapter_parameters(model), seconds))
        if lora_layers(model):
            torch.save(lora_state_dict(model), folder / "adapter.pt")
        for callback in callbacks:
            if isinstance(callback, LaLoraCallback) and callback.allocator is not None:
                callback.plot().savefig(folder / "ranks.png", dpi=150)

    print(f"\nTest accuracy on the rotated digits after {steps} steps:\n")
    print(summary(results))
    print("\nThese are single tasks and seeds. docs/results.md has more of both, with intervals.")
    print(f"\nTensorBoard logs:    tensorboard --logdir {output}")
    print(f"Rank trajectories:   {output}/*/seed-*/ranks.png")
    print(f"Adapters:            {output}/*/seed-*/adapter.pt")


def upright_digits() -> tuple[Tensor, Tensor]:
    """Return all digits: images (1797, 1, 8, 8) in [0, 1] and labels (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def rotated_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return all ten digits rotated by 90 degrees: two thirds for training and one third for testing."""
    images, labels = upright_digits()
    return split_digits(images.rot90(1, (2, 3)), labels)


def split_digits(images: Tensor, labels: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """Return two thirds of the digits for training and one third for testing, always the same."""
    train, test = train_test_split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def new_model(learning_rate: float) -> ImageClassificationModule:
    """Return the vision transformer with random weights and a head for ten classes."""
    return ImageClassificationModule(
        "vit_tiny_patch16_224", num_classes=10, pretrained=False, learning_rate=learning_rate, model_args=BACKBONE
    )


def pretrained_backbone() -> dict[str, Tensor]:
    """Train the whole model on the upright digits 0 to 4 and return the weights of its backbone."""
    pl.seed_everything(0, verbose=False)
    images, labels = upright_digits()
    known = labels < 5
    return pretrain(new_model(learning_rate=2e-3), TensorDataset(images[known], labels[known]), steps=400)


def pretrain(model: ImageClassificationModule, data: TensorDataset, steps: int) -> dict[str, Tensor]:
    """Train all parameters of a timm model and return its weights, without the head."""
    trainer = new_trainer(steps, callbacks=[NamedProgressBar("pretraining")], loggers=[])
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return {name: value for name, value in model.state_dict().items() if not name.startswith("model.head.")}


def new_trainer(steps: int, callbacks: list[pl.Callback], loggers: list[Logger]) -> pl.Trainer:
    """Return a Trainer without checkpoints for one device."""
    return pl.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=loggers,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def summary(results: list[Result]) -> str:
    """Return the table of results with a row for each way to adapt the model."""
    rows = []
    for title in dict.fromkeys(result.title for result in results):
        own = [result for result in results if result.title == title]
        rows.append(
            [
                title,
                f"{mean_and_spread([result.accuracy for result in own])} %",
                f"{statistics.mean(result.parameters for result in own):,.0f}",
                mean_and_spread([result.seconds for result in own]),
            ]
        )
    return text_table(["adapted", "test accuracy", "adapter parameters", "seconds"], rows)


class NamedProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the name of the run in front.

    Args:
        name: The name of the run.
    """

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10)
        self.name = name

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """Return the metrics without the version number of the logs."""
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, *args: Any) -> None:
        """Set the text in front of the bar."""
        super().on_train_epoch_start(*args)
        self.train_progress_bar.set_description(f"{self.name}, epoch {self.trainer.current_epoch}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main)
    main(**parser.parse_args().as_dict())
