"""What a simulation has to know of real rollouts: how sure their drafter is of its tokens, and how long their passes take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import cycle

import numpy as np

from rollout_spec.policy.baselines import Delegate, Stateless, uniform_plan
from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost, fit
from rollout_spec.policy.doubt import Leads, UntilInDoubt
from rollout_spec.policy.records import PassTiming, Plan, SpeculationPolicy, StepOutcome, StepState

_TIMED_K = (0, 4, 0, 8)


class Listening(Delegate):
    """Another policy, and how sure the drafter is of what it drafts for it.

    Attributes:
        leads: Of all tokens verified.
    """

    def __init__(self, inner: SpeculationPolicy) -> None:
        super().__init__(inner)
        self.leads = Leads(memory=np.inf)

    def plan(self, state: StepState) -> Plan:
        """With a stop, or leads are not asked for; it lets the drafter come to its end."""
        plan = super().plan(state)
        if not plan.speculates:
            return plan
        ones, limits = np.ones(len(plan.draft_lengths)), plan.draft_lengths
        never = UntilInDoubt(
            ones.copy(), ones, ones, limits, limits, self.leads.acceptance(1.0), (0.0, 0.0), lambda count: 0.0
        )
        return replace(plan, stop=never)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        super().observe(state, plan, outcome)
        if outcome.leads is not None:
            self.leads.observe(outcome.leads, plan.draft_lengths, outcome.accepted)


class Timing(Stateless):
    """Plain and speculative passes by turns, to time both at every batch size that a rollout comes by."""

    def __init__(self) -> None:
        self._draft_lengths = cycle(_TIMED_K)
        self.timings: list[PassTiming] = []

    def plan(self, state: StepState) -> Plan:
        return uniform_plan(state, next(self._draft_lengths))

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        batch, kv_tokens = len(state.slots), int(state.lengths.sum())
        rows, longest = batch + int(plan.draft_lengths.sum()), int(plan.draft_lengths.max())
        self.timings.append(PassTiming(TARGET, batch, rows, kv_tokens, outcome.target_seconds))
        if plan.drafter is not None:
            halfway, seconds = kv_tokens + batch * (longest - 1) // 2, outcome.draft_seconds / longest
            self.timings.append(PassTiming(plan.drafter, batch, batch, halfway, seconds))


def adding_up(timings: Sequence[PassTiming]) -> CostModel:
    """A cost model by which all these passes take as long as they did: by `fit` slow moments hardly count."""

    def scaled(kind: str, cost: PassCost) -> PassCost:
        own = [timing for timing in timings if timing.kind == kind]
        fitted = sum(cost.seconds(timing.batch, timing.rows, timing.kv_tokens) for timing in own)
        factor = sum(timing.seconds for timing in own) / fitted
        seconds = {term: factor * value for term, value in asdict(cost).items() if term != "expert_share"}
        return replace(cost, **seconds)

    return CostModel({kind: scaled(kind, cost) for kind, cost in fit(timings).passes.items()})
