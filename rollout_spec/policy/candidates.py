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
    """What one arm could do in a pass.

    Attributes:
        drafter: Who drafts behind history, or None.
        draft_lengths: int64 [B].
        from_history: How many of these are history's, the first, int64 [B].
        tokens: Tokens expected of each sequence, the target's own included, float64 [B].
        square: Mean square of the tokens of a sequence.
        gain: Predicted speed over plain decoding.
        seconds: Predicted time of the pass.
    """

    drafter: str | None
    draft_lengths: np.ndarray
    from_history: np.ndarray
    tokens: np.ndarray
    square: float
    gain: float
    seconds: float


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
        limit = np.minimum(matches.lengths, self.room)
        alive = np.minimum(matches.confidence, _MOST)[:, None] ** self.policy.depth
        lengths, tokens, square, gain, seconds = self._best(alive, limit, None, self.zeros, 1.0)
        return Candidate(None, lengths, lengths, tokens, square, gain, seconds)

    def _drafted(self, arm: str, name: str) -> Candidate:
        """A drafter with weights, behind what history proposes if the arm says so."""
        alive = self.policy.acceptance[name].survival(self.state.slots)
        if arm == name:
            lengths, tokens, square, gain, seconds = self._best(alive, self.room, name, self.zeros, 1.0)
            return Candidate(name, lengths, self.zeros, tokens, square, gain, seconds)
        before, matches = self._history.draft_lengths, self.state.matches
        assert matches is not None
        confidence = np.minimum(matches.confidence, _MOST)
        reached = confidence**before
        certain = np.where(before > 0, confidence * (1 - reached) / (1 - confidence), 0.0)
        worth = 1.0 + float(self.weights @ certain)
        own, tokens, square, gain, seconds = self._best(
            alive * reached[:, None], self.room - before, name, before, worth
        )
        return Candidate(name, before + own, before, tokens + certain, square, gain, seconds)

    def _best(
        self, alive: np.ndarray, limit: np.ndarray, drafter: str | None, before: np.ndarray, worth: float
    ) -> tuple[np.ndarray, np.ndarray, float, float, float]:
        """Draft lengths of the largest gain, at least one token somewhere, what to expect, and the time of the pass.

        A token is on offer if it is worth what it costs by itself, at the gain the arm had last (Dinkelbach's
        iteration for a ratio, one round per pass); of these, the depth is taken that makes the gain largest.

        Args:
            alive: P(tokens 1..j accepted), float64 [B, longest], falling in j.
            limit: Most tokens per sequence, int64 [B].
            drafter: Who drafts them, or None where drafting is free.
            before: Tokens drafted ahead of these, int64 [B].
            worth: Value of the pass without these tokens.

        Returns:
            The lengths, int64 [B]; tokens expected of them and the target's own, float64 [B]; gain; seconds.
        """
        active = [self.batch] * len(self.policy.depth)
        kept: np.ndarray | None = None
        if limit.min() < len(active):
            kept = self.policy.depth <= limit[:, None]
        if self.policy.ragged and self.batch > 1:
            price = self._price(drafter) * self.policy.last_gain / self.plain_seconds
            worthy = alive > (price / self.weights)[:, None]
            if worthy.any():
                kept = worthy if kept is None else worthy & kept
        if kept is not None:
            alive, active = alive * kept, kept.sum(0).tolist()
        depth, gain, seconds = self._deepest((self.weights @ alive).tolist(), active, drafter, before, worth)
        lengths = np.full(self.batch, depth) if kept is None else kept[:, :depth].sum(1)
        taken = alive[:, :depth]
        square = 1.0 + float((taken @ (2 * self.policy.depth[:depth] + 1)).mean())
        return lengths, 1.0 + taken.sum(1), square, gain, seconds

    def _price(self, drafter: str | None) -> float:
        """Seconds that one more token of one sequence costs: a row to verify, a sequence in a draft step."""
        costs, batch, context = self.policy.costs, self.batch, self.context
        row = costs.target(batch, 4 * batch, context) - costs.target(batch, 2 * batch, context)
        price = row / (2 * batch)
        if drafter is not None:
            half = max(batch // 2, 1)
            price += (
                costs.draft(drafter, batch, context) - costs.draft(drafter, half, context * half // batch)
            ) / max(batch - half, 1)
        return price

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
        best = (0, 0.0, math.inf)
        for depth, (value, count) in enumerate(zip(gains, active, strict=True), 1):
            if not count:
                break
            worth += value
            rows += count
            if drafter is not None:
                drafting += costs.draft(drafter, count, int(share * count))
            seconds = drafting + costs.target(batch, rows, context)
            gain = worth * self.plain_seconds / seconds
            if gain > best[1]:
                best = (depth, gain, seconds)
            elif depth > best[0] + 1:
                break
        return best
