"""Colors, legends and layer names, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalora_lightning.names import BlocksByKind, split_common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["BLUE", "COLORS", "MARKERS", "ORANGE", "legend_above", "name_kinds", "name_layers"]

BLUE, ORANGE = "#0072B2", "#D55E00"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

_MOST_LABELS = 24
_LONGEST_PREFIX = 24


def legend_above(axes: Axes) -> None:
    """Place the legend above the axes, where it hides no lines."""
    columns = min(4, len(axes.get_legend_handles_labels()[1]))
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def name_layers(axis: Axis, layer_names: Sequence[str], offset: float = 0.0) -> None:
    """Label an axis with the names of the layers, without overlaps; their common prefix is part of the axis label.

    Args:
        axis: The axis, on which layer i is at i + offset.
        layer_names: Names of all layers.
        offset: Position of the first layer.
    """
    from matplotlib.axis import XAxis

    layers = len(layer_names)
    prefix, labels = split_common_prefix(layer_names)
    stride = -(-layers // _MOST_LABELS)
    axis.set_ticks([i + offset for i in range(0, layers, stride)], labels=labels[::stride])
    if len(prefix) > _LONGEST_PREFIX:
        prefix = "..." + prefix[-_LONGEST_PREFIX:].partition(".")[2]
    separator = " " if isinstance(axis, XAxis) else "\n"
    axis.set_label_text(f"layer{separator}({prefix}.*)" if prefix else "layer")
    if isinstance(axis, XAxis) and max(map(len, labels)) > 3:
        axis.set_tick_params(rotation=90)


def name_kinds(axes: Axes, layout: BlocksByKind) -> None:
    """Label the rows of a heat map, which are sorted by kind of projection, and separate the kinds by lines.

    Args:
        axes: The axes, on which row i is from i to i + 1.
        layout: The projections.
    """
    start, middles = 0, []
    for kind in range(len(layout.kinds)):
        blocks = sum(column == kind for _, column in layout.cells)
        middles.append(start + blocks / 2)
        start += blocks
        if start < len(layout.cells):
            axes.axhline(start, color="white", linewidth=1.5)
    axes.set_yticks(middles, layout.kinds)
    axes.tick_params("y", length=0)
    axes.set_ylabel("projection, first to last block")
