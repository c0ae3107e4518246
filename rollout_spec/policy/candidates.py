"""Candidate plans for one pass: for each way to draft, how far ahead for every sequence, and what it gains."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rollout_spec.policy.compiled import deepest, powers, put_behind, spread
from rollout_spec.policy.cost_model import TARGET
from rollout_spec.policy.records import HISTORY, StepState

if TYPE_CHECKING:
    from rollout_spec.policy.automatic import AutomaticPolicy


class Candidate(NamedTuple):
    """What one arm could do in a pass.

    Attributes:
        drafter: Who drafts behind history, or None.
        draft_lengths: Draft tokens, those of history included, int64 [B].
        before: Tokens of history ahead of those that `alive` is about, int64 [B].
        certain: Tokens expected of them, float64 [B].
        alive: P(tokens 1..j accepted), 0 for those not on offer, float64 [B, longest].
        depth: Of these, tokens from here on are not drafted.
        gain: Predicted speed over plain decoding.
        seconds: Predicted time of the pass.
    """

    drafter: str | None
    draft_lengths: np.ndarray
    before: np.ndarray
    certain: np.ndarray
    alive: np.ndarray
    depth: int
    gain: float
    seconds: float

    @property
    def from_history(self) -> np.ndarray:
        """How many of these are history's, the first, int64 [B]."""
        return self.draft_lengths if self.drafter is None else self.before

    @property
    def spread(self) -> tuple[float, float]:
        """Mean and variance of a sequence's tokens, the target's own included, over sequences and passes."""
        return spread(self.alive, self.depth, self.certain)


class Round:
    """Evaluates candidates for one pass."""

    def __init__(
        self,
        policy: AutomaticPolicy,
        state: StepState,
        weights: np.ndarray,
        room: np.ndarray,
        found: np.ndarray,
        context: int,
        plain_seconds: float,
    ) -> None:
        self.policy, self.state, self.weights, self.room = policy, state, weights, room
        self.found = found
        self.batch, self.context, self.plain_seconds = len(weights), context, plain_seconds

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
        alive = powers(matches.confidence, self.found, self.policy.longest)
        return self._best(alive, self.found, None)

    def _drafted(self, arm: str, name: str) -> Candidate:
        """A drafter with weights, behind what history proposes if the arm says so."""
        alive = self.policy.acceptance[name].survival(self.state.slots)
        if arm == name:
            return self._best(alive, self.room, name)
        before, matches = self._history.draft_lengths, self.state.matches
        assert matches is not None
        certain = put_behind(alive, matches.confidence, before)
        return self._best(alive, self.room, name, before, certain)

    def _best(
        self,
        alive: np.ndarray,
        room: np.ndarray,
        drafter: str | None,
        before: np.ndarray | None = None,
        certain: np.ndarray | None = None,
    ) -> Candidate:
        """The draft lengths of the largest gain, see `deepest`.

        Args:
            alive: P(tokens 1..j accepted), float64 [B, longest], falling in j; it is used up.
            room: Most tokens per sequence, those ahead included, int64 [B].
            drafter: Who drafts them, or None where drafting is free.
            before: Tokens drafted ahead of these, int64 [B], if any.
            certain: Tokens expected of those, float64 [B].
        """
        policy, prices = self.policy, self.policy.costs.prices
        if before is None or certain is None:
            before, certain = np.zeros(self.batch, np.int64), np.zeros(self.batch)
        step = None if drafter is None else prices[drafter]
        lengths, depth, gain, seconds = deepest(
            alive, before, certain, room, self.weights, prices[TARGET], step, self.context, policy.deciding,
            self.plain_seconds, policy.last_gain, policy.ragged or drafter is None,
        )  # fmt: skip
        return Candidate(drafter, lengths, before, certain, alive, depth, gain, seconds)
