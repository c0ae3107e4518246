"""Drafting until in doubt: a drafter that chose narrowly is accepted less often, and what follows a rejection is lost.

What a pass drafts is fixed before it; how sure the drafter was of a token is known once it is drafted. `Leads` learns how
often tokens are accepted by how sure the drafter was of them. With that, `UntilInDoubt` takes one more token wherever

    w_i * P(all so far accepted) * P(the next accepted)  >  gain / t(B) * seconds of that token,

the rule by which the draft lengths were chosen (`compiled.deepest`), with what is known by then. A drafting step reads the
drafter's weights for all sequences at once, so it must be worth its time to those that go on together. A row to verify
costs the more, the more there are: up to the lengths that were chosen it is priced by what all of those cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Upper ends of classes of leads, in nats.
_ENDS = np.array((0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), np.float32)
_PRIOR_TOKENS = 2.0  # weight of the mean in a class, in tokens tried
_MEMORY = 4000.0


class Leads:
    """Acceptance of one drafter by its lead: P(a draft token is accepted | those before it were, its lead).

    What a lead is worth changes little when the policy does, so an update takes nothing away from what was seen.

    Args:
        memory: Tokens over which what was seen loses weight 1/e.
    """

    def __init__(self, memory: float = _MEMORY) -> None:
        self._memory = memory
        self._tried, self._accepted = np.zeros((2, len(_ENDS) + 1))

    @property
    def shares(self) -> np.ndarray:
        """How many of the tokens tried were in each class of leads, float64 [13], of 1; NaN before the first."""
        return self._tried / self._tried.sum()

    def acceptance(self, mean: float) -> np.ndarray:
        """By class of leads, float64 [13]; `mean` where little was seen."""
        return (self._accepted + _PRIOR_TOKENS * mean) / (self._tried + _PRIOR_TOKENS)

    def observe(self, leads: np.ndarray, lengths: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from verified drafts.

        Args:
            leads: Of the tokens, float [B, K].
            lengths: Tokens verified, int64 [B], at most K.
            accepted: int64 [B], at most `lengths`.
        """
        depth = np.arange(leads.shape[1])
        tried = depth < np.minimum(accepted + 1, lengths)[:, None]
        right = depth < accepted[:, None]
        kept = np.exp(-np.count_nonzero(tried) / self._memory)
        classes, count = classes_of(leads), len(self._tried)
        self._tried = kept * self._tried + np.bincount(classes[tried], minlength=count)
        self._accepted = kept * self._accepted + np.bincount(classes[tried & right], minlength=count)


def classes_of(leads: np.ndarray) -> np.ndarray:
    """Which class a lead belongs to; the least sure one if it is NaN."""
    return np.searchsorted(_ENDS, np.nan_to_num(leads, nan=0.0))


class UntilInDoubt:
    """A `Stop` for one pass. Every sequence keeps the first token drafted; each further one must have been worth it.

    Args:
        alive: P(what history drafts ahead is accepted), float64 [B]; it is used up.
        following: P(a token is accepted), of which nothing else is known, float64 [B].
        weights: What a token of each sequence is worth, float64 [B].
        limits: Most tokens drafted, int64 [B], falling.
        planned: Tokens drafted if nothing were known but their usual acceptance, int64 [B], at most `limits`.
        acceptance: By class of leads, see `Leads`.
        rows: What one more token of one sequence costs wherever it is drafted, in worth: as far as planned, and beyond.
        step: What a drafting step over so many sequences costs besides, in worth.
    """

    def __init__(
        self,
        alive: np.ndarray,
        following: np.ndarray,
        weights: np.ndarray,
        limits: np.ndarray,
        planned: np.ndarray,
        acceptance: np.ndarray,
        rows: tuple[float, float],
        step: Callable[[int], float],
    ) -> None:
        self._alive, self._following, self._weights, self._limits = alive, following, weights, limits
        self._planned, self._acceptance, self._rows, self._step = planned, acceptance, rows, step
        self._going = limits > 0
        self._steps = 0
        self.lengths = np.zeros(len(limits), np.int64)

    def more(self, leads: np.ndarray) -> bool:
        count = len(leads)
        going, alive = self._going[:count], self._alive[:count]
        self._steps += 1
        self.lengths[:count] += going
        alive *= self._acceptance[classes_of(leads)]
        worth = self._weights[:count] * alive * self._following[:count]
        worth -= np.where(self._planned[:count] > self._steps, *self._rows)
        going &= (self._limits[:count] > self._steps) & (worth > 0)
        drafting = int(np.count_nonzero(self._limits > self._steps))  # the step runs for all that might
        return bool(going.any() and worth[going].sum() > self._step(drafting))

    def take(self, index: np.ndarray, limits: np.ndarray) -> UntilInDoubt:
        alive, following, weights = (x[index] for x in (self._alive, self._following, self._weights))
        planned, known = np.minimum(self._planned[index], limits), (self._acceptance, self._rows, self._step)
        return UntilInDoubt(alive, following, weights, limits, planned, *known)
