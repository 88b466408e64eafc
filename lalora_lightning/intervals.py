"""Spread and confidence intervals of a few scores."""

import math
import statistics
from collections.abc import Sequence

__all__ = ["confidence", "deviation"]


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample of two or more values; NaN if one of them is NaN.

    >>> deviation([1.0, 2.0, 3.0]), deviation([1.0, math.nan])
    (1.0, nan)
    """
    # statistics.stdev raises an error for NaN.
    return math.nan if any(map(math.isnan, values)) else statistics.stdev(values)


def confidence(values: Sequence[float]) -> float:
    """Return half the width of the 95% confidence interval of the mean, by Student's t; 0 for a single value.

    >>> round(confidence([1.0, 2.0, 3.0]), 2)
    2.48
    """
    if len(values) < 2:
        return 0.0
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    freedom = len(values) - 1
    # Above 10 degrees of freedom, the first terms of the expansion around the normal quantile are accurate enough.
    z = 1.96
    t = quantiles[freedom - 1] if freedom <= 10 else z + (z**3 + z) / (4 * freedom) + 0.0233 * (11 / freedom) ** 2
    return t * deviation(values) / math.sqrt(len(values))
