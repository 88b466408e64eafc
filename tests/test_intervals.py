"""Confidence intervals against scipy."""

import math

import pytest
from scipy.stats import t

from lalora_lightning.intervals import confidence


def test_intervals_agree_with_students_t():
    for n in (2, 3, 11, 12, 20, 100):
        values = [float(i) for i in range(n)]
        spread = math.sqrt(n * (n + 1) / 12)
        assert confidence(values) == pytest.approx(t.ppf(0.975, n - 1) * spread / math.sqrt(n), rel=2e-3)
    assert confidence([3.0]) == 0
