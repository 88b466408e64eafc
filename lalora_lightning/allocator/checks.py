"""Checks of the model and of a saved state for a rank allocator."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.names import state_name

__all__ = ["require_allocatable_layers", "require_matching_allocator_state"]


def require_allocatable_layers(layers: Mapping[str, TruncatedLoRALinear], average_rank: float | None) -> int:
    """Check that ranks can be allocated among these layers, and return their maximum rank.

    Args:
        layers: LoRA layers by name.
        average_rank: The setting, which is at most the maximum rank.

    Raises:
        ValueError: The layers have different maximum ranks, flattened parameters or several devices, or
            ``average_rank`` is out of range.
    """
    max_ranks = {layer.max_rank for layer in layers.values()}
    if len(max_ranks) > 1:
        raise ValueError(
            f"Expected all layers to have one maximum rank but got {sorted(max_ranks)}; a model that was trimmed, or "
            "adapted with a rank_pattern, has to be trained without an allocator (fixed_ranks=True in the callback)."
        )
    max_rank = max_ranks.pop()
    for name, layer in layers.items():
        if layer.lora_A.ndim != 2 or layer.lora_B.ndim != 2:
            raise ValueError(
                "Expected adapters to be whole on every process, or sharded by fully_shard (FSDP2, "
                f"ModelParallelStrategy), but {name}.lora_A has the shape {tuple(layer.lora_A.shape)}; FSDP1 and "
                "DeepSpeed stage 3 flatten parameters and are not supported."
            )
    devices = sorted({str(layer.lora_A.device) for layer in layers.values()})
    if len(devices) > 1:
        raise ValueError(
            f"Expected all adapters to be on one device but they are on {', '.join(devices)}; load the model "
            "without device_map, onto one device."
        )
    if average_rank is not None and not 1 <= average_rank <= max_rank:
        raise ValueError(f"Expected average_rank to be in [1, {max_rank}] but got {average_rank}.")
    return max_rank


def require_matching_allocator_state(state: Any, own: Mapping[str, Any], contribution: str) -> None:
    """Check that a state fits an allocator.

    Args:
        state: The state to be loaded.
        own: The allocator's own state.
        contribution: The allocator's setting.

    Raises:
        ValueError: The state does not fit; the message lists everything that differs.
    """
    problems = _structural_problems(state, own, contribution)
    if not problems:
        problems = [line for key in _TENSORS for line in _tensor_problems(key, state[key], own[key])]
        if type(state["steps"]) is not int or state["steps"] < 0:
            problems.append(f"expected steps to be a number of steps but got {state['steps']!r}")
    if not problems:
        problems = _value_problems(state, own)
    if problems:
        raise ValueError(f"Cannot load the state of the rank allocator: {'; '.join(problems)}.")


_TENSORS = ("ranks", "budget", "value", "skipped", "fisher")


def _structural_problems(state: Any, own: Mapping[str, Any], contribution: str) -> list[str]:
    """Return the problems with keys, layers, maximum rank and kind of contribution."""
    if not isinstance(state, Mapping):
        return [f"expected a dict but got {type(state).__name__}"]
    # States of version 0.1.0 do not have it.
    missing = sorted(own.keys() - state.keys() - {"condensed"})
    if missing:
        return [f"expected the keys {', '.join(own)} but {', '.join(missing)} are missing"]
    problems = []
    own_names, names = own["layer_names"], state["layer_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"expected layer_names to be a list of names but got {names!r}")
    elif own_names != (names := [state_name(name) for name in names]):
        absent = [name for name in own_names if name not in names]
        unknown = [name for name in names if name not in own_names]
        if absent:
            problems.append(f"the state lacks the layers {', '.join(absent)}")
        if unknown:
            problems.append(f"the state has unknown layers {', '.join(unknown)}")
        if not absent and not unknown:
            problems.append("the state has the layers in another order")
    # The type is checked first, because comparing with a tensor returns a tensor instead of a bool.
    if type(state["max_rank"]) is not int or state["max_rank"] != own["max_rank"]:
        problems.append(f"expected max_rank {own['max_rank']} but got {state['max_rank']!r}")
    if (state["fisher"] is None) != (own["fisher"] is None):
        problems.append(f'expected a state with contribution="{contribution}" but got one with another contribution')
    return problems


def _tensor_problems(key: str, given: Any, own: Tensor | None) -> list[str]:
    """Return the problems with the type and the shape of a tensor."""
    if own is None:
        return []
    if not isinstance(given, Tensor) or given.is_complex() or given.is_floating_point() != own.is_floating_point():
        kind = "floating-point" if own.is_floating_point() else "integer"
        return [f"expected {key} to be a {kind} tensor but got {getattr(given, 'dtype', type(given).__name__)}"]
    if given.shape != own.shape:
        return [f"expected {key} of shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    return []


def _value_problems(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the values of ranks, budget and averages that are out of range."""
    problems = []
    layers, max_rank = len(own["layer_names"]), own["max_rank"]
    if not (state["ranks"].min() >= 0 and state["ranks"].max() <= max_rank):
        problems.append(f"expected ranks in [0, {max_rank}] but got {state['ranks'].tolist()}")
    # A budget above this allocator's maximum comes from a run with another average_rank; the next step corrects it.
    # Condensed layers may have less than one rank each.
    least = 0 if state.get("condensed") else layers
    if not least <= state["budget"] <= layers * max_rank:
        problems.append(f"expected the budget to be in [{least}, {layers * max_rank}] but got {float(state['budget'])}")
    problems += [
        f"expected {key} to be finite and not negative but it is not"
        for key in ("value", "fisher")
        if own[key] is not None and not (state[key].min() >= 0 and state[key].max() < math.inf)
    ]
    return problems
