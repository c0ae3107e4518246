"""Candidate plans for one pass: for each way to draft, how far ahead for every sequence, and what it gains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rollout_spec.policy.records import HISTORY, StepState

if TYPE_CHECKING:
    from rollout_spec.policy.automatic import AutomaticPolicy

_MOST = 0.999  # nothing is certain


@dataclass(frozen=True)
class Candidate:
    """What one arm could do in a pass. Only its gain is needed to compare it; the rest is worked out when asked for.

    Attributes:
        drafter: Who drafts behind history, or None.
        before: Tokens of history ahead of those that `alive` is about, int64 [B].
        certain: Tokens expected of them, float64 [B].
        alive: P(tokens 1..j accepted), 0 for those not on offer, float64 [B, longest].
        offered: Which are on offer, bool [B, longest], a beginning of each row; None: all.
        depth: Of these, tokens from here on are not drafted.
        gain: Predicted speed over plain decoding.
        seconds: Predicted time of the pass.
    """

    drafter: str | None
    before: np.ndarray
    certain: np.ndarray
    alive: np.ndarray
    offered: np.ndarray | None
    depth: int
    gain: float
    seconds: float

    @cached_property
    def draft_lengths(self) -> np.ndarray:
        """int64 [B]."""
        if self.offered is None:
            return self.before + self.depth
        return self.before + self.offered[:, : self.depth].sum(1)

    @property
    def from_history(self) -> np.ndarray:
        """How many of these are history's, the first, int64 [B]."""
        return self.draft_lengths if self.drafter is None else self.before

    @property
    def tokens(self) -> np.ndarray:
        """Tokens expected of each sequence, the target's own included, float64 [B]."""
        return 1.0 + self.certain + self.alive[:, : self.depth].sum(1)

    @property
    def square(self) -> float:
        """Mean square of the tokens of a sequence, those of history ahead left out."""
        ahead = 2 * np.arange(1, self.depth + 1) + 1
        return 1.0 + float((self.alive[:, : self.depth] @ ahead).mean())


class Round:
    """Evaluates candidates for one pass."""

    def __init__(
        self,
        policy: AutomaticPolicy,
        state: StepState,
        weights: np.ndarray,
        room: np.ndarray,
        context: int,
        plain_seconds: float,
    ) -> None:
        self.policy, self.state, self.weights, self.room = policy, state, weights, room
        self.batch, self.context, self.plain_seconds = len(weights), context, plain_seconds
        self.zeros = np.zeros(self.batch, np.int64)

    def candidate(self, arm: str) -> Candidate:
        """The best plan of one arm: history, a drafter with weights, or one behind the other."""
        if arm == HISTORY:
            return self._history
        return self._drafted(arm, arm.removeprefix(f"{HISTORY}+"))

    @cached_property
    def _history(self) -> Candidate:
        """History alone: no cost but the rows to verify."""
        matches = self.state.matches
        assert matches is not None
        confidence = np.minimum(matches.confidence, _MOST)
        alive = confidence.repeat(len(self.policy.depth)).reshape(self.batch, -1).cumprod(1)
        return self._best(alive, np.minimum(matches.lengths, self.room), None, self.zeros, self.zeros)

    def _drafted(self, arm: str, name: str) -> Candidate:
        """A drafter with weights, behind what history proposes if the arm says so."""
        alive = self.policy.acceptance[name].survival(self.state.slots)
        if arm == name:
            return self._best(alive, self.room, name, self.zeros, self.zeros)
        before, matches = self._history.draft_lengths, self.state.matches
        assert matches is not None
        confidence = np.minimum(matches.confidence, _MOST)
        reached = confidence**before
        certain = np.where(before > 0, confidence * (1 - reached) / (1 - confidence), 0.0)
        return self._best(alive * reached[:, None], self.room - before, name, before, certain)

    def _best(
        self,
        alive: np.ndarray,
        limit: np.ndarray,
        drafter: str | None,
        before: np.ndarray,
        certain: np.ndarray,
    ) -> Candidate:
        """The draft lengths of the largest gain, at least one token somewhere.

        A token is on offer if it is worth what it costs by itself, at the gain the arm had last (Dinkelbach's
        iteration for a ratio, one round per pass); of these, the depth is taken that makes the gain largest.

        Args:
            alive: P(tokens 1..j accepted), float64 [B, longest], falling in j.
            limit: Most tokens per sequence, int64 [B].
            drafter: Who drafts them, or None where drafting is free.
            before: Tokens drafted ahead of these, int64 [B].
            certain: Tokens expected of those, float64 [B].
        """
        active = [self.batch] * len(self.policy.depth)
        offered: np.ndarray | None = None
        if limit.min() < len(active):
            offered = self.policy.depth <= limit[:, None]
            alive = alive * offered
        if self.policy.ragged and self.batch > 1:
            price = self._price(drafter) * self.policy.last_gain / self.plain_seconds
            worthy = alive > (price / self.weights)[:, None]
            if worthy[:, 0].any():  # else those behind are not either
                offered = worthy
                alive = alive * worthy
        if offered is not None:
            active = offered.sum(0).tolist()
        worth = 1.0 if certain is self.zeros else 1.0 + float(self.weights @ certain)
        depth, gain, seconds = self._deepest((self.weights @ alive).tolist(), active, drafter, before, worth)
        return Candidate(drafter, before, certain, alive, offered, depth, gain, seconds)

    def _price(self, drafter: str | None) -> float:
        """Seconds that one more token of one sequence costs: a row to verify, a sequence in a draft step.

        Never below 0, though measured passes may say so: what is not on offer must not look worth it.
        """
        price = self._row_price
        if drafter is not None:
            costs, batch, context = self.policy.costs, self.batch, self.context
            half = max(batch // 2, 1)
            price += (
                costs.draft(drafter, batch, context) - costs.draft(drafter, half, context * half // batch)
            ) / max(batch - half, 1)
        return max(price, 0.0)

    @cached_property
    def _row_price(self) -> float:
        costs, batch, context = self.policy.costs, self.batch, self.context
        return (costs.target(batch, 4 * batch, context) - costs.target(batch, 2 * batch, context)) / (
            2 * batch
        )

    def _deepest(
        self, gains: list[float], active: list[int], drafter: str | None, before: np.ndarray, worth: float
    ) -> tuple[int, float, float]:
        """The depth to stop at, at least 1, its gain and its time.

        `gains` is what the tokens of each depth are worth together, `active` how many sequences draft there.
        """
        costs, batch, context = self.policy.costs, self.batch, self.context
        history = int(before.sum())
        rows, share = batch + history, context / batch
        drafting = self.policy.deciding
        if drafter is not None and history:
            drafting += costs.catching_up(drafter, batch, history)
        best, step, stepped = (0, 0.0, math.inf), 0.0, 0  # `step`: seconds of one of `stepped` sequences
        for depth, (value, count) in enumerate(zip(gains, active, strict=True), 1):
            if not count:
                break
            worth += value
            rows += count
            if drafter is not None and count != stepped:
                step, stepped = costs.draft(drafter, count, int(share * count)), count
            drafting += step
            seconds = drafting + costs.target(batch, rows, context)
            gain = worth * self.plain_seconds / seconds
            if gain > best[1]:
                best = (depth, gain, seconds)
            elif depth > best[0] + 1:
                break
        return best
