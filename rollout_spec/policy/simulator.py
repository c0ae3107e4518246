"""Replays a rollout under a policy without a model: the policy's plans, a cost model's times, keyed luck.

Two policies on one workload and seed meet the same accepted and rejected tokens at the same positions, so that
their makespans differ by what they decided.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.records import (
    HISTORY,
    Matches,
    Plan,
    SpeculationPolicy,
    StepOutcome,
    StepState,
    Trace,
    TraceRequest,
    TraceStep,
)
from rollout_spec.policy.workloads import Workload, uniform_noise


def simulate(
    workload: Workload,
    policy: SpeculationPolicy,
    costs: CostModel,
    *,
    seed: int = 0,
    noise: float = 0.0,
    host_seconds: float = 0.0,
) -> Trace:
    """Run `workload` to its end.

    Args:
        costs: What passes truly cost; what `policy` believes is its own affair.
        seed: Of acceptance, matches and noise.
        noise: Standard deviation of the logarithm of a factor on every pass.
        host_seconds: Added to every pass, plain or verify.

    Raises:
        ValueError: A plan breaks the contract of `Plan`.
    """
    return _Simulation(workload, costs, seed, noise, host_seconds).run(policy)


def makespan(trace: Trace) -> float:
    """When the last pass of a simulated rollout ends, in seconds."""
    last = trace.steps[-1]
    return last.time + last.draft_seconds + last.target_seconds


def plan_seconds(
    costs: CostModel,
    lengths: np.ndarray,
    drafter: str | None,
    draft_lengths: np.ndarray,
    from_history: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Times of drafting and of the target's pass, float64 [...], of one plan or several.

    Drafting step j holds the sequences with a j-th token to draft; what history proposes costs nothing.

    Args:
        lengths: Known tokens, int64 [B].
        drafter: As in `Plan`.
        draft_lengths, from_history: As in `Plan`, int64 [..., B].
    """
    batch, kv_tokens = len(lengths), int(lengths.sum())
    target = costs.target(batch, batch + draft_lengths.sum(-1), kv_tokens)
    steps = draft_lengths - from_history
    if drafter is None or not steps.any():
        return np.zeros(steps.shape[:-1]), target
    j = np.arange(steps.max())
    drafting = steps[..., None] > j  # [..., B, K]
    count = drafting.sum(-2)
    context = np.einsum("b,...bk->...k", lengths, drafting) + j * count
    return (costs.draft(drafter, np.maximum(count, 1), context) * (count > 0)).sum(-1), target


