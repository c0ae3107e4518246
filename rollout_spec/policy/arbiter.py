"""Chooses between ways to decode: a bucketed bandit whose prior is what the cost model predicts.

An arm's value in a bucket of batch sizes is the predicted gain times a learnt correction: how much more or less
than predicted this arm has really yielded, pooled over buckets and then per bucket. Acceptance and step times are
learnt elsewhere and shared by all buckets; the correction holds only what they miss. An arm that is not the best
is tried when its optimistic value beats the best, and only out of a budget that is charged with what trials have
really cost: exploration stays below a stated share of the time, plus one trial per debt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_PRIOR = 8.0  # passes (in units of gain) after which what was seen weighs as much as the prediction
_MEMORY = 400.0  # passes of an arm over which what was seen loses weight 1/e
_SPREAD = 0.5  # how wrong a prediction may be (standard deviation of the log), for optimism
_BUCKET_SPREAD = 0.15  # and by how much more one bucket differs from another
_SAVINGS = 2.0  # plain passes that the budget may save up: most that tries can lose in a short rollout
_LEAST_LOSS = 0.02  # of a plain pass: no trial counts as free
_CLIP = 8.0  # one pass may not say more than this factor


class _Record:
    """Discounted sums of gains seen and gains predicted; their ratio is unbiased where a mean of logs is not."""

    __slots__ = ("predicted", "seen")

    def __init__(self) -> None:
        self.predicted = self.seen = 0.0

    def add(self, predicted: float, seen: float) -> None:
        self.predicted = self.predicted * (1 - 1 / _MEMORY) + predicted
        self.seen = self.seen * (1 - 1 / _MEMORY) + seen

    def ratio(self, prior: float) -> float:
        """Seen over predicted, drawn towards `prior` while little was seen."""
        return (self.seen + _PRIOR * prior) / (self.predicted + _PRIOR)

    def discount(self, share: float) -> None:
        self.predicted, self.seen = self.predicted * share, self.seen * share


class Arbiter:
    """A bandit over named arms, by batch bucket.

    Args:
        arms: At least two names; the first is plain decoding, whose value is 1 by definition.
        explore_share: Largest share of the time that exploration may cost.
        buckets: Number of batch buckets; bucket b holds 2^b <= B < 2^(b + 1).
    """

    def __init__(self, arms: Sequence[str], *, explore_share: float = 0.002, buckets: int = 12) -> None:
        if len(set(arms)) < 2:
            raise ValueError(
                f"arms={list(arms)!r}: a bandit needs at least two different arms, or it never explores; "
                "add one, or decode without an arbiter"
            )
        self.arms = tuple(arms)
        self.explore_share, self._buckets = explore_share, buckets
        self._pooled = {arm: _Record() for arm in arms}
        self._bucket = {arm: [_Record() for _ in range(buckets)] for arm in arms}
        self._budget = 0.0

    def add(self, arm: str) -> None:
        """One more arm, or another in its place, of which nothing was seen."""
        self.arms = tuple(dict.fromkeys((*self.arms, arm)))
        self._pooled[arm], self._bucket[arm] = _Record(), [_Record() for _ in range(self._buckets)]

    def correction(self, arm: str, batch: int) -> float:
        """Learnt factor on the predicted gain of `arm` at this batch size."""
        return self._bucket[arm][self._index(batch)].ratio(self._pooled[arm].ratio(1.0))

    def explore(
        self, gains: dict[str, float], best: str, batch: int, seconds: float, passes: int = 1
    ) -> str | None:
        """An arm to try instead of `best` in this pass, or None; `charge` what it has cost.

        Args:
            gains: Value of every arm on offer, already corrected (speed over plain decoding).
            best: The arm that would be played.
            batch: Live sequences.
            seconds: Time of a plain pass, to turn a predicted loss into seconds.
            passes: Passes since this was asked last, which the budget grows with.
        """
        self._budget = min(self._budget + self.explore_share * seconds * passes, _SAVINGS * seconds)
        for arm, gain in gains.items():
            if arm in (best, self.arms[0]) or gain <= 0:
                continue
            loss = seconds * max(gains[best] / gain - 1, _LEAST_LOSS)
            if loss <= self._budget and gain * self._optimism(arm, batch) > gains[best]:
                return arm
        return None

    def charge(self, seconds: float) -> None:
        """A trial was made and has lost this much time (below 0: won); the budget may run into debt by it."""
        if math.isfinite(seconds):
            self._budget -= seconds

    def observe(self, arm: str, batch: int, predicted: float, seen: float) -> None:
        """Learn from one pass: its predicted (uncorrected) gain, and what it yielded."""
        if not (predicted > 0 and seen > 0 and math.isfinite(predicted) and math.isfinite(seen)):
            return
        seen = min(max(seen, predicted / _CLIP), predicted * _CLIP)
        self._pooled[arm].add(predicted, seen)
        self._bucket[arm][self._index(batch)].add(predicted, seen)

    def discount(self, share: float) -> None:
        """Keep `share` of the weight of everything seen (the policy was updated)."""
        for record in (*self._pooled.values(), *(r for records in self._bucket.values() for r in records)):
            record.discount(share)

    def fade(self, best: str, share: float) -> None:
        """Keep `share` of the weight of what was seen of all arms but the one that is played."""
        for arm in self.arms:
            if arm != best:
                for record in (self._pooled[arm], *self._bucket[arm]):
                    record.discount(share)

    def _optimism(self, arm: str, batch: int) -> float:
        """Factor by which an arm may be better than is known."""
        here = _BUCKET_SPREAD**2 / (1 + self._bucket[arm][self._index(batch)].predicted / _PRIOR)
        anywhere = _SPREAD**2 / (1 + self._pooled[arm].predicted / _PRIOR)
        return math.exp(math.sqrt(here + anywhere))

    def _index(self, batch: int) -> int:
        return min(batch.bit_length(), self._buckets) - 1
