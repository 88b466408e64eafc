"""Run: what is known of one training run, from a callback, a folder of logs or a checkpoint."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lalora_lightning.files import load_file
from lalora_lightning.rank_report import trimmed_bytes

METRICS, EVENTS, SETTINGS = "metrics.csv", "events.out.tfevents.*", ("hparams.yaml", "config.yaml")
_RANK, _SPARSITY, _COST = "rank/", "sparsity/", "fit/"

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """Ranks, budget and whatever else was logged of a run of T readings of L layers.

    Attributes:
        layer_names: L names.
        max_rank: The highest rank a layer may get; where the logs do not say, the highest seen.
        steps: T optimizer steps at which the ranks were read, rising.
        ranks: ``(T, L)``.
        budgets: T budgets.
        sparsity: ``(L,)`` sparsities (Eq. 1) in [0, 1] by step, where they were logged.
        settings: Hyperparameters, flat: ``{"lalora.gamma": 2.0, ...}``.
        scores: ``(step, value)`` readings of every other metric.
        summary: What else is known of the run as a whole: its parameters, time, memory, final scores.
    """

    layer_names: Sequence[str]
    max_rank: int
    steps: Sequence[int]
    ranks: Sequence[Sequence[int]]
    budgets: Sequence[float]
    sparsity: Mapping[int, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def read_run(source: Run | FilePath) -> Run:
    """A run from a folder with the logs of CSVLogger or TensorBoardLogger in it, or from a Trainer's checkpoint.

    Beside the logs, or in the folder given, ``hparams.yaml`` and ``config.yaml`` are read as settings, and
    ``report.json`` as the summary. A :class:`Run` is given back as it is.

    Raises:
        FileNotFoundError: There is no such file or folder, or no logs in it.
        ValueError: There are logs of several runs, none of La-LoRA, or a file is damaged.
    """
    if isinstance(source, Run):
        return source
    path = Path(source)
    if path.is_file():
        return _from_checkpoint(path)
    if not path.is_dir():
        raise FileNotFoundError(f"Expected {path} to be a folder of logs or a checkpoint but there is none.")
    folders = run_folders(path)
    if not folders:
        raise FileNotFoundError(
            f"Expected {path} to hold {METRICS} (CSVLogger) or {EVENTS} (TensorBoardLogger) but found neither; give "
            "the folder a logger wrote to, or a checkpoint (.ckpt)."
        )
    if len(folders) > 1:
        raise ValueError(
            f"Expected the logs of one run in {path} but found {len(folders)}; give one of "
            f"{', '.join(map(str, folders[:5]))}{', ...' if len(folders) > 5 else ''}."
        )
    return _from_logs(folders[0], {path, *_between(path, folders[0])})


def run_folders(folder: FilePath) -> list[Path]:
    """The folders in a folder, itself included, that hold the logs of a run; CSV logs where there are both kinds."""
    folder = Path(folder)
    return sorted({file.parent for file in folder.rglob(METRICS)}) or sorted(
        {file.parent for file in folder.rglob(EVENTS)}
    )


def final_scores(folder: FilePath, score: str) -> list[float]:
    """The last value of a score of every run in a folder that logged it, of whatever method.

    Args:
        folder: Logs of many runs, such as one a seed.
        score: Name of a metric, such as ``"test/accuracy"``.
    """
    return [value for value, _ in _final_scores(folder, score)]


def final_scores_by(folder: FilePath, score: str, setting: str) -> dict[Any, list[float]]:
    """The last value of a score of every run in a folder, by the value of a setting.

    Args:
        folder: Logs of many runs, such as one a gamma and seed.
        score: Name of a metric, such as ``"val/accuracy"``.
        setting: Name of a hyperparameter, such as ``"lalora.gamma"``; runs without it are left out.

    Returns:
        ``{value of the setting: [score, ...]}`` in rising order.
    """
    scores: dict[Any, list[float]] = {}
    for value, settings in _final_scores(folder, score):
        if setting in settings:
            scores.setdefault(settings[setting], []).append(value)
    return dict(sorted(scores.items()))


def _final_scores(folder: FilePath, score: str) -> Iterator[tuple[float, dict[str, Any]]]:
    for logs in run_folders(folder):
        readings = _read_logs(logs).get(score)
        if readings:
            yield readings[max(readings)], _read_settings(logs)


def _between(outer: Path, inner: Path) -> list[Path]:
    """The folders from the inner one up to the outer one."""
    return [inner, *(parent for parent in inner.parents if outer in parent.parents)]


def _from_logs(logs: Path, beside: Iterable[Path]) -> Run:
    settings: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for folder in sorted(beside, key=lambda folder: len(folder.parts)):
        settings |= _read_settings(folder)
        if (folder / "report.json").exists():
            summary |= _read_json(folder / "report.json")
    return _from_readings(_read_logs(logs), settings, summary, logs)


def _read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """``{key: {optimizer step: value}}``."""
    return _read_csv(folder / METRICS) if (folder / METRICS).exists() else _read_events(folder)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if (folder / name).exists():
            settings |= _flat(_read_yaml(folder / name))
    return settings


def _from_readings(
    readings: Mapping[str, Mapping[int, float]], settings: dict[str, Any], summary: dict[str, Any], source: Path
) -> Run:
    """Sort ``{key: {step: value}}`` into what a run holds."""
    names = [key.removeprefix(_RANK) for key in readings if key.startswith(_RANK)]
    names = [name for name in names if name not in ("total", "budget")]
    if not names or "rank/budget" not in readings:
        raise ValueError(
            f"Expected {source} to hold rank/<layer> and rank/budget, which LaLoraCallback logs, but got "
            f"{', '.join(sorted(readings)) or 'nothing'}."
        )
    budgets = readings["rank/budget"]
    steps = [step for step in sorted(budgets) if all(step in readings[_RANK + name] for name in names)]
    if not steps:
        raise ValueError(f"Expected {source} to hold a step with the ranks of all layers but it has none.")
    ranks = [[int(readings[_RANK + name][step]) for name in names] for step in steps]
    sparse = [readings.get(_SPARSITY + name, {}) for name in names]
    sparsity = {step: [layer[step] for layer in sparse] for step in steps if all(step in layer for layer in sparse)}
    costs = {key.removeprefix(_COST): values for key, values in readings.items() if key.startswith(_COST)}
    return Run(
        layer_names=names,
        max_rank=int(settings.get("lalora.rank") or max(map(max, ranks))),
        steps=steps,
        ranks=ranks,
        budgets=[budgets[step] for step in steps],
        sparsity=sparsity,
        settings=settings,
        scores={
            key: sorted(values.items())
            for key, values in readings.items()
            if not key.startswith((_RANK, _SPARSITY, _COST)) and key != "epoch" and values
        },
        summary={key: values[max(values)] for key, values in costs.items()} | summary,
    )


def _read_csv(path: Path) -> dict[str, dict[int, float]]:
    readings: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"Expected {path} to have a column named step but got {reader.fieldnames}.")
        for line, row in enumerate(reader, start=2):
            try:
                # Lightning counts the steps of what it logs from zero.
                step = int(row.pop("step")) + 1
                for key, value in row.items():
                    if value not in (None, ""):
                        readings.setdefault(key, {})[step] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Expected numbers in line {line} of {path} but it is damaged: {error}.") from error
    return readings


def _read_events(folder: Path) -> dict[str, dict[int, float]]:
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


class _PlainLoader(yaml.SafeLoader):
    """Reads Python objects, which Lightning writes among hyperparameters, as their names."""


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix.partition(":")[2])


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        # A SafeLoader: it builds no objects.
        content = yaml.load(path.read_text(), Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be YAML but it cannot be read ({_first_line(error)}).") from error
    return _mapping(content or {}, path)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON but it cannot be read ({_first_line(error)}).") from error
    return _mapping(content, path)


def _mapping(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected {path} to hold names and values but it holds a {type(content).__name__}.")
    return content


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """``{"lalora": {"gamma": 2}}`` as ``{"lalora.gamma": 2}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _from_checkpoint(path: Path) -> Run:
    checkpoint = load_file(path, "a checkpoint of a Trainer")
    callbacks = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    needed = {"allocator", "history", "last_step"}
    states = [state for state in callbacks.values() if isinstance(state, Mapping) and needed <= state.keys()]
    if not states:
        raise ValueError(
            f"Expected {path} to hold the state of a LaLoraCallback but it has none; give a checkpoint that a Trainer "
            "with LaLoraCallback wrote."
        )
    (state, *_) = states
    if state["allocator"] is None:
        raise ValueError(f"Expected {path} to be of a run with adaptive ranks but its ranks were fixed.")
    allocator, last_step = state["allocator"], state["last_step"]
    history = [*state["history"]]
    if not history:
        raise ValueError(f"Expected {path} to be of a run that has begun but it was saved before the first step.")
    if last_step is not None and history[-1][0] < last_step:
        # The ranks in force, which were not read for the logs.
        history.append([last_step, allocator["ranks"].tolist(), float(allocator["budget"])])
    steps, ranks, budgets = zip(*history, strict=True)
    weights = checkpoint.get("state_dict", {})
    scores = {}
    for other in callbacks.values():
        if isinstance(other, Mapping) and other.get("monitor") and other.get("best_model_score") is not None:
            scores[f"best {other['monitor']}"] = float(other["best_model_score"])
    return Run(
        layer_names=allocator["layer_names"],
        max_rank=allocator["max_rank"],
        steps=steps,
        ranks=ranks,
        budgets=budgets,
        settings=_flat({**checkpoint.get("hyper_parameters", {}), **checkpoint.get("datamodule_hyper_parameters", {})}),
        summary={
            "epoch": checkpoint.get("epoch"),
            "optimizer steps": checkpoint.get("global_step"),
            **_parameters(weights),
            **scores,
        },
    )


def _parameters(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Adapter parameters of a state dict, and the bytes of the adapters trimmed to the ranks in force."""
    parameters = trimmed = 0
    for key in weights:
        name, _, last = key.rpartition(".")
        if last == "lora_A":
            A, B, rank = (weights[f"{name}.{part}".lstrip(".")] for part in ("lora_A", "lora_B", "rank"))
            parameters += A.numel() + B.numel()
            trimmed += trimmed_bytes(A, B, int(rank))
    return {"adapter parameters": parameters, "trimmed adapter, KiB": trimmed / 1024} if parameters else {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
