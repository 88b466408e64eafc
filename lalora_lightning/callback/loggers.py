"""Logging of settings, time and memory, and the layout of TensorBoard's dashboards."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lalora_lightning import log_keys
from lalora_lightning.adapters import lora_layers, summarize
from lalora_lightning.callback.compatibility import (
    leave_out_placeholder_metric,
    tensorboard_loggers,
    write_hyperparameters,
)
from lalora_lightning.memory import peak_memory_mib
from lalora_lightning.names import GroupBy

__all__ = ["costs", "describe_adapters", "log_layout", "log_metrics", "log_results", "log_settings", "prepare_loggers"]


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    """Log metrics to all loggers."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def prepare_loggers(trainer: pl.Trainer) -> None:
    """Prepare the loggers, before Lightning logs the module's hyperparameters."""
    for logger in trainer.loggers:
        leave_out_placeholder_metric(logger)


def log_settings(trainer: pl.Trainer, pl_module: pl.LightningModule, settings: Mapping[str, Any]) -> None:
    """Log settings and parameter counts to all loggers as hyperparameters ``lalora/...``; functions by their name.

    What the adapters themselves show overrides the settings.
    """
    settings = {**settings, **describe_adapters(pl_module, settings["group_by"])}
    # These follow from `scaling` and `fixed_ranks`.
    settings = {key: value for key, value in settings.items() if key not in ("alpha", "rank_pattern")}
    named = {key: getattr(value, "__qualname__", value) for key, value in settings.items()}
    for logger in trainer.loggers:
        logger.log_hyperparams({log_keys.SETTINGS_PREFIX: named})


def describe_adapters(pl_module: pl.LightningModule, group_by: GroupBy) -> dict[str, Any]:
    """Return the settings and parameter counts that an adapted module itself shows."""
    layer = next(iter(lora_layers(pl_module).values()))
    counts = summarize(pl_module, group_by)
    return {
        "rank": layer.max_rank,
        "scaling": layer.scaling,
        "dropout": layer.dropout,
        "freeze_A": not layer.lora_A.requires_grad,
        "adapter_parameters": counts.adapter_parameters,
        "head_parameters": counts.head_parameters,
        "total_parameters": counts.total_parameters,
    }


def log_layout(trainer: pl.Trainer) -> None:
    """Add charts of all ranks, of the budget and of the sparsities to TensorBoard's custom scalars.

    The charts combine scalars that are also logged one by one.
    """
    total, budget = (key.removeprefix(log_keys.RANK_PREFIX) for key in (log_keys.RANK_TOTAL, log_keys.RANK_BUDGET))
    charts = {
        "rank of each layer": ["Multiline", [f"{log_keys.RANK_PREFIX}(?!{total}$|{budget}$)"]],
        "total rank and budget": ["Multiline", [f"{log_keys.RANK_PREFIX}({total}|{budget})$"]],
        "sparsity of each layer": ["Multiline", [log_keys.SPARSITY_PREFIX]],
    }
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_custom_scalars({"La-LoRA": charts})


def log_results(trainer: pl.Trainer) -> None:
    """Write the run into TensorBoard's table of hyperparameters.

    The metrics in the table are those that the module logged, the total rank and the budget.
    """
    metrics = [*(key for key in trainer.logged_metrics if key != "epoch"), log_keys.RANK_TOTAL, log_keys.RANK_BUDGET]
    for logger in tensorboard_loggers(trainer):
        write_hyperparameters(logger, metrics)


def costs(pl_module: pl.LightningModule, seconds: float) -> dict[str, float]:
    """Return the duration of training and, if it can be measured, the peak memory, by their log keys."""
    peak = peak_memory_mib(pl_module.device)
    return {log_keys.SECONDS: seconds} | ({} if peak is None else {log_keys.PEAK_MEMORY: peak})
