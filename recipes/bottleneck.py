"""Bottleneck adapters: small two-layer networks beside or behind the projections of a transformer block.

Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2021 (arXiv:2005.00247), AdapterDrop (Rücklé et al. 2021,
arXiv:2010.11918), series and parallel (He et al. 2022, arXiv:2110.04366; LLM-Adapters, Hu et al. 2023,
arXiv:2304.01933). In place, for BERT, RoBERTa and models of their layout, and for timm's ViTs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.projections import NotApplicableError


class BlockLayout(NamedTuple):
    """Names within a block of the projections that adapters go to."""

    attention_out: str
    feed_forward_in: str
    feed_forward_out: str


LAYOUTS = (
    BlockLayout("attention.output.dense", "intermediate.dense", "output.dense"),  # BERT, RoBERTa
    BlockLayout("attn.proj", "mlp.fc1", "mlp.fc2"),  # timm's ViTs
)


def block_layout(block: nn.Module) -> BlockLayout:
    """How a transformer block calls its projections.

    Raises:
        NotApplicableError: It has neither layout that is known.
    """
    names = {name for name, _ in block.named_modules()}
    for layout in LAYOUTS:
        if names.issuperset(layout):
            return layout
    known = " or ".join(", ".join(layout) for layout in LAYOUTS)
    raise NotApplicableError(f"it looks for {known} in each block and {type(block).__name__} has neither")


class SeriesAdapter(nn.Module):
    """A projection with a bottleneck adapter behind it: ``h + U act(D h)`` of ``h = base_layer(x)``.

    ``U`` starts at zero, so that a fresh adapter changes nothing.

    Args:
        base_layer: The frozen projection, to width d.
        bottleneck: Hidden width b of the adapter; it has 2 d b + b + d parameters.
        activation: Of the hidden layer.
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer
        width, like = base_layer.out_features, base_layer.weight
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = _zeros(nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``(..., k)`` to ``(..., d)``."""
        hidden = self.base_layer(x)
        return hidden + self.up(self.activation(self.down(hidden)))


class WidenedInput(nn.Module):
    """The first projection of a feed-forward network, with ``down`` of a parallel adapter as further hidden units.

    Between its two projections the network applies its activation element by element, so an adapter beside it that
    shares the activation is the network made wider.
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = base_layer.weight
        self.down = nn.Linear(base_layer.in_features, bottleneck, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to ``(..., f + b)``."""
        return torch.cat([self.base_layer(x), self.down(x)], -1)


class WidenedOutput(nn.Module):
    """The second projection of a feed-forward network, with ``up`` of a parallel adapter, which starts at zero."""

    def __init__(self, base_layer: nn.Linear, bottleneck: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = base_layer.weight
        self.up = _zeros(nn.Linear(bottleneck, base_layer.out_features, device=like.device, dtype=like.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., f + b)`` to ``(..., d)``."""
        own, beside = hidden.split([self.base_layer.in_features, self.up.in_features], -1)
        return self.base_layer(own) + self.up(beside)


def add_houlsby(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """Two series adapters a block, after the output projections of attention and of the feed-forward network (GELU).

    The published method trains the layer norms too; here they stay frozen, as in later comparisons.
    """
    for block in blocks:
        layout = block_layout(block)
        for name in (layout.attention_out, layout.feed_forward_out):
            _add_series(block, name, bottleneck, F.gelu)


def add_pfeiffer(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """One series adapter a block, after the feed-forward network's output projection (ReLU)."""
    for block in blocks:
        _add_series(block, block_layout(block).feed_forward_out, bottleneck, F.relu)


def add_series(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """One series adapter a block, after the feed-forward network, as LLM-Adapters places it (tanh)."""
    for block in blocks:
        _add_series(block, block_layout(block).feed_forward_out, bottleneck, torch.tanh)


def add_parallel(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """One adapter a block beside the feed-forward network: its input goes in, its output is added.

    The adapter has the activation of the network it stands beside, where He et al. take ReLU.
    """
    for block in blocks:
        layout = block_layout(block)
        for name, widened in ((layout.feed_forward_in, WidenedInput), (layout.feed_forward_out, WidenedOutput)):
            block.set_submodule(name, widened(_linear(block, name), bottleneck))


def _add_series(block: nn.Module, name: str, bottleneck: int, activation: Callable[[Tensor], Tensor]) -> None:
    block.set_submodule(name, SeriesAdapter(_linear(block, name), bottleneck, activation))


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise NotApplicableError(f"it adapts nn.Linear and {name} is {type(module).__name__}")
    return module


def _zeros(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
