"""Costs measured while serving: nothing is known of this model in this engine, so the first steps tell.

In each range of batch sizes (powers of two) the first steps run in a fixed pattern of drafts. Time is that from one
step's end to the next one's. With T(v, d) the time in which v drafts per sequence are verified and d are drafted, each
0 or k (v a mean: not every request may draft, and n-grams find what they find), it gives, by medians and the first
round thrown away,

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
from collections import defaultdict, deque
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
# Kinds of steps: whether one verifies anything, and whether something is drafted in its time.
_KINDS = _PLAIN, _DRAFT, _VERIFY, _BOTH = (False, False), (False, True), (True, False), (True, True)
_KEPT = 24  # steps of a kind, the latest
_PATIENCE = 4 * ROUNDS  # rounds after which costs are taken from the kinds of steps there were
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
        self._seen: defaultdict[int, int] = defaultdict(int)
        self._steps: defaultdict[int, dict[tuple[bool, bool], deque[StepTiming]]] = defaultdict(dict)

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
        self._seen[bucket] += 1
        if self._seen[bucket] <= len(self._pattern):  # a warm-up
            return
        if step.settled or not self.late:
            kind = step.verified > 0, step.drafting > 0
            self._steps[bucket].setdefault(kind, deque(maxlen=_KEPT)).append(step)
        if self._seen[bucket] >= ROUNDS * len(self._pattern):
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
        """Turn the steps of a bucket into timings; it stays unknown while nothing was verified, or not drafted.

        How many drafts are verified is not in our hands: some drafters find none, and some requests take none.
        """
        kinds = self._steps[bucket]
        wanted = set(_KINDS) - ({_VERIFY} if self.late else set())
        if not wanted <= kinds.keys() and self._planned[bucket] < _PATIENCE * len(self._pattern):
            return
        seconds = {kind: statistics.median(x.seconds for x in steps) for kind, steps in kinds.items()}
        drafting = {kind: statistics.fmean(x.drafting for x in steps) for kind, steps in kinds.items()}
        apart = not self.late and _VERIFY in kinds
        verifying = kinds.get(_VERIFY if apart else _BOTH)
        drafts = [
            (seconds[more] - seconds[less]) / drafting[more]
            for more, less in ((_DRAFT, _PLAIN), (_BOTH, _VERIFY))
            if {more, less} <= kinds.keys()
        ]
        if _PLAIN not in kinds or not drafts or not verifying:
            return
        plain = seconds[_PLAIN]
        draft = max(statistics.fmean(drafts), LEAST_SHARE * plain)
        verify = seconds[_VERIFY] if apart else max(seconds[_BOTH] - drafting[_BOTH] * draft, plain)
        steps = [x for kept in kinds.values() for x in kept]
        batch = int(statistics.median(x.batch for x in steps))
        kv_tokens = int(statistics.median(x.kv_tokens for x in steps))
        rows = batch + max(1, round(batch * statistics.fmean(x.verified / x.batch for x in verifying)))
        self.timings += [
            PassTiming(TARGET, batch, batch, kv_tokens, plain),
            PassTiming(TARGET, batch, rows, kv_tokens, verify),
            PassTiming(self.drafter, batch, batch, kv_tokens, draft),
        ]
        costs = fit(self.timings, kv_share=self._kv_share)
        if self.policy is None:
            self.policy = self._make(costs)
        else:
            self.policy.costs = OnlineCosts(costs)  # what it knows of acceptance stays
        self._known.add(bucket)
        self._keep(self.timings)
        del self._steps[bucket]
