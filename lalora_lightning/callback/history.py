"""The history of ranks and budget at each logging step, in bounded memory."""

__all__ = ["MAX_READINGS", "Reading", "record_reading"]

Reading = tuple[int, list[int], float]
"""Optimizer step, ranks of all layers, and budget."""

MAX_READINGS = 2000
"""Readings that are kept. Above that every second one is dropped, so that the memory of a long run is bounded."""


def record_reading(history: list[Reading], step: int, ranks: list[int], budget: float) -> None:
    """Append a reading; readings of the same or a later step, from a run that began again, are replaced."""
    while history and history[-1][0] >= step:
        history.pop()
    history.append((step, ranks, budget))
    if len(history) > MAX_READINGS:
        del history[1:-1:2]
