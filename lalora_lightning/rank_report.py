"""The rank report: what every layer got, and what the trimmed adapter weighs; printed after fit."""

from collections.abc import Sequence
from importlib.util import find_spec

from torch import Tensor, nn

from lalora_lightning.adapters import lora_layers
from lalora_lightning.names import common_prefix as shared_parts
from lalora_lightning.allocator import RankAllocator

HEADER = ("layer", "rank", "contribution", "growth, % a step", "of the maximum rank")
_BAR = 16


def print_rank_report(allocator: RankAllocator, model: nn.Module) -> None:
    """Print a table of the layers and a line of totals; by rich where it is installed.

    Args:
        allocator: After its last step; contribution and growth are those of that step.
        model: The adapted model.
    """
    rows, totals = rank_rows(allocator), rank_totals(allocator, model)
    shared = shared_parts(allocator.layer_names) if len(rows) > 1 else []
    title = f"La-LoRA's ranks, maximum {allocator.max_rank}" + (f", of {'.'.join(shared)}.*" if shared else "")
    # What all names share stands in the title, so that the rest fits a terminal of 80 columns.
    rows = [[".".join(row[0].split(".")[len(shared) :]) or row[0], *row[1:]] for row in rows]
    if find_spec("rich") is None:
        print(f"\n{title}\n{_text_table(rows)}\n{totals}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, title=title, caption=totals, caption_justify="left")
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def rank_rows(allocator: RankAllocator) -> list[list[str]]:
    """A row a layer: name, rank, contribution (Eq. 9), growth (Eq. 6), a bar as long as the rank."""
    readings = zip(
        allocator.layer_names,
        allocator.ranks.tolist(),
        allocator.contributions.tolist(),
        allocator.growth_rates.tolist(),
        strict=True,
    )
    return [
        [name, str(rank), f"{contribution:.3f}", f"{100 * growth:+.3f}", _bar(rank / allocator.max_rank)]
        for name, rank, contribution, growth in readings
    ]


def rank_totals(allocator: RankAllocator, model: nn.Module) -> str:
    """Total rank against LoRA's, the budget, and the weight of the adapters trimmed and as they are.

    Where much of the budget was not given out by then, what to do about it.
    """
    total, full = int(allocator.ranks.sum()), len(allocator.ranks) * allocator.max_rank
    layers = lora_layers(model).values()
    trimmed = sum(trimmed_bytes(layer.lora_A, layer.lora_B, int(layer.rank)) for layer in layers)
    whole = sum(trimmed_bytes(layer.lora_A, layer.lora_B, layer.max_rank) for layer in layers)
    budget, most = float(allocator.budget), allocator.max_budget
    advice = ""
    if budget < 0.9 * most:
        advice = f"\nThe budget ended below its cap of {most:g}; a larger gamma or a longer run uses more of it."
    return (
        f"total rank {total} of LoRA's {full} ({total / full:.0%}), budget {budget:.1f}; "
        f"adapters {size(whole)}, trimmed to these ranks {size(trimmed)}{advice}"
    )


def trimmed_bytes(lora_A: Tensor, lora_B: Tensor, rank: int) -> int:
    """Bytes of an adapter cut to a rank; ``lora_B`` has as many columns as its rank is now."""
    return (lora_A.numel() + lora_B.numel()) * lora_A.element_size() * rank // lora_B.shape[1]


def size(n_bytes: float) -> str:
    """
    >>> size(36864), size(5 * 2**20)
    ('36.0 KiB', '5.0 MiB')
    """
    return f"{n_bytes / 2**10:.1f} KiB" if n_bytes < 2**20 else f"{n_bytes / 2**20:.1f} MiB"


def _bar(share: float) -> str:
    filled = round(_BAR * share)
    return "█" * filled + "·" * (_BAR - filled)


def _text_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (HEADER, *rows)
    )
