"""Costs measured while serving: nothing is known of this model in this engine, so the first steps tell.

In each range of batch sizes (powers of two) the first `STEPS` steps run in a fixed pattern of K = 0, 0, k, k, ... .
With T(v, d) the time of a step that verifies v drafts per sequence and drafts d, its four kinds of steps give

    target, plain    T(0, 0)
    target, verify   T(k, 0)
    drafter, 1 step  (T(0, k) - T(0, 0)) / k  and  (T(k, k) - T(k, 0)) / k

by medians, the first round thrown away. What was measured is kept on disk, so the next engine starts with it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import uniform_plan
from rollout_spec.policy.cost_model import TARGET, CostModel, fit
from rollout_spec.policy.online_costs import OnlineCosts
from rollout_spec.policy.records import PassTiming, Plan, Reason, StepOutcome, StepState

ROUNDS = 4  # the first warms up
STEPS = 4 * ROUNDS
LENGTH = 4  # k, where so many rows fit
MOST_ROWS = 640  # of one verification
LEAST_SHARE = 0.02  # of a plain step that one draft step counts as at least, whatever noise says


@dataclass(frozen=True)
class StepTiming:
    """One whole step.

    Attributes:
        batch: Sequences decoded.
        verified: Draft tokens verified, of all sequences together.
        drafting: K drafted at the end of the step.
        kv_tokens: Context tokens of all sequences together.
        seconds: Duration.
    """

    batch: int
    verified: int
    drafting: int
    kv_tokens: int
    seconds: float


class SelfCalibrating:
    """An `AutomaticPolicy` that measures its own costs first.

    Args:
        drafter: Its name.
        make: From a cost model to the policy.
        longest: Largest K the engine can run.
        timings: What is known from before.
        keep: Called with all timings when there are new ones.

    Attributes:
        policy: Decides where costs are known; None before any are.
    """

    def __init__(
        self,
        drafter: str,
        make: Callable[[CostModel], AutomaticPolicy],
        longest: int,
        timings: Sequence[PassTiming] = (),
        keep: Callable[[Sequence[PassTiming]], None] = lambda timings: None,
    ) -> None:
        self.drafter, self._make, self._keep = drafter, make, keep
        self._longest = longest
        self.timings = list(timings)
        self.policy = make(fit(self.timings)) if self.timings else None
        self._known = {x.batch.bit_length() for x in self.timings if x.kind == drafter}
        self._planned: defaultdict[int, int] = defaultdict(int)
        self._steps: defaultdict[int, list[StepTiming]] = defaultdict(list)

    def looks(self, batch: int) -> bool:
        """As the policy's; it always looks where costs are not known yet."""
        return batch.bit_length() not in self._known or self.policy is None or self.policy.looks(batch)

    def plan(self, state: StepState) -> Plan:
        """The policy's plan, or the next of the pattern."""
        batch = len(state.slots)
        bucket = batch.bit_length()
        if self.drafter not in state.drafters:
            return Plan.plain(batch, Reason.NO_DRAFTER)
        if bucket in self._known:
            assert self.policy is not None
            return self.policy.plan(state)
        turn = self._planned[bucket]
        self._planned[bucket] += 1
        if turn % 4 < 2:
            return Plan.plain(batch, Reason.EXPLORE)
        return uniform_plan(state, self._length(batch), self.drafter, Reason.EXPLORE)

    def observe_step(self, step: StepTiming) -> None:
        """A step that did nothing but decode."""
        bucket = step.batch.bit_length()
        if bucket in self._known:
            return
        self._steps[bucket].append(step)
        if len(self._steps[bucket]) >= STEPS:
            self._learn(bucket)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if self.policy is not None:
            self.policy.observe(state, plan, outcome)

    def after_update(self) -> None:
        if self.policy is not None:
            self.policy.after_update()

    def forget(self, slots: np.ndarray) -> None:
        if self.policy is not None:
            self.policy.forget(slots)

    def _length(self, batch: int) -> int:
        return max(1, min(LENGTH, self._longest, MOST_ROWS // batch - 1))

    def _learn(self, bucket: int) -> None:
        """Turn the steps of a bucket into timings; it stays unknown while a kind of step is missing."""
        steps = self._steps[bucket][-STEPS + 4 :]
        length = max(x.drafting for x in steps)
        seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for x in steps:
            if x.verified in (0, length * x.batch) and x.drafting in (0, length):
                seconds[x.verified // x.batch, x.drafting].append(x.seconds)
        if not length or len(seconds) < 4:
            return
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        plain, verify = median[0, 0], median[length, 0]
        drafts = ((median[0, length] - plain) / length, (median[length, length] - verify) / length)
        draft = max(statistics.mean(drafts), LEAST_SHARE * plain)
        batch = int(statistics.median([x.batch for x in steps]))
        kv_tokens = int(statistics.median([x.kv_tokens for x in steps]))
        self.timings += [
            PassTiming(TARGET, batch, batch, kv_tokens, plain),
            PassTiming(TARGET, batch, batch * (1 + length), kv_tokens, verify),
            PassTiming(self.drafter, batch, batch, kv_tokens, draft),
        ]
        costs = fit(self.timings)
        if self.policy is None:
            self.policy = self._make(costs)
        else:
            self.policy.costs = OnlineCosts(costs)  # what it knows of acceptance stays
        self._known.add(bucket)
        self._keep(self.timings)
