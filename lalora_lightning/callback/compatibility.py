"""Code that depends on Lightning's internals, and checks for unsupported strategies and callbacks.

A new release of Lightning may break this file and ``pruning.py``, which changes what ``ModelPruning`` does, but no
other one.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
from lightning.pytorch.callbacks import ModelSummary, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

__all__ = [
    "attached_trainer",
    "callbacks_of",
    "completed_steps",
    "has_load_hook",
    "has_model_summary",
    "is_logging_step",
    "is_sharded",
    "leave_out_placeholder_metric",
    "may_build_later",
    "require_averaging_after",
    "require_compatible_averages",
    "require_one_file_checkpoints",
    "require_training_in_this_process",
    "tensorboard_loggers",
    "write_hyperparameters",
]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the Trainer's callbacks."""
    return trainer.callbacks  # type: ignore[attr-defined]


def attached_trainer(pl_module: pl.LightningModule) -> pl.Trainer | None:
    """Return the module's Trainer, or None if ``pl_module.trainer`` would raise an error."""
    return pl_module._trainer


def completed_steps(trainer: pl.Trainer) -> int:
    """Return Lightning's step number for logging: the number of batches in which an optimizer stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def may_build_later(pl_module: pl.LightningModule) -> bool:
    """Return whether a module has hooks that run after the callbacks' ``setup`` and may build its model."""
    return is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Return whether Lightning logs after the current batch."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (completed_steps(trainer) + 1) % every == 0


def has_model_summary(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer prints a summary of the model."""
    return any(isinstance(callback, ModelSummary) for callback in callbacks_of(trainer))


def has_load_hook(module: nn.Module, hook: Any) -> bool:
    """Return whether a post-hook of loading a state dict is already registered."""
    return hook in module._load_state_dict_post_hooks.values()


def require_training_in_this_process(trainer: pl.Trainer) -> None:
    """Check that the strategy trains the module itself and not copies of it in other processes.

    Raises:
        ValueError: The strategy trains copies (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``).
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "Expected a module that is already adapted, because this strategy trains copies of it in other processes "
            "and only returns their weights; call add_lora(module) before fit."
        )


def require_averaging_after(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Check that callbacks that copy the model come after the callback that adapts it.

    Raises:
        ValueError: A callback that averages weights comes before it.
    """
    callbacks = callbacks_of(trainer)
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"Expected {type(other).__name__}, which copies the model, to come after LaLoraCallback, which "
                "adapts it, but it comes before; change their order in callbacks."
            )


def require_compatible_averages(callbacks: Sequence[pl.Callback], save_adapter_only: bool, condenses: bool) -> None:
    """Check that callbacks that average weights can do so.

    Raises:
        ValueError: A callback would have to resume from an adapter-only checkpoint, or to average factors before and
            after they are condensed.
    """
    for callback in callbacks:
        if condenses and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"Expected condense_to=None with {type(callback).__name__}, because factors before and after it "
                "have no meaningful average; call condense_lora(module, ...) after training instead."
            )
        if save_adapter_only and isinstance(callback, WeightAveraging):
            raise ValueError(
                f"Expected save_adapter_only=False with {type(callback).__name__}, which can only resume from full "
                "checkpoints, but got True."
            )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Return whether the strategy shards parameters (FSDP2)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def require_one_file_checkpoints(trainer: pl.Trainer) -> None:
    """Check that a strategy that shards parameters writes one file for each checkpoint.

    Raises:
        ValueError: The strategy writes distributed checkpoints, which can only be loaded as a whole.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
        raise ValueError(
            "Expected checkpoints in one file with save_adapter_only=True, because distributed checkpoints can only be "
            "loaded as a whole; use ModelParallelStrategy(save_distributed_checkpoint=False)."
        )


def tensorboard_loggers(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers, on the process that writes."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def leave_out_placeholder_metric(logger: Any) -> None:
    """Keep a TensorBoard logger from logging ``hp_metric`` with the hyperparameters.

    TensorBoard only uses the first summary of hyperparameters in a run. Lightning would write one before training, with
    a placeholder as the only metric. :func:`write_hyperparameters` writes it after training, with the actual metrics.
    """
    if isinstance(logger, TensorBoardLogger):
        logger._default_hp_metric = False


def write_hyperparameters(logger: TensorBoardLogger, metrics: Sequence[str]) -> None:
    """Write the run's hyperparameters and the names of its metrics.

    Does nothing if Lightning writes with tensorboardX, because tensorboard is not installed.
    """
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard.summary import hparams

    settings = _sanitize_params(_flatten_dict(dict(logger.hparams)))
    for summary in hparams(settings, dict.fromkeys(metrics)):
        logger.experiment._get_file_writer().add_summary(summary)
