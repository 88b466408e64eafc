"""Runs from the folders of CSVLogger and TensorBoardLogger."""

import csv
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalora_lightning.log_keys import (
    FIT_PREFIX,
    RANK_BUDGET,
    RANK_PARAMETERS,
    RANK_PREFIX,
    RANK_TOTAL,
    SETTINGS_PREFIX,
    SPARSITY_PREFIX,
    rank_key,
    sparsity_key,
)
from lalora_lightning.runs.run import Run
from lalora_lightning.runs.settings import read_settings, read_summary

__all__ = ["read_logs", "run_folders"]

_METRICS, _EVENTS = "metrics.csv", "events.out.tfevents.*"

_Metrics = Mapping[str, Mapping[int, float]]
"""Logged values: ``{key: {optimizer step: value}}``."""


def run_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Return all folders with the logs of a run, among a folder and its subfolders.

    These are the folders with CSV logs. If there are none, they are the folders with TensorBoard logs.
    """
    folder = Path(folder)
    return sorted({file.parent for file in folder.rglob(_METRICS)}) or sorted(
        {file.parent for file in folder.rglob(_EVENTS)}
    )


def read_logs(path: Path) -> Run:
    """Read the only run in a folder.

    Raises:
        FileNotFoundError: There are no logs in the folder.
        ValueError: The logs are of several runs, or of a run without La-LoRA, or a file is damaged.
    """
    folders = run_folders(path)
    if not folders:
        raise FileNotFoundError(
            f"Expected {path} to hold {_METRICS} (CSVLogger) or {_EVENTS} (TensorBoardLogger) but found neither; give "
            "the folder of a logger or a checkpoint (.ckpt)."
        )
    if len(folders) > 1:
        raise ValueError(
            f"Expected the logs of one run in {path} but found {len(folders)}; give one of "
            f"{', '.join(map(str, folders[:5]))}{', ...' if len(folders) > 5 else ''}."
        )
    (logs,) = folders
    settings: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    # From the given folder down to the folder of the logs, whose settings take precedence.
    for folder in (*reversed(logs.parents), logs):
        if folder == path or path in folder.parents:
            settings |= read_settings(folder)
            summary |= read_summary(folder)
    metrics = _read_csv(logs / _METRICS) if (logs / _METRICS).exists() else _read_events(logs)
    return _run(metrics, settings, summary, logs)


def _run(metrics: _Metrics, settings: dict[str, Any], summary: dict[str, Any], source: Path) -> Run:
    """Sort logged values into ranks, budget, sparsity, costs and scores."""
    names = [key.removeprefix(RANK_PREFIX) for key in metrics if key.startswith(RANK_PREFIX)]
    names = [name for name in names if rank_key(name) not in (RANK_TOTAL, RANK_PARAMETERS, RANK_BUDGET)]
    if not names or RANK_BUDGET not in metrics:
        raise ValueError(
            f"Expected {source} to hold {rank_key('<layer>')} and {RANK_BUDGET}, which LaLoraCallback logs, but got "
            f"{', '.join(sorted(metrics)) or 'nothing'}."
        )
    budgets = metrics[RANK_BUDGET]
    steps = [step for step in sorted(budgets) if all(step in metrics[rank_key(name)] for name in names)]
    if not steps:
        raise ValueError(f"Expected {source} to hold a step with the ranks of all layers but it has none.")
    ranks = [[int(metrics[rank_key(name)][step]) for name in names] for step in steps]
    by_layer = [metrics.get(sparsity_key(name), {}) for name in names]
    sparsity = {step: [layer[step] for layer in by_layer] for step in steps if all(step in layer for layer in by_layer)}
    costs = {key.removeprefix(FIT_PREFIX): values for key, values in metrics.items() if key.startswith(FIT_PREFIX)}
    parameters = metrics.get(RANK_PARAMETERS, {})
    full_parameters = int(settings.get(f"{SETTINGS_PREFIX}.parameters_at_full_rank") or 0)
    known = full_parameters > 0 and all(step in parameters for step in steps)
    return Run(
        layer_names=names,
        max_rank=int(settings.get(f"{SETTINGS_PREFIX}.rank") or max(map(max, ranks))),
        steps=steps,
        ranks=ranks,
        budgets=[budgets[step] for step in steps],
        sparsity=sparsity,
        settings=settings,
        scores={
            key: sorted(values.items())
            for key, values in metrics.items()
            if not key.startswith((RANK_PREFIX, SPARSITY_PREFIX, FIT_PREFIX)) and key != "epoch" and values
        },
        parameters=[int(parameters[step]) for step in steps] if known else (),
        full_parameters=full_parameters if known else 0,
        summary={key: values[max(values)] for key, values in costs.items()} | summary,
    )


def _read_csv(path: Path) -> _Metrics:
    metrics: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"Expected {path} to have a column named step but got {reader.fieldnames}.")
        for line, row in enumerate(reader, start=2):
            try:
                # Lightning logs the first optimizer step as step 0.
                step = int(row.pop("step")) + 1
                for key, value in row.items():
                    if value not in (None, ""):
                        metrics.setdefault(key, {})[step] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Expected numbers in line {line} of {path} but it is damaged: {error}.") from error
    # CSVLogger sorts its columns as text, which puts layer 10 before layer 2.
    return {key: metrics[key] for key in sorted(metrics, key=_natural_order)}


def _natural_order(name: str) -> list[str | int]:
    """Return a sort key that compares numbers in names as numbers.

    >>> sorted(["layer.10", "layer.2"], key=_natural_order)
    ['layer.2', 'layer.10']
    """
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _read_events(folder: Path) -> _Metrics:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ImportError(
            f"Expected tensorboard to read {folder} but it is missing; pip install tensorboard."
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    try:
        events.Reload()
    except Exception as error:
        raise ValueError(
            f"Expected {folder} to hold TensorBoard's events but they cannot be read ({error})."
        ) from error
    return {
        tag: {event.step + 1: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag != "hp_metric"
    }
