"""What the recipes print: tables, and no advertisements."""

import logging
import statistics
import warnings
from collections.abc import Sequence

from lalora_lightning.plotting import deviation


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text columns; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def mean_and_spread(numbers: Sequence[float], digits: int = 1) -> str:
    """``mean``, with more than one number ``mean +- standard deviation``."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} +- {deviation(numbers):.{digits}f}"


def quiet() -> None:
    """Silence remarks on hardware, tips, retries and small data; warnings of substance stay."""
    for library in ("lightning.pytorch", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for remark in (
        "does not have many workers",
        "The number of training batches",
        "Checkpoint directory",
        "have no `val_dataloader`",
        "LeafSpec",
    ):
        warnings.filterwarnings("ignore", f".*{remark}.*")
