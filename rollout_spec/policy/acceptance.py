"""How likely draft tokens are accepted: by drafter, by position in the block, and by request; learnt while decoding."""

from __future__ import annotations

import numpy as np

from rollout_spec.policy.compiled import MOST, survival

_PRIOR_TOKENS = 8.0  # weight of the prior, in draft tokens tried
_MEMORY = 4000.0  # draft tokens over which what was seen of a drafter loses weight 1/e
_REQUEST_PRIOR = 16.0  # tokens after which a request's own record weighs as much as the drafter's
_REQUEST_MEMORY = 96.0
_POSITION_PRIOR = 32.0  # tokens tried at a position after which it weighs as much as the drafter's mean


class AcceptanceTracker:
    """Acceptance of one drafter: P(draft token j is accepted | those before it were).

    All counts are discounted, so that it follows a policy that drifts.

    Args:
        longest: Draft positions to track.
        capacity: Slots that exist (grows on demand).
        prior: Acceptance expected before anything was seen.
    """

    def __init__(self, longest: int, *, prior: float = 0.8, capacity: int = 64) -> None:
        self.longest, self._prior = longest, prior
        self._tried = np.zeros(longest)
        self._accepted = np.zeros(longest)
        self._request = np.zeros((capacity, 2))  # tried, accepted
        self._rejection = np.full(longest, 1 - prior)
        self._refresh()

    @property
    def tried(self) -> float:
        """Discounted number of draft tokens tried."""
        return float(self._tried.sum())

    @property
    def mean(self) -> float:
        """Acceptance per draft token tried."""
        return self._mean

    def survival(self, slots: np.ndarray) -> np.ndarray:
        """P(draft tokens 1..j of a sequence are all accepted), float64 [B, longest], falling in j."""
        return survival(self._request, slots, self._rejection, self._expected, _REQUEST_PRIOR)

    def observe(self, slots: np.ndarray, lengths: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from verified drafts.

        Args:
            slots: int64 [B].
            lengths: Draft tokens proposed, int64 [B]; sequences with 0 teach nothing.
            accepted: Draft tokens accepted, int64 [B], at most `lengths`.
        """
        self._grow(slots)
        tried = np.minimum(accepted + 1, lengths)
        total = tried.sum()
        if not total:
            return
        forget = np.exp(-total / _MEMORY)
        reached = np.bincount(tried, minlength=self.longest + 1)[1 : self.longest + 1]
        passed = np.bincount(accepted, minlength=self.longest + 1)[1 : self.longest + 1]
        self._tried = forget * self._tried + reached[::-1].cumsum()[::-1]
        self._accepted = forget * self._accepted + passed[::-1].cumsum()[::-1]
        request = self._request[slots] * np.exp(-tried / _REQUEST_MEMORY)[:, None]
        self._request[slots] = request + np.stack((tried, accepted), 1)
        self._refresh()

    def discount(self, share: float) -> None:
        """Keep `share` of the weight of everything seen (the policy was updated)."""
        self._tried *= share
        self._accepted *= share
        self._request *= share
        self._refresh()

    def forget(self, slots: np.ndarray) -> None:
        """The sequences in these slots are gone."""
        self._grow(slots)
        self._request[slots] = 0.0

    def _refresh(self) -> None:
        tried, accepted = self._tried.sum(), self._accepted.sum()
        self._mean = (accepted + _PRIOR_TOKENS * self._prior) / (tried + _PRIOR_TOKENS)
        pooled = 1.0 - self._mean
        rejected = self._tried - self._accepted
        self._rejection = (rejected + _POSITION_PRIOR * pooled) / (self._tried + _POSITION_PRIOR)
        self._expected = max(float(pooled), 1 - MOST)

    def _grow(self, slots: np.ndarray) -> None:
        if len(slots) and (most := int(slots.max())) >= len(self._request):
            self._request = np.pad(self._request, ((0, most + 1), (0, 0)))
