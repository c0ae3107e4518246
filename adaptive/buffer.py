"""Episodes to train a drafter on: those of the policy in force and of the one before, as many as a byte budget holds."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import invalid


@dataclass(frozen=True)
class BufferStats:
    """A snapshot of a buffer.

    Attributes:
        episodes, tokens, nbytes: What it holds.
        versions: Policy versions of these, rising; at most two.
        added: Episodes ever taken in.
        evicted: Of these, thrown out for lack of room.
        outdated: Thrown out, or not taken in, because two newer policies had been seen.
        refused: Not taken in: larger than the whole budget, or shorter than all that is kept while there is no room.
    """

    episodes: int
    tokens: int
    nbytes: int
    versions: tuple[int, ...]
    added: int
    evicted: int
    outdated: int
    refused: int


@dataclass(order=True)
class _Kept:
    """Order of eviction: the older policy first, then the shorter episode, then the one that came earlier."""

    version: int
    length: int
    order: int
    episode: Episode = field(compare=False)


class EpisodeBuffer:
    """Bounded in bytes; safe to fill in one thread and to sample in another.

    Sampling is stratified by length: the episodes are ranked by their tokens and cut into `strata` of equal count;
    each draw takes a stratum and then an episode of it, uniformly. Stratum i (0 the shortest) is drawn with weight
    `tail ** i`, so that with `tail > 1` the long ones, whose decoding is what a drafter is to speed up, come most often.

    Args:
        budget_bytes: Of tokens and features.
        strata: How many.
        tail: Weight of a stratum over that of the next shorter one; 1 favours none.
        seed: Of the draws. The same episodes added in the same order give the same samples.
    """

    def __init__(self, budget_bytes: int, *, strata: int = 4, tail: float = 2.0, seed: int = 0) -> None:
        if budget_bytes < 1:
            raise invalid("budget_bytes", budget_bytes, "use an integer >= 1")
        if strata < 1:
            raise invalid("strata", strata, "use an integer >= 1")
        if not tail >= 1:
            raise invalid("tail", tail, "use a number >= 1; 1 favours no length")
        self.budget_bytes, self.strata, self.tail = budget_bytes, strata, tail
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []  # in order of eviction
        self._nbytes = 0
        self._current = self._previous = -1
        self._added = self._evicted = self._outdated = self._refused = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, episode: Episode) -> bool:
        """Take an episode in, evicting others if need be; whether it was taken.

        A version newer than all seen makes the newest so far the previous one, and older episodes go.
        """
        with self._lock:
            self._advance(episode.version)
            kept = _Kept(episode.version, len(episode.tokens), self._added, episode)
            if episode.version < self._previous:
                self._outdated += 1
                return False
            excess = self._nbytes + episode.nbytes - self.budget_bytes
            victims = 0
            while excess > 0 and victims < len(self._kept) and self._kept[victims] < kept:
                excess -= self._kept[victims].episode.nbytes
                victims += 1
            if excess > 0:
                self._refused += 1
                return False
            self._nbytes += episode.nbytes - sum(x.episode.nbytes for x in self._kept[:victims])
            self._evicted += victims
            del self._kept[:victims]
            insort(self._kept, kept)
            self._added += 1
            return True

    def advance(self, version: int) -> None:
        """The policy has version `version` now: what is older than the one before it goes."""
        with self._lock:
            self._advance(version)

    def sample(self, count: int) -> list[Episode]:
        """`count` episodes, with repetition; none if the buffer is empty."""
        with self._lock:
            if not self._kept:
                return []
            ranked = sorted(self._kept, key=lambda x: (x.length, x.order))
            bounds = np.linspace(0, len(ranked), min(self.strata, len(ranked)) + 1).round().astype(int)
            weights = self.tail ** np.arange(len(bounds) - 1)
            strata = self._rng.choice(len(weights), size=count, p=weights / weights.sum())
            low, high = bounds[strata], bounds[strata + 1]
            return [ranked[i].episode for i in (low + (self._rng.random(count) * (high - low)).astype(int))]

    def batches(self, tokens: int) -> Iterator[list[Episode]]:
        """Samples of about `tokens` tokens each, for ever; ends when the buffer is empty."""
        while True:
            batch, total = [], 0
            while total < tokens:
                drawn = self.sample(1)
                if not drawn:
                    return
                batch += drawn
                total += len(drawn[0].tokens)
            yield batch

    def episodes(self) -> list[Episode]:
        """All of them, in the order in which they came."""
        with self._lock:
            return [x.episode for x in sorted(self._kept, key=lambda x: x.order)]

    def stats(self) -> BufferStats:
        with self._lock:
            return BufferStats(
                episodes=len(self._kept),
                tokens=sum(x.length for x in self._kept),
                nbytes=self._nbytes,
                versions=tuple(sorted({x.version for x in self._kept})),
                added=self._added,
                evicted=self._evicted,
                outdated=self._outdated,
                refused=self._refused,
            )

    def _advance(self, version: int) -> None:
        if version <= self._current:
            if self._previous < version < self._current:
                self._drop_older(version)
            return
        self._drop_older(self._current)
        self._current = version

    def _drop_older(self, previous: int) -> None:
        """Nothing from before version `previous` is kept."""
        self._previous = previous
        outdated = sum(x.version < previous for x in self._kept)
        self._nbytes -= sum(x.episode.nbytes for x in self._kept[:outdated])
        self._outdated += outdated
        del self._kept[:outdated]
