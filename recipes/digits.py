"""Real handwritten digits, three ways: a new head alone, LoRA, La-LoRA. Needs no network and no GPU.

scikit-learn's 1,797 digits (8x8 pixels). A small vision transformer is pretrained on the upright digits 0 to 4. Then
its backbone is frozen and adapted to all ten digits, turned by 90 degrees, so that a new head alone is not enough.

    python -m recipes.digits --help
"""

import dataclasses
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

from lalora_lightning import LaLoraCallback, add_lora, lora_layers, lora_state_dict
from lalora_lightning.modules.image_classification import ImageClassificationModule
from recipes.reporting import mean_and_spread, quiet, table

BACKBONE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 6, "num_heads": 4, "mlp_ratio": 2}

METHODS = ("head only", "LoRA", "La-LoRA")


@dataclasses.dataclass
class Result:
    method: str
    accuracy: float
    parameters: int
    ranks: list[int]
    seconds: float


def main(
    lalora: dict[str, Any],
    seeds: int = 1,
    steps: int = 300,
    learning_rate: float = 5e-3,
    batch_size: int = 64,
    output: Path = Path("runs/digits"),
) -> None:
    """Adapt a small vision transformer to turned digits by a new head alone, by LoRA and by La-LoRA.

    Args:
        lalora: Arguments of LaLoraCallback; LoRA has its rank, alpha and dropout too.
        seeds: Number of runs of each method; with more than one the table gives mean and standard deviation.
        steps: Optimizer steps of a run.
        learning_rate: Peak learning rate of AdamW.
        batch_size: Images in a batch.
        output: Folder of logs, picture and adapter.
    """
    quiet()
    train, test = turned_digits()
    backbone = pretrained_backbone()
    results = []
    for seed in range(seeds):
        for method in METHODS:
            pl.seed_everything(seed, verbose=False)
            model = new_model(learning_rate)
            model.load_state_dict(backbone, strict=False)
            callbacks: list[pl.Callback] = [NamedProgressBar(f"{method}, seed {seed}")]
            if method == "head only":
                model.requires_grad_(False)
                model.model.head.requires_grad_(True)
            elif method == "LoRA":
                add_lora(model, **{key: lalora[key] for key in ("rank", "alpha", "dropout", "target_modules")})
            else:
                callbacks.append(LaLoraCallback(**lalora))

            folder = output / method.replace(" ", "-").lower() / f"seed-{seed}"
            loggers = [TensorBoardLogger(folder, "", "tensorboard"), CSVLogger(folder, "", "csv")]
            trainer = new_trainer(steps, callbacks, loggers)
            order = torch.Generator().manual_seed(seed)
            start = time.perf_counter()
            trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True, generator=order))
            seconds = time.perf_counter() - start
            (scores,) = trainer.test(model, DataLoader(test, len(test)), verbose=False)
            results.append(
                Result(
                    method,
                    100 * scores["test/accuracy"],
                    sum(p.numel() for p in model.parameters() if p.requires_grad),
                    [int(layer.rank) for layer in lora_layers(model).values()],
                    seconds,
                )
            )
        assert isinstance(callbacks[-1], LaLoraCallback)
        callbacks[-1].plot().savefig(folder / "ranks.png", dpi=150)
        torch.save(lora_state_dict(model), folder / "adapter.pt")

    print(f"\nTest accuracy on the turned digits after {steps} steps, maximum rank {lalora['rank']}:\n")
    print(summary(results))
    print(f"\nTensorBoard logs:    tensorboard --logdir {output}")
    print(f"Rank trajectories:   {folder / 'ranks.png'}")
    print(f"Adapter:             {folder / 'adapter.pt'}")


def upright_digits() -> tuple[Tensor, Tensor]:
    """All digits: images (1797, 1, 8, 8) in [0, 1] and labels (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def turned_digits() -> tuple[TensorDataset, TensorDataset]:
    """The task: all ten digits turned by 90 degrees, two thirds to train on and one third to test on."""
    images, labels = upright_digits()
    train, test = train_test_split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    turned = images.rot90(1, (2, 3))
    return TensorDataset(turned[train], labels[train]), TensorDataset(turned[test], labels[test])


def new_model(learning_rate: float) -> ImageClassificationModule:
    return ImageClassificationModule(
        "vit_tiny_patch16_224", num_classes=10, pretrained=False, learning_rate=learning_rate, model_args=BACKBONE
    )


def pretrained_backbone() -> dict[str, Tensor]:
    """Weights of the backbone, trained in full on the upright digits 0 to 4; the head is left out."""
    pl.seed_everything(0, verbose=False)
    images, labels = upright_digits()
    known = labels < 5
    return pretrain(new_model(learning_rate=2e-3), TensorDataset(images[known], labels[known]), steps=400)


def pretrain(model: ImageClassificationModule, data: TensorDataset, steps: int) -> dict[str, Tensor]:
    """Train a timm model in full; its weights, all but the head's."""
    trainer = new_trainer(steps, callbacks=[NamedProgressBar("pretraining")], loggers=[])
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return {name: value for name, value in model.state_dict().items() if not name.startswith("model.head.")}


def new_trainer(steps: int, callbacks: list[pl.Callback], loggers: list[Logger]) -> pl.Trainer:
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
    """The table at the end: one row a method."""
    rows = []
    for method in METHODS:
        own = [result for result in results if result.method == method]
        ranks = [statistics.mean(layer) for layer in zip(*(result.ranks for result in own), strict=True)]
        rows.append(
            [
                method,
                f"{mean_and_spread([result.accuracy for result in own])} %",
                f"{own[0].parameters:,}",
                " ".join(f"{rank:g}" for rank in ranks) or "-",
                mean_and_spread([result.seconds for result in own]),
            ]
        )
    return table(["method", "test accuracy", "trainable parameters", "ranks of the layers", "seconds"], rows)


class NamedProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the name of the run in front."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10)
        self.name = name

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, *args: Any) -> None:
        super().on_train_epoch_start(*args)
        # "Epoch 0" is all that Lightning's bar would say.
        self.train_progress_bar.set_description(f"{self.name}, epoch {self.trainer.current_epoch}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"lalora"})
    parser.add_class_arguments(LaLoraCallback, "lalora")
    main(**parser.parse_args().as_dict())
