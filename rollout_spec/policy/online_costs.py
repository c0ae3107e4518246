"""Calibrated costs, corrected by the passes that are run."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from rollout_spec.policy.compiled import Prices, catching_up, corrections, seconds, uncorrected
from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost
from rollout_spec.policy.records import PLAIN

_STEP = 0.08  # weight of one pass in the correction
_MISSED = 4  # what was not seen for this many passes is known less well: the next pass counts for as many
_RECENT = 3  # the median of so many passes counts: machines hiccup


class _Correction:
    """Factor on a kind of pass, per power of two of its rows; where nothing was seen, the mean of what was.

    Attributes:
        prices: Of this kind of pass, corrected.
        mean: Of the logarithms of what was seen; None before the first pass.
        last: By bucket: when a pass of it was seen last; None: never.
        seen: By bucket: passes seen.
    """

    def __init__(self, cost: PassCost) -> None:
        self.prices = uncorrected(cost.terms)
        self._factors = corrections(self.prices)
        buckets = len(self._factors)
        self.mean: float | None = None
        self.last: list[int | None] = [None] * buckets
        self.seen = [0] * buckets
        self._logs = [0.0] * buckets
        self._recent: list[deque[float]] = [deque(maxlen=_RECENT) for _ in range(buckets)]

    def add(self, rows: int, log_ratio: float, now: int) -> None:
        bucket = rows.bit_length()
        recent, last = self._recent[bucket], self.last[bucket]
        recent.append(log_ratio)
        self.seen[bucket] += 1
        usual = sorted(recent)[(len(recent) - 1) // 2]
        if last is None or self.seen[bucket] <= _RECENT:
            self._logs[bucket] = usual
        else:
            step = max(1 / self.seen[bucket], 1 - (1 - _STEP) ** min(now - last, _MISSED))
            self._logs[bucket] += step * (usual - self._logs[bucket])
        self.last[bucket] = now
        self._spread()

    def fade(self, mean: float, share: float, until: int) -> None:
        """Of what was last seen in that pass or before it, keep `share` of the distance to `mean`."""
        for bucket, last in enumerate(self.last):
            if last is not None and last <= until:
                self._logs[bucket] = mean + share * (self._logs[bucket] - mean)
        if self.mean is not None:
            self._spread()

    def _spread(self) -> None:
        """Where nothing was seen, the mean of what was is expected."""
        known = [log for log, when in zip(self._logs, self.last, strict=True) if when is not None]
        self.mean = sum(known) / len(known)
        self.expect(self.mean)

    def expect(self, mean: float) -> None:
        """Let `mean` stand for what was not seen."""
        logs = [mean if when is None else log for log, when in zip(self._logs, self.last, strict=True)]
        self._factors[:] = np.exp(logs)


class OnlineCosts:
    """A cost model and what the run itself has shown of its errors.

    Plain passes and verify passes are corrected apart: what they are compared for must not leak from one to the
    other. A kind of pass that was never seen is taken to be wrong by as much as plain passes are: a machine that is
    slower today is slower for all.

    Attributes:
        model: As calibrated.
        plain_prices: Of plain passes.
        prices: Of the other kinds, by name; `target` stands for verify passes.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._target = model.passes[TARGET]
        self._plain = _Correction(self._target)
        self._corrections = {kind: _Correction(cost) for kind, cost in model.passes.items()} | {
            PLAIN: self._plain
        }
        self.plain_prices = self._plain.prices
        self.prices: dict[str, Prices] = {kind: self._corrections[kind].prices for kind in model.passes}
        self._passes = 0
        self._faded = 0  # in which of these it was last called to fade

    def add(self, drafter: str, cost: PassCost) -> None:
        """Costs of one more drafter."""
        self.model = CostModel({**self.model.passes, drafter: cost})
        correction = self._corrections[drafter] = _Correction(cost)
        self.prices[drafter] = correction.prices
        if self._plain.mean is not None:
            correction.expect(self._plain.mean)

    def fade(self, share: float) -> None:
        """Believe less of what drafting and verifying cost when they were last seen, if not since the last call.

        The first passes of a kind meet cold caches and new memory. What looked dear then is not run again, so no later
        pass would correct it.
        """
        if self._plain.mean is None:
            return
        for kind, correction in self._corrections.items():
            if kind != PLAIN:
                correction.fade(self._plain.mean, share, self._faded)
        self._faded = self._passes

    def target(self, batch: int, rows: int, kv_tokens: int) -> float:
        """Seconds of a target pass with everything around it, see `CostModel.target`."""
        return seconds(self.plain_prices if rows == batch else self.prices[TARGET], batch, rows, kv_tokens)

    def plain_age(self, batch: int) -> tuple[int, int]:
        """Plain passes seen with about `batch` sequences, and passes of any kind since the last of them."""
        last = self._plain.last[batch.bit_length()]
        return self._plain.seen[batch.bit_length()], self._passes - (last or 0)

    def draft(self, drafter: str, batch: int, kv_tokens: int) -> float:
        """Seconds of one drafter step over `batch` sequences."""
        return seconds(self.prices[drafter], batch, batch, kv_tokens)

    def observe_target(self, batch: int, rows: int, kv_tokens: int, seconds: float) -> None:
        """A target pass was run, plain (`rows == batch`) or to verify."""
        self._passes += 1
        kind = PLAIN if rows == batch else TARGET
        self._observe(kind, rows, self._target.seconds(batch, rows, kv_tokens), seconds)

    def observe_drafting(
        self, drafter: str, kv_tokens: int, own: np.ndarray, before: np.ndarray, seconds: float
    ) -> None:
        """A drafter drafted `own [B]` tokens behind `before [B]` of history, in `seconds` altogether."""
        batch, cost = len(own), self.model.passes[drafter]
        drafting = int((own > 0).sum())
        expected = catching_up(self.prices[drafter], batch, int(before[own > 0].sum()))
        for depth in range(int(own.max())):
            active = int((own > depth).sum())
            expected += cost.seconds(active, active, kv_tokens * active // batch)
        self._observe(drafter, drafting, expected, seconds)

    def _observe(self, kind: str, rows: int, expected: float, seconds: float) -> None:
        if not (expected > 0 and seconds > 0 and math.isfinite(seconds / expected)):
            return
        self._corrections[kind].add(rows, math.log(seconds / expected), self._passes)
        if self._plain.mean is not None:
            for correction in self._corrections.values():
                if correction.mean is None:
                    correction.expect(self._plain.mean)
