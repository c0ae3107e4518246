"""Costs measured while serving: nothing is known of this model in this engine, so the first steps tell.

In each range of batch sizes (powers of two) the first steps run in a fixed pattern of drafts. Time is that from one
step's end to the next one's. With T(v, d) the time in which v drafts per sequence are verified and d are drafted, it
gives, by medians and the first round thrown away,

    target, plain    T(0, 0)
    target, verify   T(k, 0), or T(k, k) less what drafting takes
    drafter, 1 step  (T(0, k) - T(0, 0)) / k  and  (T(k, k) - T(k, 0)) / k

Where a step ends before its drafts are made (on a GPU vLLM's V2 runner hands its tokens over first) they fall into
the time of the step that verifies them. There is no T(k, 0) then, and T(0, k) takes drafts that nobody verifies: the
pattern has one in eight steps. What the host does for many tokens is then left over for the step after, so times count
only from steps that verify as the one before did, or do not as that one did not.

What was measured is kept on disk, so the next engine starts with it.
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
_PATTERN = (0, 0, 1, 1)  # of a round: whether to draft
_LATE_PATTERN, _DROPPED = (
    (0, 0, 0, 1, 0, 1, 1, 1),
    3,
)  # where drafts are late; the step whose drafts are dropped
STEPS, LATE_STEPS = ROUNDS * len(_PATTERN), ROUNDS * len(_LATE_PATTERN)
LENGTH = 4  # k, where so many rows fit
MOST_ROWS = 640  # of one verification
LEAST_SHARE = 0.02  # of a plain step that one draft step counts as at least, whatever noise says


@dataclass(frozen=True)
class StepTiming:
    """One whole step.

    Attributes:
        batch: Sequences decoded.
        verified: Draft tokens verified, of all sequences together.
        drafting: K drafted in its time.
        kv_tokens: Context tokens of all sequences together.
        seconds: Duration.
        settled: Whether the step before verified drafts if this one did, and none if this one did not.
    """

    batch: int
    verified: int
    drafting: int
    kv_tokens: int
    seconds: float
    settled: bool = True


class SelfCalibrating:
    """An `AutomaticPolicy` that measures its own costs first.

    Args:
        drafter: Its name.
        make: From a cost model to the policy.
        longest: Largest K the engine can run.
        timings: What is known from before.
        keep: Called with all timings when there are new ones.
        late: Whether drafts fall into the time of the step that verifies them.
        kv_share: See `fit`: the context of the first steps grows with their number and with the batch, not by itself.
        lengths: K that can be drafted; None: all up to `longest`.

    Attributes:
        policy: Decides where costs are known; None before any are.
        dropping: Whether the drafts of the plan made last are to be timed, and not verified.
    """

    def __init__(
        self,
        drafter: str,
        make: Callable[[CostModel], AutomaticPolicy],
        longest: int,
        timings: Sequence[PassTiming] = (),
        keep: Callable[[Sequence[PassTiming]], None] = lambda timings: None,
        late: bool = False,
        kv_share: float | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.drafter, self._make, self._keep, self.late = drafter, make, keep, late
        self._kv_share = kv_share
        self.dropping = False
        self._pattern = _LATE_PATTERN if late else _PATTERN
        self._lengths = sorted({x for x in (lengths or range(longest + 1)) if 0 < x <= longest}) or [longest]
        self.timings = list(timings)
        self.policy = make(fit(self.timings, kv_share=kv_share)) if self.timings else None
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
        self.dropping = False
        if bucket in self._known:
            assert self.policy is not None
            return self.policy.plan(state)
        if self.drafter not in state.drafters:
            return Plan.plain(batch, Reason.NO_DRAFTER)
        turn = self._planned[bucket] % len(self._pattern)
        self._planned[bucket] += 1
        if not self._pattern[turn]:
            return Plan.plain(batch, Reason.EXPLORE)
        self.dropping = self.late and turn == _DROPPED
        return uniform_plan(state, self._length(batch), self.drafter, Reason.EXPLORE)

    def revise(self, plan: Plan, state: StepState) -> Plan:
        batch = len(state.slots)
        if batch.bit_length() in self._known and self.policy is not None:
            return self.policy.revise(plan, state)
        return Plan.plain(batch, Reason.NOT_WORTH) if plan.speculates else plan

    def observe_step(self, step: StepTiming) -> None:
        """A step that did nothing but decode."""
        bucket = step.batch.bit_length()
        if bucket in self._known:
            return
        self._steps[bucket].append(step)
        if len(self._steps[bucket]) >= ROUNDS * len(self._pattern):
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
        """The longest of the lengths there are that is short enough, else the shortest."""
        most = min(LENGTH, MOST_ROWS // batch - 1)
        return max((x for x in self._lengths if x <= most), default=self._lengths[0])

    def _learn(self, bucket: int) -> None:
        """Turn the steps of a bucket into timings; it stays unknown while a kind of step is missing."""
        steps = self._steps[bucket][-(ROUNDS - 1) * len(self._pattern) :]
        length = max(x.drafting for x in steps)
        seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for x in steps:
            if (
                (x.settled or not self.late)
                and x.verified in (0, length * x.batch)
                and x.drafting in (0, length)
            ):
                seconds[x.verified // x.batch, x.drafting].append(x.seconds)
        wanted = {(0, 0), (0, length), (length, length)} | (set() if self.late else {(length, 0)})
        if not length or not wanted <= seconds.keys():
            return
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        plain, both = median[0, 0], median[length, length]
        drafts = [(median[0, length] - plain) / length]
        if not self.late:
            drafts.append((both - median[length, 0]) / length)
        draft = max(statistics.mean(drafts), LEAST_SHARE * plain)
        verify = max(both - length * draft, plain) if self.late else median[length, 0]
        batch = int(statistics.median([x.batch for x in steps]))
        kv_tokens = int(statistics.median([x.kv_tokens for x in steps]))
        self.timings += [
            PassTiming(TARGET, batch, batch, kv_tokens, plain),
            PassTiming(TARGET, batch, batch * (1 + length), kv_tokens, verify),
            PassTiming(self.drafter, batch, batch, kv_tokens, draft),
        ]
        costs = fit(self.timings, kv_share=self._kv_share)
        if self.policy is None:
            self.policy = self._make(costs)
        else:
            self.policy.costs = OnlineCosts(costs)  # what it knows of acceptance stays
        self._known.add(bucket)
        self._keep(self.timings)
