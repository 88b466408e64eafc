"""The rank report that is printed after training: the ranks of the layers and the size of the trimmed adapters."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from lalora_lightning.adapters import condensed_parameters, lora_layers
from lalora_lightning.names import blocks_by_kind, split_common_prefix
from lalora_lightning.runs import Run, parameter_totals, trimmed_bytes
from lalora_lightning.tables import block_table, text_table

if TYPE_CHECKING:
    from torch import nn

    from lalora_lightning.allocator import RankAllocator

__all__ = ["HEADER", "rank_report", "rank_rows", "rank_totals"]

HEADER = ("layer", "rank", "contribution", "growth, %/step", "share of maximum")

_COLUMNS = 80
_BAR = 16
# Width of the layers' names, with and without the bars, so that lines have at most 80 columns.
_NAME_BESIDE_BAR, _NAME = 26, 44


def rank_report(allocator: RankAllocator, model: nn.Module) -> str:
    """Return a table of the ranks and lines of totals, at most 80 columns wide.

    Projections of several blocks and kinds are shown as a table of blocks by kind, other layers one per line. A sharded
    adapter is gathered, so every process has to call this.

    Args:
        allocator: An allocator after its last step.
        model: The adapted model.
    """
    layout = blocks_by_kind(allocator.layer_names)
    prefix, names = split_common_prefix(allocator.layer_names)
    if layout is not None:
        table = _wrapped_columns(block_table(layout, [str(rank) for rank in allocator.ranks.tolist()]))
    else:
        has_bar = max(map(len, names)) <= _NAME_BESIDE_BAR
        columns = len(HEADER) if has_bar else len(HEADER) - 1
        rows = [[_end(name, _NAME), *row[1:columns]] for name, row in zip(names, rank_rows(allocator), strict=True)]
        table = text_table(HEADER[:columns], rows, left=(0, len(HEADER) - 1))
    title = "La-LoRA ranks" + (f" of {_end(prefix, _NAME)}.*" if prefix else "") + f", maximum {allocator.max_rank}"
    return f"\n{title}\n{table}\n{rank_totals(allocator, model)}"


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
    """Return lines with the total and the budget, sizes of the adapters, and advice on an unused budget.

    The total and the budget are numbers of parameters if a rank of one layer costs more than one of another layer.
    """
    ranks, budget, limit = allocator.ranks.tolist(), float(allocator.budget), allocator.max_budget
    totals = parameter_totals([ranks], allocator.parameters_per_rank, allocator.max_rank)
    run = Run(allocator.layer_names, allocator.max_rank, [allocator.steps], [ranks], [budget], **totals)
    layers = lora_layers(model).values()
    trimmed = sum(trimmed_bytes(layer.lora_A, layer.lora_B, int(layer.rank)) for layer in layers)
    whole = sum(trimmed_bytes(layer.lora_A, layer.lora_B, layer.max_rank) for layer in layers)
    lines = [
        f"{run.total_name} {run.describe_total()}, budget {run.describe_budget()}",
        f"adapters {_size(whole)}, trimmed to these ranks {_size(trimmed)}",
    ]
    # Adapters with initial factors or NaN cannot be condensed.
    with contextlib.suppress(ValueError):
        more, less = condensed_parameters(model, (0.99, 0.95), allocator.settings.group_by)
        lines.append(f"condense_lora would keep 99% of the energy in {more:,} parameters, 95% in {less:,}")
    if budget < 0.9 * limit and not allocator.condensed:
        lines.append(f"The budget ended below its maximum of {limit:g}; increase gamma or train longer.")
    return "\n".join(lines)


def _wrapped_columns(table: list[list[str]]) -> str:
    """Return a table as text of at most 80 columns; further columns follow in a table below, with the same labels."""
    labels, *columns = (list(column) for column in zip(*table, strict=True))
    parts, width = [[labels]], max(map(len, labels))
    for column in columns:
        width += 2 + max(map(len, column))
        if width > _COLUMNS and len(parts[-1]) > 1:
            parts.append([labels])
            width = max(map(len, labels)) + 2 + max(map(len, column))
        parts[-1].append(column)
    texts = []
    for part in parts:
        header, *rows = zip(*part, strict=True)
        texts.append(text_table(header, rows))
    return "\n\n".join(texts)


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
