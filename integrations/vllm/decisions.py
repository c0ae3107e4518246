"""Between vLLM's scheduler and a speculation policy: what is live, what K is, and what came of it.

vLLM drafts at the end of a step and verifies in the next one. K is decided when a step is scheduled, for the drafts
made at its end; the pass that the policy planned is that drafting and the verification in the following step.
A pass drafts from the drafter or from history, which needs no forward: its drafts are made when the step that verifies
them is scheduled.
Only whole steps can be timed from here (worker and scheduler may be two processes), so a step's time is divided
between what it verified and what was drafted in it in the proportion the cost model expects; steps that verify without
drafting, or draft without verifying, come with every switch and probe, and keep the two apart. Drafts that are `late`
fall into the time of the step that verifies them, which is the whole pass then; see `online_calibration`.

While the policy rests (it decodes plainly and does not look whether to go on so) a step is told nothing and asks for
nothing: what it costs is a few counters.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rollout_spec.integrations.vllm.online_calibration import SelfCalibrating, StepTiming
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.records import (
    HISTORY,
    Matches,
    Plan,
    Reason,
    SpeculationPolicy,
    StepOutcome,
    StepState,
)

logger = logging.getLogger("rollout_spec")

WATCH_TOKENS = 512  # draft tokens over which acceptance is judged


class Live(NamedTuple):
    """A request that will decode after the step being scheduled.

    Attributes:
        request: Its id.
        length: Tokens known by then, prompt included, at least.
        outputs: Output tokens by then, at least.
        allowed: Output tokens still allowed after them, at least 1.
    """

    request: str
    length: int
    outputs: int
    allowed: int


class Verified(NamedTuple):
    """What a step did with one request.

    Attributes:
        request: Its id.
        drafted: Draft tokens it verified.
        emitted: Tokens it appended.
        finished: Whether the request ended.
    """

    request: str
    drafted: int
    emitted: int
    finished: bool


class Ended(NamedTuple):
    """A request that ended in a step of which nothing else is told.

    Attributes:
        request: Its id.
        outputs: Output tokens it had.
        cut_off: Whether it ended at a limit.
    """

    request: str
    outputs: int
    cut_off: bool


@dataclass(frozen=True)
class Decision:
    """What was decided while a step was scheduled: its drafts are verified in the next.

    Attributes:
        draft_length: K of the drafter.
        requests: Those it was decided for, in the order of `state`.
        state, plan: `state` is None where nothing is to be learnt: nothing will be live, or the policy rests.
        seconds: What deciding took.
        dropped: Whether the drafts are only made to be timed, and not verified.
        drafter: What drafts: the drafter, history (then as many tokens as the plan says, at most), or None.
        looked: Whether the policy looked for it, and did not rest.
    """

    draft_length: int
    requests: tuple[str, ...] = ()
    state: StepState | None = None
    plan: Plan | None = None
    seconds: float = 0.0
    dropped: bool = False
    drafter: str | None = None
    looked: bool = False

    @property
    def by_history(self) -> bool:
        return self.drafter == HISTORY

    @property
    def longest(self) -> int:
        """Largest K of the pass, whatever drafts."""
        return int(self.plan.draft_lengths.max()) if self.by_history and self.plan else self.draft_length


class Decisions:
    """Asks a policy before each step and tells it what came of it.

    Args:
        policy: Decides; one that does not calibrate itself gets no times from mixed or disturbed steps either.
        drafter: Its name in the policy's costs, or None if nothing can draft.
        lengths: Draft lengths the runner can run at full speed, 0 among them; others are rounded down, or up to the
            shortest where that is at most twice as long.
        least_acceptance: A drafter accepted less than this, over the last `WATCH_TOKENS` tokens tried, is set aside.
        late: Whether steps end before their drafts are made, so that these fall into the next one's time.
        history: Whether `decide` is told what history matches.

    Attributes:
        reasons: Steps decided so far, by reason.
        draft_lengths: Steps decided so far, by the largest K.
        drafters: Steps decided so far in which something drafts, by what.
        set_aside: Why the drafter is not used, or None.
        looking: Seconds that the last decision took for which the policy looked.
    """

    def __init__(
        self,
        policy: SpeculationPolicy,
        drafter: str | None,
        lengths: Sequence[int],
        least_acceptance: float = 0.0,
        late: bool = False,
        history: bool = False,
    ) -> None:
        self.policy, self.drafter, self.late, self.history = policy, drafter, late, history
        self.lengths, self.least_acceptance = sorted({0, *lengths}), least_acceptance
        self.reasons: Counter[Reason] = Counter()
        self.draft_lengths: Counter[int] = Counter()
        self.drafters: Counter[str] = Counter()
        self.set_aside: str | None = None
        self.looking = 0.0
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._tried = self._accepted = 0
        self._draft_seconds = 0.0  # of the last step
        self._verifying = False  # whether the last step did
        self._planned: Plan | None = None  # the last of a rest
        self._idle: dict[int, StepState] = {}

    def rest(self, batch: int) -> Decision | None:
        """Let the policy rest in the step being scheduled, which decodes a token of each of `batch` requests.

        None if `decide` has to be asked: the policy looks, or wants to be told of the step after.
        """
        self._planned = None
        if not self._usable and not self.history:
            plan = Plan.plain(batch, Reason.NO_DRAFTER)
        elif self.policy.looks(batch):
            return None
        else:
            plan = self.policy.plan(self._unseen(batch))
            if self.policy.looks(batch):  # the last of a rest shows what plain steps cost now
                self._planned = plan
                return None
        return self._counted(Decision(0, plan=plan))

    @property
    def looks(self) -> bool:
        """Whether the policy will look at what `decide` is told: not in the last step of a rest."""
        return self._planned is None

    @property
    def _usable(self) -> tuple[str, ...]:
        return () if self.drafter is None or self.set_aside is not None else (self.drafter,)

    def decide(
        self, live: Sequence[Live], waiting: int, began: float | None = None, matches: Matches | None = None
    ) -> Decision:
        """K of the drafts made at the end of the step being scheduled, or of those from history after it.

        Args:
            live: Requests that will decode.
            waiting: How many others wait.
            began: `time.perf_counter()` when deciding began; None: now.
            matches: What history will have for each of `live`, if it is asked.
        """
        if began is None:
            began = time.perf_counter()
        if not live:
            return Decision(0)
        state = self._state(live, waiting, matches)
        looked, plan = self.looks, self._planned
        if plan is None:
            plan = self.policy.plan(state)
        else:
            plan = Plan.plain(len(live), plan.reason, plan.seconds)
        length, drafter = 0, None
        if plan.speculates and plan.drafter is None and matches is not None:
            drafter = HISTORY
        elif plan.speculates and state.drafters:
            length = self._nearest(int(plan.draft_lengths.max()), int(state.allowed.max()) - 1)
            drafter = self.drafter if length else None
        seconds = time.perf_counter() - began
        self._planned = None
        if looked:
            self.looking = seconds
        dropped = length > 0 and isinstance(self.policy, SelfCalibrating) and self.policy.dropping
        requests = tuple(x.request for x in live)
        return self._counted(Decision(length, requests, state, plan, seconds, dropped, drafter, looked))

    def revise(
        self,
        decided: Decision,
        live: Sequence[Live],
        waiting: int,
        matches: Matches,
        began: float | None = None,
    ) -> Decision:
        """The latest decision again when its pass is scheduled, by what history has then.

        Args:
            decided: It; the drafter drafted nothing for this pass.
            live: Those of its requests that decode in the pass, at least one.
            waiting: How many others wait.
            matches: What history has for each of `live`.
            began: As for `decide`: searching history counts too.
        """
        if decided.plan is None:
            return decided
        if began is None:
            began = time.perf_counter()
        state = self._state(live, waiting, matches)
        plan = self.policy.revise(decided.plan, state)
        self.looking += time.perf_counter() - began
        if plan is decided.plan:
            return decided
        self._count(decided, -1)
        drafter = HISTORY if plan.speculates else None
        requests = tuple(x.request for x in live)
        return self._counted(Decision(0, requests, state, plan, decided.seconds, False, drafter, True))

    def observe(
        self, before: Decision, now: Decision, verified: Sequence[Verified], seconds: float, clean: bool
    ) -> None:
        """What a step did.

        Args:
            before: Decided one step ago: what this step verified.
            now: Decided for this step: what it drafted at its end.
            verified: Every request it decoded.
            seconds: Its time, with what was drafted in it, deciding not.
            clean: Whether it did nothing else, such as a prefill.
        """
        if not before.by_history:
            self._judge(verified)
        draft_before, self._draft_seconds = self._draft_seconds, math.nan if now.draft_length else 0.0
        verifying = any(x.drafted for x in verified)
        settled, self._verifying = verifying == self._verifying, verifying
        index = {request: i for i, request in enumerate(before.requests)}
        known = [x for x in verified if x.request in index]
        if before.state is not None and before.plan is not None and known:
            state = before.state.take(np.array([index[x.request] for x in known]))
            drafted = np.array([x.drafted for x in known], np.int64)
            if clean and len(known) == len(verified):
                drafting = (before if self.late else now).draft_length
                timing = StepTiming(
                    len(known), int(drafted.sum()), drafting, int(state.lengths.sum()), seconds, settled
                )
                self._tell(before, state, drafted, timing, known, draft_before)
        self.forget(x.request for x in verified if x.finished)

    def ended(self, requests: Sequence[Ended]) -> None:
        """These ended in a step that was not observed; their lengths count all the same."""
        count = len(requests)
        outputs = np.array([x.outputs for x in requests], np.int64)
        state = StepState(
            np.array([self._slot(x.request) for x in requests], np.int64),
            outputs,
            outputs,
            np.array([0 if x.cut_off else 1 for x in requests], np.int64),
        )
        none = np.zeros(count, np.int64)
        outcome = StepOutcome(none, none, np.ones(count, bool), 0.0, math.nan, math.nan)
        self.policy.observe(state, Plan.plain(count, Reason.NOT_WORTH), outcome)
        self.forget([x.request for x in requests])

    def forget(self, requests: Iterable[str]) -> None:
        """These requests are gone."""
        slots = [self._slots.pop(x) for x in requests if x in self._slots]
        if slots:
            self.policy.forget(np.array(slots, np.int64))
            self._free += slots

    def forget_others(self, alive: Iterable[str]) -> None:
        """All requests but these are gone."""
        self.forget(self._slots.keys() - set(alive))

    def after_update(self) -> None:
        """The weights have changed."""
        self.set_aside, self._tried, self._accepted = None, 0, 0
        self.policy.after_update()

    def _nearest(self, length: int, most: int) -> int:
        shorter = [x for x in self.lengths if 0 < x <= length]
        return (
            shorter[-1] if shorter else next((x for x in self.lengths if 0 < x <= min(2 * length, most)), 0)
        )

    def _counted(self, decision: Decision) -> Decision:
        self._count(decision, 1)
        return decision

    def _count(self, decision: Decision, steps: int) -> None:
        assert decision.plan is not None
        self.reasons[decision.plan.reason] += steps
        self.draft_lengths[decision.longest] += steps
        if decision.drafter is not None:
            self.drafters[decision.drafter] += steps

    def _state(self, live: Sequence[Live], waiting: int, matches: Matches | None) -> StepState:
        return StepState(
            np.array([self._slot(x.request) for x in live], np.int64),
            np.array([x.length for x in live], np.int64),
            np.array([x.outputs for x in live], np.int64),
            np.array([x.allowed for x in live], np.int64),
            self._usable,
            matches,
            waiting,
        )

    def _unseen(self, batch: int) -> StepState:
        """`batch` sequences for a policy that rests, and so reads no more than their number."""
        if batch not in self._idle:
            zeros = np.zeros(batch, np.int64)
            self._idle[batch] = StepState(
                np.arange(batch), zeros, zeros, zeros, () if self.drafter is None else (self.drafter,)
            )
        return self._idle[batch]

    def _slot(self, request: str) -> int:
        if request not in self._slots:
            self._slots[request] = self._free.pop() if self._free else len(self._slots)
        return self._slots[request]

    def _tell(
        self,
        before: Decision,
        state: StepState,
        drafted: np.ndarray,
        step: StepTiming,
        verified: Sequence[Verified],
        draft_before: float,
    ) -> None:
        if isinstance(self.policy, SelfCalibrating):
            self.policy.observe_step(step)
        share = self._draft_share(step)
        seconds = step.seconds if step.settled or not self.late else math.nan
        draft_seconds = self._draft_seconds = share * seconds
        if not self.late:
            draft_seconds = draft_before
        plan, own = before.plan, drafted.any() and not before.by_history
        assert plan is not None
        emitted = np.array([x.emitted for x in verified], np.int64)
        outcome = StepOutcome(
            np.minimum(np.maximum(emitted - 1, 0), drafted),
            emitted,
            np.array([x.finished for x in verified], bool),
            draft_seconds if own else 0.0,
            (1 - share) * seconds,
            self.looking,
        )
        from_history = np.zeros_like(drafted) if own else drafted
        drafter = self.drafter if own else None
        carried = Plan(
            drafted, from_history, drafter, plan.reason, plan.gain, plan.seconds, forecast=plan.forecast
        )
        self.policy.observe(state, carried, outcome)

    def _draft_share(self, step: StepTiming) -> float:
        """Part of a step's time that went into drafting, as the cost model expects it."""
        policy = self.policy.policy if isinstance(self.policy, SelfCalibrating) else self.policy
        if not isinstance(policy, AutomaticPolicy) or self.drafter is None or not step.drafting:
            return 0.0
        target = policy.costs.target(step.batch, step.batch + step.verified, step.kv_tokens)
        draft = step.drafting * policy.costs.draft(self.drafter, step.batch, step.kv_tokens)
        return draft / (draft + target) if draft + target > 0 else 0.0

    def _judge(self, verified: Sequence[Verified]) -> None:
        for x in verified:
            if x.drafted and x.emitted:
                accepted = min(x.emitted - 1, x.drafted)
                self._accepted += accepted
                self._tried += accepted + (accepted < x.drafted and not x.finished)
        if self._tried < WATCH_TOKENS:
            return
        acceptance, tried = self._accepted / self._tried, self._tried
        self._tried = self._accepted = 0
        if acceptance < self.least_acceptance and self.set_aside is None:
            self.set_aside = (
                f"acceptance {acceptance:.3f} over {tried} draft tokens tried is below "
                f"speculation.canary_min_acceptance={self.least_acceptance}"
            )
            logger.error(
                "drafter set aside: %s; decoding plainly until the next weight update", self.set_aside
            )
