"""The history of ranks and budget: every step, in bounded memory, copied from the device only when it is read."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lalora_lightning.allocator.allocator import RankAllocator
from lalora_lightning.runs import Run, parameter_totals

__all__ = ["MAX_PENDING", "MAX_READINGS", "RankHistory", "Reading", "thinned"]

Reading = tuple[int, list[int], float]
"""Optimizer step, ranks of all layers, and budget."""

MAX_READINGS = 2000
"""Maximum length of the history. Steps without a change of the ranks are dropped first."""

MAX_PENDING = 1000
"""Maximum number of steps on the device; when it is exceeded, every second one is dropped."""


class RankHistory:
    """Ranks and budget of the steps of a run: noted on the device, read in one transfer, then logged.

    Attributes:
        readings: What has been read, by rising step.
        skipped: Number of steps so far whose weights were not finite.
    """

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.skipped = 0
        # Still on the device: optimizer step, the Trainer's step for logging, ranks and budget.
        self._pending: list[tuple[int, int | None, Tensor, Tensor]] = []
        # Read but not logged, by the Trainer's step for logging.
        self._unlogged: dict[int, Reading] = {}

    def note(self, step: int, logged_step: int | None, allocator: RankAllocator) -> None:
        """Keep ranks and budget of a step. The allocator replaces these tensors and does not change them.

        Args:
            step: Optimizer step.
            logged_step: The Trainer's step for logging; None for a step that is not logged.
            allocator: The allocator after this step.
        """
        self._pending.append((step, logged_step, allocator.ranks, allocator.budget))
        if len(self._pending) > MAX_PENDING:
            del self._pending[1::2]

    def read(self, allocator: RankAllocator) -> int:
        """Copy all noted steps from the device in one transfer.

        Returns:
            Number of steps since the last call whose weights were not finite.
        """
        pending, self._pending = self._pending, []
        rows, skipped = allocator.read_steps([(ranks, budget) for *_, ranks, budget in pending])
        for (step, logged_step, *_), row in zip(pending, rows[:-1], strict=True):
            self._append((step, *row))
            if logged_step is not None:
                self._unlogged[logged_step] = (step, *row)
        if len(self._unlogged) > MAX_READINGS:
            self._unlogged = self._changes()
        new, self.skipped = skipped - self.skipped, skipped
        return new

    def is_logged(self) -> bool:
        """Return whether every step has been logged."""
        return not self._pending and not self._unlogged

    def take_unlogged(self) -> dict[int, Reading]:
        """Return the steps to log by the Trainer's step for logging, the last one last, and regard them as logged.

        Steps where no rank changes are left out.
        """
        unlogged, self._unlogged = self._changes(), {}
        return unlogged

    def drop_unlogged(self) -> None:
        """Regard all steps as logged, and forget those that were not read, which an interrupted run leaves."""
        self._pending, self._unlogged = [], {}

    def run(self, allocator: RankAllocator) -> Run:
        """Return the run so far, for figures.

        Raises:
            RuntimeError: Nothing has been read yet.
        """
        if not self.readings:
            raise RuntimeError("Expected a run to plot but no ranks have been read yet; train first.")
        steps, ranks, budgets = zip(*self.readings, strict=True)
        totals = parameter_totals(ranks, allocator.parameters_per_rank, allocator.max_rank)
        return Run(allocator.layer_names, allocator.max_rank, steps, ranks, budgets, **totals)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been read."""
        return {
            "history": [list(reading) for reading in self.readings],
            "unlogged": [[logged_step, step] for logged_step, (step, *_) in self._unlogged.items()],
        }

    def load_state_dict(self, state: dict[str, Any], skipped: int) -> None:
        """Restore a state. States of version 0.1.0 do not say what was not logged.

        Args:
            state: What :meth:`state_dict` returned.
            skipped: Number of steps so far whose weights were not finite.
        """
        self.readings = [(step, list(ranks), budget) for step, ranks, budget in state["history"]]
        by_step = {reading[0]: reading for reading in self.readings}
        unlogged: Iterable[tuple[int, int]] = state.get("unlogged", [])
        self._unlogged = {logged_step: by_step[step] for logged_step, step in unlogged if step in by_step}
        self._pending, self.skipped = [], skipped

    def _append(self, reading: Reading) -> None:
        """Append a reading, and drop those of this or a later step, which are of an earlier run."""
        while self.readings and self.readings[-1][0] >= reading[0]:
            self.readings.pop()
        self.readings.append(reading)
        if len(self.readings) > MAX_READINGS:
            self.readings = thinned(self.readings, MAX_READINGS)

    def _changes(self) -> dict[int, Reading]:
        kept = {step for step, *_ in thinned(list(self._unlogged.values()), MAX_READINGS)}
        return {logged_step: reading for logged_step, reading in self._unlogged.items() if reading[0] in kept}


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
