"""A policy for tests: whatever history matches is drafted, and nothing else."""

from __future__ import annotations

import numpy as np

from rollout_spec.policy.baselines import Stateless
from rollout_spec.policy.records import Plan, Reason, StepState


class AlwaysHistory(Stateless):
    """At most `longest` tokens of every match.

    Attributes:
        foreseen, found: Tokens that were expected to match, one step ahead, and that did.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.foreseen = self.found = 0

    def plan(self, state: StepState) -> Plan:
        lengths = self._lengths(state)
        self.foreseen += int(lengths.sum())
        return Plan(lengths, lengths, None, Reason.FIXED)

    def revise(self, plan: Plan, state: StepState) -> Plan:
        lengths = self._lengths(state)
        self.found += int(lengths.sum())
        return Plan(lengths, lengths, None, Reason.FIXED)

    def _lengths(self, state: StepState) -> np.ndarray:
        assert state.matches is not None
        return np.minimum(np.minimum(state.matches.lengths, self.longest), state.allowed - 1)
