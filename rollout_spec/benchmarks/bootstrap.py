"""Confidence intervals of medians, by resampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def median_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile-bootstrap interval of the median of `values` (10,000 resamples, two-sided `level`)."""
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).choice(sample, (10_000, len(sample)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
