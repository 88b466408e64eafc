"""Output of the recipes: numbers with their spread, and hiding messages of libraries."""

import logging
import statistics
import warnings
from collections.abc import Sequence

from lalora_lightning.intervals import deviation

__all__ = ["mean_and_spread", "quiet"]


def mean_and_spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Return ``mean +- standard deviation``, or the number if there is only one.

    >>> mean_and_spread([1.0, 2.0, 3.0]), mean_and_spread([2.0])
    ('2.0 +- 1.0', '2.0')
    """
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} +- {deviation(numbers):.{digits}f}"


def quiet() -> None:
    """Hide messages about hardware, tips, retries and small data sets, but no other warnings."""
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
