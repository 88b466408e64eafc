"""The command line that all Trainer recipes share: fit, test, report, save the adapter."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lalora_lightning import LaLoraCallback, add_lora, lora_layers, lora_state_dict
from recipes.reporting import quiet, table

Adapter = Literal["lalora", "lora", "head", "none"]


class RecipeCLI(LightningCLI):
    """LightningCLI with a choice of adapter and a checkpoint of the best epoch.

    ``--adapter lalora`` trains with :class:`LaLoraCallback`, ``lora`` with the same layers at full rank, ``head``
    the task head alone, ``none`` all weights; the options under ``--lalora`` are the callback's.
    """

    def __init__(
        self,
        module: type[LightningModule],
        data: type[LightningDataModule],
        links: Sequence[tuple[str, str, str]],
        settings: Sequence[Path],
    ) -> None:
        self.links = links
        super().__init__(
            module,
            data,
            run=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"default_config_files": list(map(str, settings))},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--adapter", type=Adapter, default="lalora", help="What is trained.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint of a run to go on with.")
        parser.add_class_arguments(LaLoraCallback, "lalora")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        for source, target, when in self.links:
            parser.link_arguments(source, target, apply_on=when)
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        parser.set_defaults(
            {
                "trainer.precision": "bf16-mixed" if has_bf16 else "32-true",
                # Ctrl-C, too, leaves a checkpoint to go on with.
                "checkpoint.save_on_exception": True,
                "checkpoint.save_last": True,
            }
        )

    def adapt(self) -> None:
        """Do what ``--adapter`` says to model and trainer."""
        settings = self.config.lalora.as_dict()
        if self.config.adapter == "lalora":
            # In front: what the other callbacks set up may depend on the layers.
            self.trainer.callbacks.insert(0, LaLoraCallback(**settings))  # type: ignore[attr-defined]
        elif self.config.adapter in ("lora", "head"):
            names = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")
            add_lora(self.model, **{name: settings[name] for name in names})
            if self.config.adapter == "head":
                # Frozen at their start, adapters change nothing.
                for layer in lora_layers(self.model).values():
                    layer.lora_A.requires_grad_(False)
                    layer.lora_B.requires_grad_(False)


def run(
    module: type[LightningModule],
    data: type[LightningDataModule],
    recipe: str,
    links: Sequence[tuple[str, str, str]] = (),
    variants: tuple[str, str] | None = None,
) -> None:
    """Fit, test the best checkpoint, print a table, save the adapter and the table beside the logs.

    Args:
        module: The task.
        data: Its data.
        recipe: Path of the recipe; a YAML file of the same name beside it holds its settings.
        links: ``(source, target, "parse" or "instantiate")`` arguments that follow others.
        variants: An argument and its default; ``<recipe>.<value of the argument>.yaml`` overrides the first YAML file.
    """
    quiet()
    torch.set_float32_matmul_precision("high")
    files = [Path(recipe).with_suffix(".yaml")]
    if variants is not None:
        # Read before all others, since their defaults depend on it. What it may be is the module's to check.
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument(f"--{variants[0]}", dest="variant", default=variants[1])
        variant = first.parse_known_args()[0].variant
        files.append(Path(recipe).with_suffix(f".{variant}.yaml"))
    try:
        cli = RecipeCLI(module, data, links, files)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    cli.adapt()
    start = time.perf_counter()
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    except SystemExit:
        # Lightning's answer to Ctrl-C, after it has saved a checkpoint and shut down.
        checkpoint = cli.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
            print(f"\nInterrupted. To go on: --ckpt_path {checkpoint.last_model_path}", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
    if not cli.trainer.is_global_zero:
        return
    report = summarize_run(cli.trainer, cli.model, scores, seconds)
    folder = Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    if lora_layers(cli.model):
        torch.save(lora_state_dict(cli.model), folder / "adapter.pt")
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    rows = [[key, f"{value:.4g}" if isinstance(value, float) else str(value)] for key, value in report.items()]
    print("\n" + table([files[-1].stem, ""], rows))
    print(f"\nLogs, settings, report and weights: {folder}")


def summarize_run(trainer: pl.Trainer, model: pl.LightningModule, scores: Any, seconds: float) -> dict[str, Any]:
    """What is worth keeping of a run: scores, parameters, ranks, time."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    callbacks: Iterable[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    allocators = [c.allocator for c in callbacks if isinstance(c, LaLoraCallback) and c.allocator is not None]
    return {
        **scores,
        "trainable parameters": trainable,
        "trainable share": trainable / sum(p.numel() for p in model.parameters()),
        **({"ranks": allocators[0].ranks.tolist()} if allocators else {}),
        "seconds of training": seconds,
    }
