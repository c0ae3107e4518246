"""Draft lengths for the next step."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class DraftLengthPolicy(Protocol):
    """Chooses, before every step, how far ahead to draft for each live sequence."""

    def draft_lengths(self, lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """Draft lengths `[B]` (0: decode plainly) from tokens known and tokens still allowed, `[B]` each.

        The engine caps them at `remaining - 1`: the pass itself always emits one token.
        """


class FixedDraftLength:
    """The same `K` for every sequence, while at most `largest_batch` of them are live (None: always).

    K = 0 turns speculation off.
    """

    def __init__(self, draft_length: int, largest_batch: int | None = None) -> None:
        self.draft_length, self.largest_batch = draft_length, largest_batch

    def draft_lengths(self, lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        on = self.largest_batch is None or len(lengths) <= self.largest_batch
        return np.full(len(lengths), self.draft_length if on else 0, np.int64)


class RandomDraftLength:
    """Off with probability `off`, else a `K` in 1..`longest` drawn per sequence: for proofs, not for speed."""

    def __init__(self, seed: int, longest: int = 8, off: float = 0.3) -> None:
        self._rng, self.longest, self.off = np.random.default_rng(seed), longest, off

    def draft_lengths(self, lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        if self._rng.random() < self.off:
            return np.zeros(len(lengths), np.int64)
        return self._rng.integers(1, self.longest + 1, len(lengths))
