"""Checks of the settings for condensing in a run."""

import math

__all__ = ["require_condensing"]


def require_condensing(condense_to: float | None, condense_at: int | float, min_rank: int) -> None:
    """Check when and how far to condense.

    Raises:
        ValueError: An argument is out of range.
    """
    if condense_to is not None and not 0 < condense_to < math.inf:
        raise ValueError(f"Expected condense_to to be a positive average rank but got {condense_to}.")
    if condense_to is not None and condense_to < min_rank:
        raise ValueError(
            f"Expected condense_to to be at least min_rank={min_rank} but got {condense_to}; with min_rank=0, layers "
            "may end with nothing."
        )
    steps = isinstance(condense_at, int) and not isinstance(condense_at, bool) and condense_at >= 1
    if not steps and not (isinstance(condense_at, float) and 0 < condense_at <= 1):
        raise ValueError(
            "Expected condense_at to be a number of steps (an integer) or a fraction in (0, 1] (a float) but got "
            f"{condense_at!r}."
        )
