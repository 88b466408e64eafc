"""Runs from the checkpoints of a Trainer with a LaLoraCallback."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lalora_lightning.files import load_file
from lalora_lightning.names import GroupBy, group_names
from lalora_lightning.runs.adapter_size import component_size, trimmed_bytes
from lalora_lightning.runs.run import Run, parameter_totals
from lalora_lightning.runs.settings import flat

__all__ = ["read_checkpoint"]


def read_checkpoint(path: Path) -> Run:
    """Read a run from the history of a LaLoraCallback, and from the weights and hyperparameters in the checkpoint.

    Raises:
        ValueError: The file is damaged or not a checkpoint, or has no history of ranks.
    """
    checkpoint = load_file(path, "a checkpoint of a Trainer")
    callbacks = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    needed = {"allocator", "history", "last_step"}
    states = [state for state in callbacks.values() if isinstance(state, Mapping) and needed <= state.keys()]
    if not states:
        raise ValueError(
            f"Expected {path} to hold the state of a LaLoraCallback but it has none; pass a checkpoint of a Trainer "
            "with a LaLoraCallback."
        )
    (state, *_) = states
    if state["allocator"] is None:
        raise ValueError(f"Expected {path} to be of a run with adaptive ranks but its ranks were fixed.")
    allocator, last_step = state["allocator"], state["last_step"]
    history = [*state["history"]]
    if not history:
        raise ValueError(f"Expected {path} to be of a run that has begun but it was saved before the first step.")
    if last_step is not None and history[-1][0] < last_step:
        # The current ranks, which were not logged.
        history.append([last_step, allocator["ranks"].tolist(), float(allocator["budget"])])
    steps, ranks, budgets = zip(*history, strict=True)
    costs = _costs(checkpoint.get("state_dict", {}), allocator["layer_names"])
    return Run(
        layer_names=allocator["layer_names"],
        max_rank=allocator["max_rank"],
        steps=steps,
        ranks=ranks,
        budgets=budgets,
        settings=flat({**checkpoint.get("hyper_parameters", {}), **checkpoint.get("datamodule_hyper_parameters", {})}),
        **parameter_totals(ranks, costs, allocator["max_rank"]),
        summary={
            "epoch": checkpoint.get("epoch"),
            "optimizer steps": checkpoint.get("global_step"),
            **_adapter_sizes(checkpoint.get("state_dict", {})),
            **_best_scores(callbacks.values()),
        },
    )


def _adapter_sizes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapter parameters of a state dict and the size of the adapters trimmed to their current ranks."""
    # Logs are read without torch.
    from lalora_lightning.layers import replace_ranks

    parameters = trimmed = 0
    weights = replace_ranks(weights)
    for key in weights:
        name, _, last = key.rpartition(".")
        if last == "lora_A":
            A, B, mask = (weights[f"{name}.{part}".lstrip(".")] for part in ("lora_A", "lora_B", "rank_mask"))
            parameters += A.numel() + B.numel()
            trimmed += trimmed_bytes(A, B, int(mask.count_nonzero()))
    return {"adapter parameters": parameters, "trimmed adapter, KiB": trimmed / 1024} if parameters else {}


def _costs(weights: Mapping[str, Any], layer_names: Sequence[str]) -> list[int]:
    """Return the parameters of one rank of each layer; nothing if the layers are not groups of projections by name."""
    sizes = {
        key.removesuffix(".lora_A"): component_size(weights[key], weights[f"{key[:-1]}B"])
        for key in weights
        if key.endswith(".lora_A")
    }
    for group_by in get_args(get_args(GroupBy)[0]):
        groups = group_names(sizes, group_by)
        if list(groups) == list(layer_names):
            return [sum(sizes[name] for name in names) for names in groups.values()]
    return []


def _best_scores(states: Iterable[Any]) -> dict[str, float]:
    """Return the best score of each callback that monitors one, such as ModelCheckpoint."""
    return {
        f"best {state['monitor']}": float(state["best_model_score"])
        for state in states
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None
    }
