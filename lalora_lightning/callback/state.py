"""The state of a LaLoraCallback in a checkpoint: checks, and torch's random state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["random_state", "require_callback_state", "set_random_state"]


def random_state() -> dict[str, Tensor]:
    """Return torch's random state, which Lightning does not save.

    Dropout and the order of rows after resuming depend on it.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore a state that :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def require_callback_state(state: Any) -> None:
    """Check a callback's state, except for the allocator's part.

    Raises:
        ValueError: Something is missing or has the wrong form.
    """
    keys = {"allocator", "last_step", "history", "random"}
    missing = sorted(keys - state.keys()) if isinstance(state, Mapping) else sorted(keys)
    if missing:
        raise ValueError(f"Expected the state of a LaLoraCallback but it lacks {', '.join(missing)}.")
    random, last_step = state["random"], state["last_step"]
    if (
        not isinstance(random, Mapping)
        or not all(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in random.values())
        or "cpu" not in random
        or random["cpu"].shape != torch.get_rng_state().shape
    ):
        raise ValueError(f"Expected random to contain torch's random state but got {random!r}.")
    if last_step is not None and type(last_step) is not int:
        raise ValueError(f"Expected last_step to be a step or None but got {last_step!r}.")
    if type(state.get("earlier_steps", 0)) is not int:
        raise ValueError(f"Expected earlier_steps to be a number of steps but got {state['earlier_steps']!r}.")
    if not isinstance(state["history"], list) or not all(map(_is_reading, state["history"])):
        raise ValueError("Expected history to be a list of step, ranks and budget but it is not.")
    unlogged = state.get("unlogged", [])
    if not isinstance(unlogged, list) or not all(map(_is_pair_of_steps, unlogged)):
        raise ValueError("Expected unlogged to be a list of pairs of steps but it is not.")


def _is_pair_of_steps(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(type(step) is int for step in entry)


def _is_reading(entry: Any) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        return False
    step, ranks, budget = entry
    return (
        isinstance(step, int)
        and isinstance(ranks, list | tuple)
        and all(isinstance(rank, int) for rank in ranks)
        and isinstance(budget, int | float)
    )
