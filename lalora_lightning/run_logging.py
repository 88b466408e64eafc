"""What of a run goes to its loggers beside the ranks: settings, time, memory, an order for TensorBoard's dashboards."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import TensorBoardLogger

from lalora_lightning.adapters import lora_layers, summarize


def log_settings(trainer: pl.Trainer, module: pl.LightningModule, settings: Mapping[str, Any]) -> None:
    """Give the callback's settings and the counts of parameters to all loggers, as hyperparameters ``lalora/...``."""
    own = {key: getattr(value, "__qualname__", value) for key, value in settings.items() if key != "alpha"}
    layers = lora_layers(module)
    if layers:
        # A module may have adapted itself, with other settings than the callback's.
        layer = next(iter(layers.values()))
        counts = summarize(module, settings["group_by"])
        own |= {
            "rank": layer.max_rank,
            "scaling": layer.scaling,
            "adapter_parameters": counts.adapter_parameters,
            "head_parameters": counts.head_parameters,
            "total_parameters": counts.total_parameters,
        }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard keeps what a run says first of its hyperparameters. Lightning would say, before training, that
            # the only result is a placeholder; `log_results` says it after.
            logger._default_hp_metric = False
        logger.log_hyperparams({"lalora": own})


def log_layout(trainer: pl.Trainer) -> None:
    """Lay out TensorBoard's custom scalars: one chart with the ranks of all layers, one of the budget, one of sparsity.

    The charts group tags that are there anyhow; no key changes.
    """
    charts = {
        "rank of each layer": ["Multiline", ["rank/(?!total$|budget$)"]],
        "total rank and budget": ["Multiline", ["rank/(total|budget)$"]],
        "sparsity of each layer": ["Multiline", ["sparsity/"]],
    }
    for logger in _tensorboards(trainer):
        logger.experiment.add_custom_scalars({"La-LoRA": charts})


def log_results(trainer: pl.Trainer) -> None:
    """Give TensorBoard's table of hyperparameters those of the run, and say which scalars are its results.

    These are what the module logged, the total rank and the budget.
    """
    loggers = _tensorboards(trainer)
    if not loggers:
        return
    from torch.utils.tensorboard.summary import hparams

    metrics = [*(key for key in trainer.logged_metrics if key != "epoch"), "rank/total", "rank/budget"]
    for logger in loggers:
        settings = _sanitize_params(_flatten_dict(dict(logger.hparams)))
        for summary in hparams(settings, dict.fromkeys(metrics)):
            logger.experiment._get_file_writer().add_summary(summary)


def costs(module: pl.LightningModule, seconds: float) -> dict[str, float]:
    """``fit/seconds`` and ``fit/peak_memory_mib``: allocated on the GPU, on a CPU resident of the whole process."""
    metrics = {"fit/seconds": seconds}
    if module.device.type == "cuda":
        metrics["fit/peak_memory_mib"] = torch.cuda.max_memory_allocated(module.device) / 2**20
    elif sys.platform == "linux":
        import resource

        metrics["fit/peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return metrics


def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """The TensorBoard loggers, on the process that writes; none where Lightning writes by tensorboardX."""
    if not trainer.is_global_zero or find_spec("tensorboard") is None:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
