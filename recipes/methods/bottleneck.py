"""Bottleneck adapters: small two-layer networks after or parallel to the projections of a transformer block.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2021 (arXiv 2005.00247), AdapterDrop (Rücklé et al. 2021, arXiv
2010.11918), the series adapter (LLM-Adapters, Hu et al. 2023, arXiv 2304.01933) and the parallel adapter (He et al.
2022, arXiv 2110.04366). They are inserted in place into BERT, RoBERTa, models with the same layout, and timm's ViTs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.methods.projections import NotApplicableError, find_projections
from recipes.methods.selective import freeze_backbone

__all__ = [
    "LAYOUTS",
    "BlockLayout",
    "SeriesAdapter",
    "WidenedInput",
    "WidenedOutput",
    "adapt_by_bottleneck",
    "add_houlsby",
    "add_parallel",
    "add_pfeiffer",
    "add_series",
    "block_layout",
]


class BlockLayout(NamedTuple):
    """Names of the projections within a block that receive adapters."""

    attention_out: str
    feed_forward_in: str
    feed_forward_out: str


LAYOUTS = (
    BlockLayout("attention.output.dense", "intermediate.dense", "output.dense"),  # BERT, RoBERTa
    BlockLayout("attn.proj", "mlp.fc1", "mlp.fc2"),  # timm's ViTs
)


def block_layout(block: nn.Module) -> BlockLayout:
    """Return the layout of a transformer block.

    Raises:
        NotApplicableError: The block has none of the known layouts.
    """
    names = {name for name, _ in block.named_modules()}
    for layout in LAYOUTS:
        if names.issuperset(layout):
            return layout
    known = " or ".join(", ".join(layout) for layout in LAYOUTS)
    raise NotApplicableError(f"it looks for {known} in each block and {type(block).__name__} has neither")


class SeriesAdapter(nn.Module):
    """A projection followed by a bottleneck adapter: ``h + U act(D h)`` with ``h = base_layer(x)``.

    ``U`` is initialized to zero, so a new adapter does not change the output.

    Args:
        base_layer: The frozen projection, to width d.
        bottleneck: Hidden width b of the adapter; it has 2 d b + b + d parameters.
        activation: Activation of the hidden layer.
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.base_layer = base_layer
        width, like = base_layer.out_features, base_layer.weight
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = _zeros(nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., k)`` to ``(..., d)``."""
        hidden = self.base_layer(x)
        return hidden + self.up(self.activation(self.down(hidden)))


class WidenedInput(nn.Module):
    """The first projection of a feed-forward network, with ``down`` of a parallel adapter as additional hidden units.

    The network applies its activation elementwise between its two projections. A parallel adapter with the same
    activation is therefore equivalent to additional hidden units.

    Args:
        base_layer: The frozen projection, from width d to f hidden units.
        bottleneck: Hidden width b of the adapter.
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = base_layer.weight
        self.down = nn.Linear(base_layer.in_features, bottleneck, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d)`` to ``(..., f + b)``."""
        return torch.cat([self.base_layer(x), self.down(x)], -1)


class WidenedOutput(nn.Module):
    """The second projection of a feed-forward network, with ``up`` of a parallel adapter, initialized to zero.

    Args:
        base_layer: The frozen projection, from f hidden units to width d.
        bottleneck: Hidden width b of the adapter.
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = base_layer.weight
        self.up = _zeros(nn.Linear(bottleneck, base_layer.out_features, device=like.device, dtype=like.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(..., f + b)`` to ``(..., d)``."""
        base, adapter = hidden.split([self.base_layer.in_features, self.up.in_features], -1)
        return self.base_layer(base) + self.up(adapter)


def adapt_by_bottleneck(
    add: Callable[[Sequence[nn.Module], int], None], module: nn.Module, bottleneck: int = 16, dropped: float = 0.0
) -> list[pl.Callback]:
    """Add adapters to the blocks of a module, and freeze everything else except for the head.

    Args:
        add: One of ``add_houlsby``, ``add_pfeiffer``, ``add_series`` and ``add_parallel``.
        module: The module.
        bottleneck: Hidden width of the adapters.
        dropped: Fraction of the blocks without adapters, starting with the first block (AdapterDrop).
    """
    blocks = [module.get_submodule(name) for name in find_projections(module).blocks]
    for block in blocks:
        block_layout(block)
    freeze_backbone(module)
    add(blocks[round(dropped * len(blocks)) :], bottleneck)
    return []


def add_houlsby(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """Add two series adapters per block, after the output projections of attention and feed-forward network (GELU).

    The published method also trains the layer norms. They stay frozen here, as in later comparisons.
    """
    for block in blocks:
        layout = block_layout(block)
        for name in (layout.attention_out, layout.feed_forward_out):
            _add_series(block, name, bottleneck, F.gelu)


def add_pfeiffer(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """Add one series adapter per block, after the output projection of the feed-forward network (ReLU)."""
    for block in blocks:
        _add_series(block, block_layout(block).feed_forward_out, bottleneck, F.relu)


def add_series(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """Add one series adapter per block, after the feed-forward network as in LLM-Adapters (tanh)."""
    for block in blocks:
        _add_series(block, block_layout(block).feed_forward_out, bottleneck, torch.tanh)


def add_parallel(blocks: Sequence[nn.Module], bottleneck: int) -> None:
    """Add one adapter per block, parallel to the feed-forward network.

    The adapter has the same input as the network, its output is added to that of the network, and it has the activation
    of the network. He et al. use ReLU.
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
