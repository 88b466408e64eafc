"""ComponentNorms: computes the norms of all rank components of a model, shape by shape."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lalora_lightning import functional
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.sharding import gathered

__all__ = ["ComponentNorms"]


class ComponentNorms:
    """Computes the squared norms of all rank components as one tensor ``(2, L, K, r)``.

    L layers have at most K adapted matrices each, with r components; index 0 of the first dimension is ``lora_A``,
    index 1 is ``lora_B``. Layers with fewer matrices are padded with zeros. Factors of one shape are stacked,
    so the number of operations depends on the number of shapes, not on the number of layers.

    Args:
        groups: Names of the projections of each layer, by the name of the layer.
        layers: The projections by name. All have the same maximum rank.

    Attributes:
        matrices: ``(L,)`` number of matrices in each layer.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], layers: Mapping[str, TruncatedLoRALinear]) -> None:
        # Sorted by layer.
        self._projections = [layers[name] for names in groups.values() for name in names]
        self._matrices_of_shape: dict[tuple[int, torch.Size], list[int]] = {}
        most = max(sum(len(layers[name].out_slices) for name in names) for names in groups.values())
        # Row of each factor among all factors' norms; -1 is the padding.
        rows = torch.full((2, len(groups), most), -1)
        matrix = 0
        for i, names in enumerate(groups.values()):
            factors = [pair for name in names for pair in layers[name].split(layers[name].lora_A, layers[name].lora_B)]
            for k, pair in enumerate(factors):
                for side in (0, 1):
                    self._matrices_of_shape.setdefault((side, pair[side].shape), []).append(matrix)
                    rows[side, i, k] = 2 * matrix + side
                matrix += 1
        # Norms are computed shape by shape. The index -1 selects the last row, which is the padding.
        order = [2 * m + side for (side, _), members in self._matrices_of_shape.items() for m in members]
        position = torch.empty(2 * matrix + 1, dtype=torch.long)
        position[torch.tensor([*order, 2 * matrix])] = torch.arange(2 * matrix + 1)
        self._positions = position[rows]
        self._padding = torch.zeros(1, self._projections[0].max_rank, dtype=torch.float32)
        self.matrices = (rows[0] >= 0).sum(1)
        self.to(self._projections[0].lora_A.device)

    def to(self, device: torch.device) -> None:
        """Move the index tensors to the device of the model."""
        self._positions = self._positions.to(device)
        self._padding = self._padding.to(device)
        self.matrices = self.matrices.to(device)

    def of_parameters(self) -> Tensor:
        """Return the squared norms of the components of ``lora_A`` and ``lora_B``, ``(2, L, K, r)``."""
        return self._squares(lambda layer: (layer.lora_A, layer.lora_B))

    def of_gradients(self) -> Tensor:
        """Return the squared norms of the components' gradients, ``(2, L, K, r)``; zero without a gradient."""
        return self._squares(
            lambda layer: (
                torch.zeros_like(layer.lora_A) if layer.lora_A.grad is None else layer.lora_A.grad,
                torch.zeros_like(layer.lora_B) if layer.lora_B.grad is None else layer.lora_B.grad,
            )
        )

    @torch.no_grad()
    def _squares(self, read: Callable[[TruncatedLoRALinear], tuple[Tensor, Tensor]]) -> Tensor:
        factors = [pair for layer in self._projections for pair in layer.split(*read(layer))]
        norms = [
            gathered(functional.component_norms(torch.stack([factors[i][side] for i in members]), dim=(-1, -2)[side]))
            for (side, _), members in self._matrices_of_shape.items()
        ]
        return torch.cat([*norms, self._padding])[self._positions].square()
