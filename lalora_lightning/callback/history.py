"""The history of ranks and budget: every step, in bounded memory, copied from the device only at logging steps."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from lalora_lightning.allocator import RankAllocator

__all__ = ["MAX_PENDING", "MAX_READINGS", "PendingReadings", "Reading", "record_reading", "thinned"]

Reading = tuple[int, list[int], float]
"""Optimizer step, ranks of all layers, and budget."""

MAX_READINGS = 2000
"""Maximum length of the history. Steps without a change of the ranks are dropped first."""

MAX_PENDING = 1000
"""Maximum number of steps on the device; when it is exceeded, every second one is dropped."""


class PendingReadings:
    """Ranks and budgets of the steps since the last logging step, which are still on the device."""

    def __init__(self) -> None:
        # Optimizer step, Lightning's step for logging, ranks and budget.
        self._pending: list[tuple[int, int | None, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._pending)

    def note(self, step: int, logged_step: int | None, allocator: RankAllocator) -> None:
        """Keep ranks and budget of a step. The allocator replaces these tensors and does not change them.

        Args:
            step: Optimizer step.
            logged_step: Lightning's step for logging; None for a step that is not logged.
            allocator: The allocator after this step.
        """
        self._pending.append((step, logged_step, allocator.ranks, allocator.budget))
        if len(self._pending) > MAX_PENDING:
            del self._pending[1::2]

    def collect(self, allocator: RankAllocator) -> tuple[list[Reading], list[int | None], int]:
        """Copy everything from the device in one transfer, and begin anew.

        Returns:
            A reading for each step, Lightning's steps for logging, and the number of skipped steps.
        """
        rows, skipped = allocator.read_steps([(ranks, budget) for *_, ranks, budget in self._pending])
        steps, logged_steps = (
            [step for step, *_ in self._pending],
            [logged_step for _, logged_step, *_ in self._pending],
        )
        self._pending.clear()
        # The last row is the present, that of the last step unless the ranks of the model were changed since.
        readings = [(step, *row) for step, row in zip(steps, rows[:-2] + rows[-1:], strict=False)]
        return readings, logged_steps, skipped


def record_reading(history: list[Reading], step: int, ranks: list[int], budget: float) -> None:
    """Append ranks and budget of a step, and drop entries of this or a later step, from an earlier run."""
    while history and history[-1][0] >= step:
        history.pop()
    history.append((step, ranks, budget))
    if len(history) > MAX_READINGS:
        history[:] = thinned(history, MAX_READINGS)


def thinned(history: Sequence[Reading], limit: int) -> list[Reading]:
    """Return a part of a history with at most this many entries, or half of them if the ranks keep changing.

    The first and the last entry stay, and so do those before and after a change of the ranks, as far as possible.

    >>> thinned([(0, [1], 1.0), (1, [1], 1.2), (2, [1], 1.4), (3, [2], 2.1), (4, [2], 2.2)], 4)
    [(0, [1], 1.0), (2, [1], 1.4), (3, [2], 2.1), (4, [2], 2.2)]
    """
    if len(history) < 3:
        return list(history)
    inner = zip(history, history[1:], history[2:], strict=False)
    changes = [now for before, now, after in inner if before[1] != now[1] or now[1] != after[1]]
    kept = [history[0], *changes, history[-1]]
    if len(kept) > limit:
        kept = [history[0], *itertools.islice(history, 2, len(history) - 1, 2), history[-1]]
    return kept
