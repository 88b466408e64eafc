"""The rank report that is printed after training: the ranks of the layers and the size of the trimmed adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lalora_lightning.adapters import lora_layers
from lalora_lightning.names import split_common_prefix
from lalora_lightning.runs import trimmed_bytes
from lalora_lightning.tables import text_table

if TYPE_CHECKING:
    from torch import nn

    from lalora_lightning.allocator import RankAllocator

__all__ = ["HEADER", "print_rank_report", "rank_rows", "rank_totals"]

HEADER = ("layer", "rank", "contribution", "growth, %/step", "share of maximum")

_BAR = 16
# Width of the layers' names, with and without the bars, so that lines have at most 80 columns.
_NAME_BESIDE_BAR, _NAME = 26, 44


def print_rank_report(allocator: RankAllocator, model: nn.Module) -> None:
    """Print a table of the layers and lines of totals, at most 80 columns wide.

    Args:
        allocator: An allocator after its last step.
        model: The adapted model.
    """
    prefix, names = split_common_prefix(allocator.layer_names)
    has_bar = max(map(len, names)) <= _NAME_BESIDE_BAR
    columns = len(HEADER) if has_bar else len(HEADER) - 1
    rows = [[_end(name, _NAME), *row[1:columns]] for name, row in zip(names, rank_rows(allocator), strict=True)]
    title = "La-LoRA ranks" + (f" of {_end(prefix, _NAME)}.*" if prefix else "") + f", maximum {allocator.max_rank}"
    table = text_table(HEADER[:columns], rows, left=(0, len(HEADER) - 1))
    print(f"\n{title}\n{table}\n{rank_totals(allocator, model)}")


def rank_rows(allocator: RankAllocator) -> list[list[str]]:
    """Return a row per layer: name, rank, contribution (Eq. 9), growth rate (Eq. 6) and a bar as long as the rank.

    Fixed ranks that were condensed have no contributions and growth rates.
    """
    values = zip(
        allocator.layer_names,
        allocator.ranks.tolist(),
        allocator.contributions.tolist(),
        allocator.growth_rates.tolist(),
        strict=True,
    )
    return [
        [name, str(rank), _number(contribution, ".3f"), _number(100 * growth, "+.3f"), _bar(rank / allocator.max_rank)]
        for name, rank, contribution, growth in values
    ]


def rank_totals(allocator: RankAllocator, model: nn.Module) -> str:
    """Return lines with the total rank and the budget, the size of the adapters, and advice on an unused budget."""
    total, full = int(allocator.ranks.sum()), len(allocator.ranks) * allocator.max_rank
    layers = lora_layers(model).values()
    trimmed = sum(trimmed_bytes(layer.lora_A, layer.lora_B, int(layer.rank)) for layer in layers)
    whole = sum(trimmed_bytes(layer.lora_A, layer.lora_B, layer.max_rank) for layer in layers)
    budget, most = float(allocator.budget), allocator.max_budget
    lines = [
        f"total rank {total} of LoRA's {full} ({total / full:.0%}), budget {budget:.1f}",
        f"adapters {_size(whole)}, trimmed to these ranks {_size(trimmed)}",
    ]
    if budget < 0.9 * most and not allocator.condensed:
        lines.append(f"The budget ended below its maximum of {most:g}; increase gamma or train longer.")
    return "\n".join(lines)


def _end(name: str, width: int) -> str:
    """Shorten a long name to its end.

    >>> _end("decoder.block.0.layer", 12)
    '...k.0.layer'
    """
    return name if len(name) <= width else "..." + name[3 - width :]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _bar(share: float) -> str:
    filled = round(_BAR * share)
    return "█" * filled + "·" * (_BAR - filled)


def _size(n_bytes: float) -> str:
    """Return a size with its unit.

    >>> _size(36864), _size(5 * 2**20)
    ('36.0 KiB', '5.0 MiB')
    """
    return f"{n_bytes / 2**10:.1f} KiB" if n_bytes < 2**20 else f"{n_bytes / 2**20:.1f} MiB"
