"""The command line of the recipes: train, test, write a report, save the adapter."""

import argparse
import inspect
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lalora_lightning import LaLoraCallback, lora_layers, lora_state_dict
from lalora_lightning.tables import text_table
from recipes.console import quiet
from recipes.methods import METHODS, Method, parse_method

__all__ = ["CONFIGS", "SHARED_SETTINGS", "Link", "RecipeCLI", "argument_options", "options_in", "run", "summarize_run"]

CONFIGS = Path(__file__).parent / "configs"

# The options under --lalora that other methods with a setting of the same name also use.
SHARED_SETTINGS = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")

Link = tuple[str, str, str]
"""Source and target of a linked argument, and when it is set: "parse" or "instantiate"."""


class RecipeCLI(LightningCLI):
    """LightningCLI with a choice of methods and a checkpoint of the best epoch.

    ``--method`` is read by :func:`parse_method`. The options under ``--lalora`` are the arguments of
    :class:`LaLoraCallback`. Other methods also use them, if they are in :data:`SHARED_SETTINGS`.

    Args:
        module: The class of the LightningModule.
        data: The class of the LightningDataModule.
        links: Arguments that are derived from other arguments.
        configs: YAML files with the defaults; later files override earlier ones.
    """

    def __init__(
        self,
        module: type[LightningModule],
        data: type[LightningDataModule],
        links: Sequence[Link],
        configs: Sequence[Path],
    ) -> None:
        self.links = links
        super().__init__(
            module,
            data,
            run=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"default_config_files": list(map(str, configs))},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for the method, the callbacks and resuming, and the linked arguments."""
        parser.add_argument(
            "--method",
            default="lalora",
            help=f"One of {', '.join(METHODS)}; with settings as name:setting=value,setting=value.",
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint of a run to resume.")
        parser.add_class_arguments(LaLoraCallback, "lalora")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        for source, target, when in self.links:
            parser.link_arguments(source, target, apply_on=when)
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        parser.set_defaults(
            {
                "trainer.precision": "bf16-mixed" if has_bf16 else "32-true",
                # So that a run can be resumed after Ctrl-C.
                "checkpoint.save_on_exception": True,
                "checkpoint.save_last": True,
            }
        )

    def adapt(self, method: Method, settings: Mapping[str, Any]) -> None:
        """Adapt the model with a method and add the method's callbacks to the Trainer.

        Args:
            method: The method.
            settings: Its settings, which override the options under ``--lalora``.

        Raises:
            ValueError: A setting is out of range, or the method cannot adapt the model.
        """
        options = self.config.lalora.as_dict()
        if method.name != "lalora":
            options = {name: options[name] for name in SHARED_SETTINGS if name in method.defaults}
        # These callbacks come first, because the setup of other callbacks may depend on the inserted layers.
        self.trainer.callbacks[:0] = method.adapt(self.model, **{**options, **settings})  # type: ignore[attr-defined]


def run(
    module: type[LightningModule],
    data: type[LightningDataModule],
    name: str,
    links: Sequence[Link] = (),
    variants: tuple[str, str] | None = None,
    shared: str | None = None,
) -> None:
    """Train, test the best checkpoint, print a table, and save the adapter and the report next to the logs.

    Args:
        module: The class of the LightningModule.
        data: The class of the LightningDataModule.
        name: Name of the recipe; its settings are in ``configs/<name>.yaml``.
        links: Arguments that are derived from other arguments.
        variants: An argument that selects an additional file of settings, and its default. The file is
            ``configs/<name>.<value of the argument>.yaml``.
        shared: Name of a YAML file in ``configs`` with settings that the recipe's own file overrides.
    """
    quiet()
    torch.set_float32_matmul_precision("high")
    names = [name] if shared is None else [shared, name]
    if variants is not None:
        # This argument determines the defaults of other options, so it is read first. The data module checks its value.
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument(f"--{variants[0]}", dest="variant", default=variants[1])
        names.append(f"{name}.{first.parse_known_args()[0].variant}")
    options = argument_options(module, data, links)
    try:
        cli = RecipeCLI(module, data, links, [CONFIGS / f"{name}.yaml" for name in names])
    except FileNotFoundError as error:
        _exit(error, options)
    try:
        method, settings = parse_method(cli.config.method)
    except ValueError as error:
        _exit(error)
    try:
        cli.adapt(method, settings)
    except ValueError as error:
        _exit(error, options)
    start = time.perf_counter()
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    except FileNotFoundError as error:
        _exit(error, options)
    except SystemExit:
        # After Ctrl-C, Lightning saves a checkpoint, shuts down and exits.
        checkpoint = cli.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
            print(f"\nInterrupted. To resume: --ckpt_path {checkpoint.last_model_path}", file=sys.stderr)
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
    print("\n" + text_table([names[-1], ""], rows))
    print(f"\nLogs, settings, report.json and weights: {folder}")
    if "ranks" in report:
        print(f"To write a page with figures of the ranks: python -m lalora_lightning.report {folder}")


def summarize_run(trainer: pl.Trainer, model: pl.LightningModule, scores: Any, seconds: float) -> dict[str, Any]:
    """Return the scores, parameter counts, ranks and duration of a run."""
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


def argument_options(
    module: type[LightningModule], data: type[LightningDataModule], links: Sequence[Link]
) -> dict[str, list[str]]:
    """Return the recipe's options for each argument of the package's classes, by the name of the argument.

    A linked argument has the option of its source, or no option if the source is not an option.
    """
    classes = {"model": module, "data": data, "lalora": LaLoraCallback}
    arguments = [f"{group}.{name}" for group, cls in classes.items() for name in inspect.signature(cls).parameters]
    sources = {target: source for source, target, _ in links}
    options: dict[str, list[str]] = {}
    for argument in arguments:
        source = sources.get(argument, argument)
        if source in arguments:
            options.setdefault(argument.partition(".")[2], []).append(f"--{source}")
    return options


def options_in(message: str, options: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the options for the arguments that an error message names in backquotes, in the order of the message.

    >>> options_in("Cannot load the data set; set `path` to a local folder.", {"path": ["--data.path"]})
    ['--data.path']
    """
    names = re.findall(r"`(\w+)`", message)
    return list(dict.fromkeys(option for name in names for option in options.get(name, ())))


def _exit(error: Exception, options: Mapping[str, Sequence[str]] | None = None) -> NoReturn:
    """Exit with an error message and the options for the arguments that it names."""
    named = options_in(str(error), options or {})
    sys.exit(f"error: {error}" + (f"\nOptions of this recipe: {', '.join(named)}" if named else ""))
