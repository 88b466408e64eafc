"""The command line that all Trainer recipes share: fit, test, report, save the adapter."""

import json
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lalora_lightning import LaLoraCallback, lora_state_dict
from recipes.reporting import quiet, table


class RecipeCLI(LightningCLI):
    """LightningCLI with the La-LoRA callback, a checkpoint of the best epoch and the data's number of classes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LaLoraCallback, "lalora")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        parser.set_defaults({"trainer.precision": "bf16-mixed" if has_bf16 else "32-true"})


def run(module: type[LightningModule], data: type[LightningDataModule], recipe: str) -> None:
    """Fit, test the best checkpoint, print a table, save the adapter and the table beside the logs.

    Args:
        module: The task.
        data: Its data; has a property ``num_classes``.
        recipe: Path of the recipe, beside which a YAML file of the same name holds its settings.
    """
    quiet()
    settings = Path(recipe).with_suffix(".yaml")
    try:
        cli = RecipeCLI(
            module,
            data,
            run=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"default_config_files": [str(settings)]},
        )
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    start = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - start
    if cli.trainer.interrupted or cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)

    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LaLoraCallback))  # type: ignore[attr-defined]
    assert callback.allocator is not None
    trainable = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    report = {
        **scores,
        "trainable parameters": trainable,
        "trainable share": trainable / sum(p.numel() for p in cli.model.parameters()),
        "ranks": callback.allocator.ranks.tolist(),
        "seconds of training": seconds,
    }
    folder = Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    torch.save(lora_state_dict(cli.model), folder / "adapter.pt")
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    rows = [[key, f"{value:.4g}" if isinstance(value, float) else str(value)] for key, value in report.items()]
    print("\n" + table([settings.stem, ""], rows))
    print(f"\nLogs, settings, report and adapter: {folder}")
