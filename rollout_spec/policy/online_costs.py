"""Calibrated costs, corrected by the passes that are run."""

from __future__ import annotations

import math

import numpy as np

from rollout_spec.policy.cost_model import TARGET, CostModel

_STEP = 0.08  # weight of one pass in the correction
_CLIP = math.log(2.0)  # one pass may not say more than this: machines hiccup
_BUCKETS = 20


class _Correction:
    """Factor on a kind of pass, per power of two of its rows; where nothing was seen, the mean of what was."""

    def __init__(self) -> None:
        self.factors = [1.0] * _BUCKETS
        self._logs: list[float | None] = [None] * _BUCKETS

    def add(self, rows: int, log_ratio: float) -> None:
        bucket = rows.bit_length()
        old = self._logs[bucket]
        clipped = min(max(log_ratio - (old or 0.0), -_CLIP), _CLIP)
        self._logs[bucket] = (old or 0.0) + (clipped if old is None else _STEP * clipped)
        known = [log for log in self._logs if log is not None]
        mean = sum(known) / len(known)
        self.factors = [math.exp(mean if log is None else log) for log in self._logs]


class OnlineCosts:
    """A cost model and what the run itself has shown of its errors.

    Attributes:
        model: As calibrated.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._corrections = {kind: _Correction() for kind in model.passes}
        self._target, self._target_correction = model.passes[TARGET], self._corrections[TARGET]

    def target(self, batch: int, rows: int, kv_tokens: int) -> float:
        """Seconds of a target pass with everything around it, see `CostModel.target`."""
        return (
            self._target.seconds(batch, rows, kv_tokens) * self._target_correction.factors[rows.bit_length()]
        )

    def draft(self, drafter: str, batch: int, kv_tokens: int) -> float:
        """Seconds of one drafter step over `batch` sequences."""
        cost, correction = self.model.passes[drafter], self._corrections[drafter]
        return cost.seconds(batch, batch, kv_tokens) * correction.factors[batch.bit_length()]

    def catching_up(self, drafter: str, batch: int, rows: int) -> float:
        """Seconds that a drafter's first step takes longer because it reads `rows` tokens of history too."""
        cost = self.model.passes[drafter]
        return cost.seconds(batch, batch + rows, 0) - cost.seconds(batch, batch, 0)

    def drafting(self, drafter: str, kv_tokens: int, own: np.ndarray, before: np.ndarray) -> float:
        """Uncorrected seconds of drafting `own [B]` tokens behind `before [B]` of history."""
        batch, cost = len(own), self.model.passes[drafter]
        seconds = self.catching_up(drafter, batch, int(before[own > 0].sum()))
        for depth in range(int(own.max())):
            active = int((own > depth).sum())
            seconds += cost.seconds(active, active, kv_tokens * active // batch)
        return seconds

    def observe(self, kind: str, rows: int, expected: float, seconds: float) -> None:
        """A pass (for a drafter: all its steps of one round) that was expected to take, uncorrected, `expected`."""
        if expected > 0 and seconds > 0 and math.isfinite(seconds / expected):
            self._corrections[kind].add(rows, math.log(seconds / expected))
