"""Paired timing: two ways of doing the same work take turns, and only the ratios of neighbours count.

Machines are noisy and drift; a ratio of two runs a moment apart is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paired:
    """Ratios `baseline / candidate` of paired runs: above 1 the candidate is faster.

    Attributes:
        ratios: One per pair, in order of measurement.
        baseline_seconds, candidate_seconds: Median time of each side (noisy; for orientation).
    """

    ratios: tuple[float, ...]
    baseline_seconds: float
    candidate_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio."""
        return min(self.ratios), max(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        low, high = self.spread
        return {
            "median_ratio": round(self.median, 4),
            "min_ratio": round(low, 4),
            "max_ratio": round(high, 4),
            "pairs": len(self.ratios),
            "baseline_seconds": round(self.baseline_seconds, 4),
            "candidate_seconds": round(self.candidate_seconds, 4),
        }


def paired(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    pairs: int,
) -> Paired:
    """Time `pairs` pairs, in the order A B, B A, A B, ..., after one uncounted run of each.

    Args:
        baseline: Run once per pair.
        candidate: Run once per pair, on the same work.
        pairs: Number of pairs.
    """
    sides = (baseline, candidate)
    for side in sides:
        side()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for turn in (0, 1) if pair % 2 == 0 else (1, 0):
            start = time.perf_counter()
            sides[turn]()
            seconds[turn].append(time.perf_counter() - start)
    ratios = tuple(a / b for a, b in zip(*seconds, strict=True))
    return Paired(ratios, statistics.median(seconds[0]), statistics.median(seconds[1]))
