"""Colors, legends and layer names, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalora_lightning.names import split_common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["BLUE", "COLORS", "MARKERS", "ORANGE", "legend_above", "name_layers"]

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
    axis.set_label_text(f"layer ({prefix}.*)" if prefix else "layer")
    if isinstance(axis, XAxis) and max(map(len, labels)) > 3:
        axis.set_tick_params(rotation=90)
