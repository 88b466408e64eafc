"""Small models that the tests adapt."""

import torch
from torch import nn

from lalora_lightning import lora_layers


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return x + scores.softmax(-1) @ self.value(x)


class TinyTransformer(nn.Module):
    """Attention blocks, mean over the sequence, a head: (N, T, width) to (N, classes)."""

    def __init__(self, depth: int = 3, width: int = 8, classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def unchanged(model: nn.Module) -> bool:
    """Return whether nothing was adapted and nothing frozen."""
    return not lora_layers(model) and all(p.requires_grad for p in model.parameters())
