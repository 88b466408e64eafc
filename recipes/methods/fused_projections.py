"""Splitting a fused query, key and value projection, for methods that can only adapt whole linear modules."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["SplitProjection", "split_fused"]


class SplitProjection(nn.Module):
    """A fused projection (3 d x d) as separate ``query``, ``key`` and ``value`` with the same outputs.

    Args:
        fused: The projection; its weight is copied.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        parts = []
        for rows in range(0, fused.out_features, fused.out_features // 3):
            part = nn.Linear(fused.in_features, fused.out_features // 3, fused.bias is not None, fused.weight.device)
            part.weight = nn.Parameter(fused.weight.detach()[rows : rows + part.out_features].clone())
            if fused.bias is not None:
                part.bias = nn.Parameter(fused.bias.detach()[rows : rows + part.out_features].clone())
            parts.append(part)
        self.query, self.key, self.value = parts

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to ``(..., 3 d)``."""
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


def split_fused(model: nn.Module, names: Iterable[str]) -> None:
    """Split the fused projections with these names, in place.

    Raises:
        TypeError: One of them is not ``nn.Linear``.
    """
    for name in names:
        fused = model.get_submodule(name)
        if not isinstance(fused, nn.Linear):
            raise TypeError(f"Expected {name} to be nn.Linear but got {type(fused).__name__}.")
        model.set_submodule(name, SplitProjection(fused))
