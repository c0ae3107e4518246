"""How long each live request will still run, from the lengths of those that finished."""

from __future__ import annotations

import numpy as np

_KEPT = 4096  # lengths remembered
_UNSEEN = 1.0  # weight of the prior, in finished answers longer than the request's present length
_SHORTEST_SCALE = 32.0  # tokens: scale of the prior for a request that has just begun
_BLUR = 0.5  # relative: known limits are blurred by this much, as sequences do not advance at one pace
GRID = np.concatenate(([0.0], np.geomspace(4.0, 65536.0, 29)))


class RemainingLength:
    """Distribution of the output tokens a request still has to come.

    The empirical distribution of finished lengths beyond the present one, with one pseudo-observation from the
    prior P(R > x) = s / (s + x), s the tokens it has run so far (the longer it has run, the longer it will):
    what is known about a request that has outrun everything seen.
    """

    def __init__(self) -> None:
        self._finished = np.zeros(0)

    def observe(self, outputs: np.ndarray) -> None:
        """Output lengths of requests that ended, [any]; infinite where one was cut off at its limit."""
        if len(outputs):
            self._finished = np.sort(np.concatenate((self._finished, outputs)))
            if len(self._finished) > _KEPT:
                self._finished = self._finished[::2]

    def survival(self, outputs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """P(more than x tokens are still to come) for x on the grid, float64 [B, grid]; 0 from about `allowed` on."""
        scale = np.maximum(outputs, _SHORTEST_SCALE)[:, None]
        beyond = len(self._finished) - np.searchsorted(self._finished, outputs[:, None] + GRID, side="right")
        alive = beyond + _UNSEEN * scale / (scale + GRID)
        limit = (1 + _BLUR - GRID / allowed[:, None]) / (2 * _BLUR)
        return np.clip(limit, 0.0, 1.0) * alive / (beyond[:, :1] + _UNSEEN)

    def last_to_finish(self, outputs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """P(the request ends last of all that are live), float64 [B], sums to 1.

        Requests are taken to be independent and to advance at one pace.
        """
        alive = self.survival(outputs, allowed)
        ends = alive[:, :-1] - alive[:, 1:]
        done = np.maximum(1.0 - 0.5 * (alive[:, :-1] + alive[:, 1:]), 1e-12)
        log_done = np.log(done)
        last = (ends * np.exp(log_done.sum(0) - log_done)).sum(1) + 1e-12
        return last / last.sum()
