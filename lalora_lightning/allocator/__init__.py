"""Rank allocation, for any training loop."""

from lalora_lightning.allocator.allocator import RankAllocator
from lalora_lightning.allocator.broadcasts import (
    broadcast_from_first,
    broadcast_masks,
    leave_masks_out_of_broadcasts,
)
from lalora_lightning.allocator.condensing import require_condensing
from lalora_lightning.allocator.history import RankHistory, Reading
from lalora_lightning.allocator.optimizer_state import reset_optimizer_state
from lalora_lightning.allocator.settings import AllocationSettings, Contribution, ContributionScale, Growth

__all__ = [
    "AllocationSettings",
    "Contribution",
    "ContributionScale",
    "Growth",
    "RankAllocator",
    "RankHistory",
    "Reading",
    "broadcast_from_first",
    "broadcast_masks",
    "leave_masks_out_of_broadcasts",
    "require_condensing",
    "reset_optimizer_state",
]
