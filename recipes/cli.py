"""The command line that all Trainer recipes share: fit, test, report, save the adapter."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lalora_lightning import LaLoraCallback, lora_layers, lora_state_dict
from recipes.methods import METHODS, parse_method
from recipes.reporting import quiet, table

# The options of --lalora that other methods with a setting of that name have, too.
SHARED_SETTINGS = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")


class RecipeCLI(LightningCLI):
    """LightningCLI with a choice of method and a checkpoint of the best epoch.

    ``--method`` takes what :func:`parse_method` reads. The options under ``--lalora`` are those of
    :class:`LaLoraCallback`, of which other methods take :data:`SHARED_SETTINGS` where they have them.
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
        parser.add_argument(
            "--method", default="lalora", help=f"Of {', '.join(METHODS)}; settings as name:setting=value,setting=value."
        )
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
        """Do what ``--method`` says to model and trainer.

        Raises:
            ValueError: Method or setting is unknown, or the method cannot adapt the model.
        """
        method, settings = parse_method(self.config.method)
        options = self.config.lalora.as_dict()
        if method.name != "lalora":
            options = {name: options[name] for name in SHARED_SETTINGS if name in method.defaults}
        # In front: what the other callbacks set up may depend on the layers.
        self.trainer.callbacks[:0] = method.adapt(self.model, **{**options, **settings})  # type: ignore[attr-defined]


def run(
    module: type[LightningModule],
    data: type[LightningDataModule],
    recipe: str,
    links: Sequence[tuple[str, str, str]] = (),
    variants: tuple[str, str] | None = None,
    shared: Path | None = None,
) -> None:
    """Fit, test the best checkpoint, print a table, save the adapter and the table beside the logs.

    Args:
        module: The task.
        data: Its data.
        recipe: Path of the recipe; a YAML file of the same name beside it holds its settings.
        links: ``(source, target, "parse" or "instantiate")`` arguments that follow others.
        variants: An argument and its default; ``<recipe>.<value of the argument>.yaml`` overrides the first YAML file.
        shared: A YAML file that the recipe's own overrides.
    """
    quiet()
    torch.set_float32_matmul_precision("high")
    files = [*([] if shared is None else [shared]), Path(recipe).with_suffix(".yaml")]
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
    try:
        cli.adapt()
    except ValueError as error:
        sys.exit(f"error: {error}")
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
    print(f"\nLogs, settings, report.json and weights: {folder}")
    if "ranks" in report:
        print(f"A page with pictures of the ranks: python -m lalora_lightning.report {folder}")


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
