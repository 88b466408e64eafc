"""The state of a LaLoraCallback in a checkpoint: what it has to hold, and torch's random state."""

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
    """Continue from a state that :func:`random_state` returned."""
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
    own = torch.get_rng_state()
    if not isinstance(random, Mapping) or (own.shape, own.dtype) != (
        getattr(random.get("cpu"), "shape", None),
        getattr(random.get("cpu"), "dtype", None),
    ):
        raise ValueError(f"Expected random to hold torch's random state but got {random!r}.")
    if last_step is not None and type(last_step) is not int:
        raise ValueError(f"Expected last_step to be a step or None but got {last_step!r}.")
    try:
        for step, ranks, budget in state["history"]:
            int(step), list(map(int, ranks)), float(budget)
    except (TypeError, ValueError) as error:
        raise ValueError("Expected history to be a list of step, ranks and budget but it is not.") from error
