"""One run of a comparison: training and testing a method on a task, and measuring time and memory."""

import gc
import importlib.metadata
import platform
import time

import lightning.pytorch as pl
import torch

import lalora_lightning
from lalora_lightning.adapters import find_head
from lalora_lightning.memory import peak_memory_mib, reset_peak_memory, resident_mib
from recipes.benchmarks.common import machine
from recipes.comparison.ranks import layer_ranks, projection_ranks, trimmed_parameters
from recipes.comparison.records import Record, run_title
from recipes.comparison.tasks import ComparisonTask
from recipes.digits import NamedProgressBar
from recipes.methods import METHODS
from recipes.methods.eva import EvaCallback
from recipes.methods.projections import find_projections

__all__ = ["VERSIONS", "Costs", "train"]

VERSIONS = {
    "python": platform.python_version(),
    "lalora-lightning": lalora_lightning.__version__,
    **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "transformers", "timm", "peft")},
}


class Costs(pl.Callback):
    """Time and peak memory of training, from the first batch to the last.

    Attributes:
        seconds: Duration.
        memory_mib: Peak memory: on a GPU, the memory allocated in training; on a CPU, the most that the process held
            after a batch, including what it held before, or None if it is not known.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.memory_mib: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the measurement."""
        reset_peak_memory(pl_module.device)
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Sample the memory of the process, whose own peak would include earlier runs."""
        resident = resident_mib() if pl_module.device.type != "cuda" else None
        if resident is not None:
            self.memory_mib = max(self.memory_mib or 0.0, resident)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the measurement."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            self.memory_mib = peak_memory_mib(pl_module.device)
        self.seconds = time.perf_counter() - self._started


def train(task: ComparisonTask, plan: Record, progress_bar: bool = False) -> Record:
    """Train a method once and score it, on the rows for selection if the run is one that chooses a learning rate.

    Args:
        task: The task.
        plan: The method, its settings, the seed, the learning rate and the precision.
        progress_bar: Whether to show a progress bar.

    Returns:
        The measured part of the record.

    Raises:
        NotApplicableError: The method cannot adapt the task's model.
        ValueError: A setting is out of range, or there are no batches.
    """
    pl.seed_everything(plan["seed"], verbose=False)
    module = task.new_module(plan["learning_rate"])
    head = find_head(module, find_projections(module).names)
    head_parameters = [p for name, p in module.named_parameters() if name in head]
    callbacks = METHODS[plan["method"]].adapt(module, **plan["settings"])
    costs = Costs()
    bar = [NamedProgressBar(run_title(plan))] if progress_bar else []
    trainer = pl.Trainer(
        max_steps=task.steps,
        max_epochs=task.epochs,
        accelerator="auto",
        devices=1,
        precision=plan["precision"],
        callbacks=[*callbacks, costs, *bar],
        logger=False,
        enable_progress_bar=progress_bar,
        # Nothing depends on validation, which can take longer than training on a CPU.
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    fit_data, test_data = task.loaders(plan["seed"], "test" if plan["searched"] is None else "selection")
    gc.collect()
    trainer.fit(module, **fit_data)
    if trainer.global_step == 0:
        raise ValueError("Expected at least one batch of training rows but there is none; lower --batch_size.")
    (scores,) = trainer.test(module, **test_data, verbose=False)
    # EVA adapts no projection that gets rank 0.
    targets = [name for callback in callbacks if isinstance(callback, EvaCallback) for name in callback.targets]
    by_projection = {**dict.fromkeys(targets, 0), **projection_ranks(module)}
    ranks = layer_ranks(by_projection)
    final = trimmed_parameters(module)
    # peft trains a copy of the head beside virtual tokens.
    copies = [p for name, p in module.named_parameters() if ".modules_to_save." in name]
    head_size = sum(p.numel() for p in [*head_parameters, *copies] if p.requires_grad)
    return {
        "metric": task.metric,
        "score": scores[task.metric],
        "scores": dict(scores),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "final_parameters": final,
        "deployed_parameters": final - head_size,
        "ranks": ranks,
        "projection_ranks": by_projection,
        "total_rank": sum(ranks.values()) if ranks else None,
        "seconds": costs.seconds,
        "memory_mib": costs.memory_mib,
        "steps": trainer.global_step,
        "backbone": task.backbone,
        "device": machine(trainer.strategy.root_device),
        "versions": VERSIONS,
    }
