"""The history of ranks and budget at each logging step, in bounded memory."""

__all__ = ["MAX_READINGS", "Reading", "record_reading"]

Reading = tuple[int, list[int], float]
"""Optimizer step, ranks of all layers, and budget."""

MAX_READINGS = 2000
"""Maximum length of the history; when it is exceeded, every second entry is dropped."""


def record_reading(history: list[Reading], step: int, ranks: list[int], budget: float) -> None:
    """Append ranks and budget of a step, and drop entries of this or a later step, from an earlier run."""
    while history and history[-1][0] >= step:
        history.pop()
    history.append((step, ranks, budget))
    if len(history) > MAX_READINGS:
        del history[1:-1:2]
