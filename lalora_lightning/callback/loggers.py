"""Logging of settings, ranks, time and memory, and the layout of TensorBoard's dashboards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lalora_lightning import log_keys
from lalora_lightning.adapters import lora_layers, summarize
from lalora_lightning.callback.compatibility import (
    leave_out_placeholder_metric,
    tensorboard_loggers,
    write_hyperparameters,
)
from lalora_lightning.files import first_line
from lalora_lightning.memory import peak_memory_mib
from lalora_lightning.names import GroupBy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunLog", "costs", "describe_adapters"]


class RunLog:
    """Writes to the Trainer's loggers, and never ends a run: what a logger refuses is reported once a run.

    MLflow refuses a parameter that already has another value in its run, for example.
    """

    def __init__(self) -> None:
        # What has been reported in this run: kind of logger, and what it refused.
        self._reported: set[tuple[str, str]] = set()

    def prepare(self, trainer: pl.Trainer) -> None:
        """Begin a run, before Lightning logs the module's hyperparameters."""
        self._reported.clear()
        for logger in trainer.loggers:
            leave_out_placeholder_metric(logger)

    def settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: Mapping[str, Any]) -> None:
        """Log settings and parameter counts as hyperparameters ``lalora/...``; functions by their name.

        What the adapters themselves show overrides the settings.
        """
        settings = {**settings, **describe_adapters(pl_module, settings["group_by"])}
        # These follow from `scaling` and `fixed_ranks`.
        settings = {key: value for key, value in settings.items() if key not in ("alpha", "rank_pattern")}
        named = {key: getattr(value, "__qualname__", value) for key, value in settings.items()}
        for logger in trainer.loggers:
            with self._reporting(logger, f"all settings {log_keys.SETTINGS_PREFIX}/..."):
                logger.log_hyperparams({log_keys.SETTINGS_PREFIX: named})

    def metrics(self, trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        """Log metrics to all loggers."""
        for logger in trainer.loggers:
            with self._reporting(logger, "all ranks, times and memory"):
                logger.log_metrics(metrics, step=step)

    def layout(self, trainer: pl.Trainer) -> None:
        """Add charts of all ranks, of the budget and of the sparsities to TensorBoard's custom scalars.

        The charts combine scalars that are also logged one by one.
        """
        totals = [log_keys.RANK_TOTAL, log_keys.RANK_BUDGET, log_keys.RANK_PARAMETERS]
        total, budget, parameters = (key.removeprefix(log_keys.RANK_PREFIX) for key in totals)
        charts = {
            "rank of each layer": ["Multiline", [f"{log_keys.RANK_PREFIX}(?!{total}$|{budget}$|{parameters}$)"]],
            "total rank and budget": ["Multiline", [f"{log_keys.RANK_PREFIX}({total}|{budget})$"]],
            "sparsity of each layer": ["Multiline", [log_keys.SPARSITY_PREFIX]],
        }
        for logger in tensorboard_loggers(trainer):
            with self._reporting(logger, "the layout of the charts"):
                logger.experiment.add_custom_scalars({"La-LoRA": charts})

    def results(self, trainer: pl.Trainer, figures: "Mapping[str, Callable[[], Figure]]") -> None:
        """Write the run into TensorBoard's table of hyperparameters, and figures of the ranks.

        The metrics in the table are those that the module logged, the total rank and the budget.

        Args:
            trainer: The Trainer.
            figures: Functions that draw the figures, by key.
        """
        logged = [key for key in trainer.logged_metrics if key != "epoch"]
        for logger in tensorboard_loggers(trainer):
            with self._reporting(logger, "the table of hyperparameters"):
                write_hyperparameters(logger, [*logged, log_keys.RANK_TOTAL, log_keys.RANK_BUDGET])
            if find_spec("matplotlib") is not None:
                with self._reporting(logger, "the figures of the ranks"):
                    for key, draw in figures.items():
                        logger.experiment.add_figure(key, draw(), trainer.global_step)

    @contextmanager
    def _reporting(self, logger: Logger, what: str) -> Iterator[None]:
        """Turn an error of a logger into a warning, once a run."""
        try:
            yield
        except Exception as error:
            name = type(logger).__name__
            if (name, what) not in self._reported:
                self._reported.add((name, what))
                rank_zero_warn(f"La-LoRA: {name} did not log {what}; the run goes on. Its reason: {first_line(error)}")


def describe_adapters(pl_module: pl.LightningModule, group_by: GroupBy) -> dict[str, Any]:
    """Return the settings and parameter counts that an adapted module itself shows."""
    layers = lora_layers(pl_module).values()
    layer = next(iter(layers))
    counts = summarize(pl_module, group_by)
    return {
        "rank": layer.max_rank,
        "scaling": layer.scaling,
        "dropout": layer.dropout,
        "freeze_A": not layer.lora_A.requires_grad,
        "adapter_parameters": counts.adapter_parameters,
        # These include lora_A if it is frozen.
        "parameters_at_full_rank": sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers),
        "head_parameters": counts.head_parameters,
        "total_parameters": counts.total_parameters,
    }


def costs(pl_module: pl.LightningModule, seconds: float) -> dict[str, float]:
    """Return the duration of training and, if it can be measured, the peak memory, by their log keys."""
    peak = peak_memory_mib(pl_module.device)
    return {log_keys.SECONDS: seconds} | ({} if peak is None else {log_keys.PEAK_MEMORY: peak})
