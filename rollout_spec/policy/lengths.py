"""How long each live request will still run, from the lengths of those that finished."""

from __future__ import annotations

import numpy as np

from rollout_spec.policy.compiled import delayed, ending_last, outlasting

_KEPT = 4096  # lengths remembered
_UNSEEN = 1.0  # weight of the prior, in finished answers longer than the request's present length
_SHORTEST_SCALE = 32.0  # tokens: scale of the prior for a request that has just begun
_BLUR = 0.5  # relative: known limits are blurred by this much, as sequences do not advance at one pace
_SHARP = 0.25  # tokens: blur of a limit where paces do not drift apart
_SQRT3 = 3**0.5  # half width of a uniform distribution, in standard deviations
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
        """P(more than x tokens are still to come) for x in `GRID` [X], float64 [B, X]; 0 from about `allowed` on."""
        return outlasting(self._finished, outputs, allowed, GRID, _BLUR, _SHORTEST_SCALE, _UNSEEN)

    def last_to_finish(self, outputs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """P(the request ends last of all that are live), float64 [B], sums to 1.

        Requests are taken to be independent and to advance at one pace.
        """
        return ending_last(self.survival(outputs, allowed))

    def delay(self, outputs: np.ndarray, allowed: np.ndarray, drift: float) -> float:
        """Tokens by which the end of the last request moves off if paces drift apart on the way.

        Requests that end far apart anyway lose nothing; those that would reach a limit together wait for the
        unluckiest of them.

        Args:
            drift: Standard deviation of the lead that one request has by then, in tokens, at least 0.
        """
        half = max(_SQRT3 * drift, 2 * _SHARP)
        found = delayed(self._finished, outputs, allowed, GRID, _SHARP, half, _SHORTEST_SCALE, _UNSEEN)
        return max(found, 0.0)