class _Simulation:
    def __init__(
        self, workload: Workload, costs: CostModel, seed: int, noise: float, host_seconds: float
    ) -> None:
        self.workload, self.costs, self.seed = workload, costs, seed
        self.noise, self.host_seconds = noise, host_seconds
        self.rng = np.random.default_rng(seed)
        samples = len(workload.outputs)
        self.done = np.zeros(samples, np.int64)  # output tokens so far
        self.drafted, self.accepted = np.zeros((2, samples), np.int64)
        self.started, self.finished = np.zeros((2, samples))
        self.live = np.zeros(0, np.int64)  # requests, in the order of their slots in `slots`
        self.slots = np.zeros(0, np.int64)
        self.waiting = 0  # the first request that has not started
        self.clock = 0.0

    def run(self, policy: SpeculationPolicy) -> Trace:
        steps: list[TraceStep] = []
        while self.admit():
            state = self.state()
            plan = policy.plan(state)
            _require_valid(plan, state)
            plan, drafted, leads = self.drafting(state, plan)
            outcome = self.outcome(state, plan, drafted, leads)
            steps.append(_row(len(steps), self.clock, state, plan, outcome))
            self.advance(plan, outcome)
            policy.observe(state, plan, outcome)
        about = {"name": self.workload.name, "seed": self.seed, "simulated": True, "noise": self.noise}
        return Trace(about, tuple(steps), tuple(self.requests()))

    def admit(self) -> bool:
        """Start what has arrived while slots are free; wait for the next if nothing is live. False: all done."""
        arrivals = self.workload.arrivals
        if not len(self.live):
            if self.waiting == len(arrivals):
                return False
            self.clock = max(self.clock, float(arrivals[self.waiting]))
        arrived = int(np.searchsorted(arrivals, self.clock, side="right"))
        count = min(arrived - self.waiting, self.workload.slots - len(self.live))
        if count > 0:
            new = np.arange(self.waiting, self.waiting + count)
            free = np.setdiff1d(np.arange(len(self.live) + count), self.slots)[:count]
            self.started[new] = self.clock
            self.live, self.slots = np.append(self.live, new), np.append(self.slots, free)
            self.waiting += count
        return True

    def state(self) -> StepState:
        outputs = self.done[self.live]
        return StepState(
            slots=self.slots,
            lengths=self.workload.prompts[self.live] + outputs,
            outputs=outputs,
            allowed=self.workload.limit - outputs,
            drafters=tuple(self.workload.drafters),
            matches=self.matches(outputs),
            waiting=int(np.searchsorted(self.workload.arrivals, self.clock, side="right")) - self.waiting,
            stoppable=self.workload.stoppable,
        )

    def matches(self, outputs: np.ndarray) -> Matches | None:
        history = self.workload.history
        if history is None:
            return None
        lengths = history.lengths(self.live, outputs, self.seed)
        chances = history.acceptance.at(self.live, outputs[:, None], self.clock)[:, 0]
        return Matches(lengths, np.clip(chances * history.confidence, 0.0, 1.0))

    def drafting(self, state: StepState, plan: Plan) -> tuple[Plan, np.ndarray | None, np.ndarray | None]:
        """The plan as far as its `stop` lets it come; tokens drafted and leads as in `StepOutcome`."""
        own = plan.draft_lengths - plan.from_history
        if plan.stop is None or plan.drafter is None or not own.any():
            return plan, None, None
        order = np.argsort(-own, kind="stable")
        stop = plan.stop.take(order, own[order])
        positions = (state.outputs + plan.from_history)[:, None] + np.arange(own.max())
        chances = self.workload.drafters[plan.drafter].at(self.live, positions, self.clock)
        leads = np.maximum(np.log(chances / np.maximum(1 - chances, 1e-9)), 0.0)
        steps = 1
        while stop.more(leads[order, steps - 1][: np.count_nonzero(own >= steps)]) and steps < own.max():
            steps += 1
        lengths = plan.from_history.copy()
        lengths[order] += stop.lengths
        return replace(plan, draft_lengths=lengths), np.minimum(own, steps), leads

    def outcome(
        self, state: StepState, plan: Plan, drafted: np.ndarray | None, leads: np.ndarray | None
    ) -> StepOutcome:
        left = self.workload.outputs[self.live] - state.outputs
        accepted = np.minimum(self.accept(state, plan), left)
        emitted = np.minimum(accepted + 1, left)
        made = plan.draft_lengths if drafted is None else plan.from_history + drafted
        draft, _ = plan_seconds(self.costs, state.lengths, plan.drafter, made, plan.from_history)
        batch, context = len(state.lengths), int(state.lengths.sum())
        target = self.costs.target(batch, batch + int(plan.draft_lengths.sum()), context)
        factor = float(np.exp(self.noise * self.rng.standard_normal())) if self.noise else 1.0
        return StepOutcome(
            accepted,
            emitted,
            emitted == left,
            float(draft) * factor,
            (float(target) + self.host_seconds) * factor,
            drafted=drafted,
            leads=leads,
        )

    def accept(self, state: StepState, plan: Plan) -> np.ndarray:
        """Accepted draft tokens, int64 [B]: the first of them whose luck is out ends the draft."""
        if not plan.speculates:
            return np.zeros(len(self.live), np.int64)
        depth = np.arange(int(plan.draft_lengths.max()))
        positions = state.outputs[:, None] + depth
        right = np.zeros(positions.shape, bool)
        if plan.drafter is not None:
            right = self.lucky(plan.drafter, positions)
        if plan.from_history.any():
            right = np.where(depth < plan.from_history[:, None], self.lucky(HISTORY, positions), right)
        right &= depth < plan.draft_lengths[:, None]
        return np.cumprod(right, axis=1).sum(axis=1)

    def lucky(self, drafter: str, positions: np.ndarray) -> np.ndarray:
        if drafter == HISTORY:
            assert self.workload.history is not None  # or there would be no matches to plan with
            acceptance = self.workload.history.acceptance
        else:
            acceptance = self.workload.drafters[drafter]
        luck = uniform_noise(self.seed, self.live, positions, drafter)
        return luck < acceptance.at(self.live, positions, self.clock)

    def advance(self, plan: Plan, outcome: StepOutcome) -> None:
        self.clock += outcome.seconds
        self.done[self.live] += outcome.emitted
        self.drafted[self.live] += plan.draft_lengths
        self.accepted[self.live] += np.minimum(outcome.accepted, outcome.emitted)
        if outcome.finished.any():
            self.finished[self.live[outcome.finished]] = self.clock
            self.live, self.slots = self.live[~outcome.finished], self.slots[~outcome.finished]

    def requests(self) -> list[TraceRequest]:
        columns = (
            self.workload.prompts,
            self.workload.outputs,
            self.started,
            self.finished,
            self.drafted,
            self.accepted,
        )
        rows = zip(*(column.tolist() for column in columns))
        return [TraceRequest(f"{index}/0", *row) for index, row in enumerate(rows)]


def _row(step: int, clock: float, state: StepState, plan: Plan, outcome: StepOutcome) -> TraceStep:
    return TraceStep(
        step=step,
        time=clock,
        batch=len(state.slots),
        kv_tokens=int(state.lengths.sum()),
        mode=plan.mode,
        drafted=int(plan.draft_lengths.sum()),
        accepted=int(np.minimum(outcome.accepted, outcome.emitted).sum()),
        emitted=int(outcome.emitted.sum()),
        longest=int(plan.draft_lengths.max()),
        draft_seconds=outcome.draft_seconds,
        target_seconds=outcome.target_seconds,
        reason=plan.reason.value,
        gain=plan.gain,
    )


def _require_valid(plan: Plan, state: StepState) -> None:
    K, history = plan.draft_lengths, plan.from_history
    if len(K) != len(state.slots) or (K < 0).any() or (state.allowed - K < 1).any():
        raise ValueError(f"draft_lengths={K}: one per sequence, at least 0 and below {state.allowed}")
    matched = np.zeros_like(K) if state.matches is None else state.matches.lengths
    if (history < 0).any() or (history > np.minimum(K, matched)).any():
        raise ValueError(f"from_history={history}: at most draft_lengths and what matches, {matched}")
    if (history != K).any() and plan.drafter not in state.drafters:
        raise ValueError(f"drafter={plan.drafter!r}: not usable, there is {state.drafters}")
