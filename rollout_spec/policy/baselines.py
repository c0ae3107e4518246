"""Policies to compare with: off, fixed, random, and those of two published systems.

`EfficientRollout` (arXiv 2606.18967) and `TLTBandit` (arXiv 2511.16665) decide as published, with every
threshold a parameter so that they can be tuned before they are beaten.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import numpy as np

from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import HISTORY, Plan, Reason, SpeculationPolicy, StepOutcome, StepState


def uniform_plan(
    state: StepState,
    draft_length: int,
    drafter: str | None = None,
    reason: Reason = Reason.FIXED,
    gain: float = float("nan"),
) -> Plan:
    """Draft `draft_length` tokens of every sequence, fewer where fewer are allowed or history has no more.

    `drafter` is a name, `history`, or None for the first usable drafter with weights. Plain if nobody can draft.
    """
    batch = len(state.slots)
    lengths = np.minimum(draft_length, state.allowed - 1)
    if not lengths.any():
        return Plan.plain(batch, Reason.LAST_TOKEN if draft_length else Reason.OFF)
    if drafter == HISTORY:
        if state.matches is None or not state.matches.lengths.any():
            return Plan.plain(batch, Reason.NO_DRAFTER)
        lengths = np.minimum(lengths, state.matches.lengths)
        if not lengths.any():
            return Plan.plain(batch, Reason.LAST_TOKEN)
        return Plan(lengths, lengths, None, reason, gain)
    if drafter is None and state.drafters:
        drafter = state.drafters[0]
    if drafter not in state.drafters:
        return Plan.plain(batch, Reason.NO_DRAFTER)
    return Plan(lengths, np.zeros(batch, np.int64), drafter, reason, gain)


def expected_emitted(alpha: float, draft_length: int) -> float:
    """tau = (1 - alpha^(K+1)) / (1 - alpha): tokens emitted per verification (Leviathan et al. 2023, eq. 1)."""
    return float(np.sum(alpha ** np.arange(draft_length + 1)))


class Stateless(SpeculationPolicy):
    """What a policy that does not learn does when it is told something: nothing."""

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        pass

    def after_update(self) -> None:
        pass

    def forget(self, slots: np.ndarray) -> None:
        pass


class Delegate(SpeculationPolicy):
    """Another policy, to be changed in some respect by a subclass."""

    def __init__(self, inner: SpeculationPolicy) -> None:
        self.inner = inner

    def looks(self, batch: int) -> bool:
        return self.inner.looks(batch)

    def revise(self, plan: Plan, state: StepState) -> Plan:
        return self.inner.revise(plan, state)

    def plan(self, state: StepState) -> Plan:
        return self.inner.plan(state)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        self.inner.observe(state, plan, outcome)

    def after_update(self) -> None:
        self.inner.after_update()

    def add_drafter(self, name: str, cost: PassCost) -> None:
        self.inner.add_drafter(name, cost)

    def observe_shadow(self, drafter: str, slots: np.ndarray, accepted: np.ndarray) -> None:
        self.inner.observe_shadow(drafter, slots, accepted)

    def forget(self, slots: np.ndarray) -> None:
        self.inner.forget(slots)


class Off(Stateless):
    """Plain decoding."""

    def looks(self, batch: int) -> bool:
        return False

    def plan(self, state: StepState) -> Plan:
        return Plan.plain(len(state.slots), Reason.OFF)


class Fixed(Stateless):
    """The same K for every sequence, while at most `largest_batch` are live (None: always).

    `drafter` is a name, `history` (K is then at most the length of the match), or None for the first usable.
    """

    def __init__(
        self, draft_length: int, largest_batch: int | None = None, drafter: str | None = None
    ) -> None:
        if draft_length < 1:
            raise ValueError(f"draft_length={draft_length}: use an integer >= 1, or Off()")
        self.draft_length, self.largest_batch, self.drafter = draft_length, largest_batch, drafter

    def plan(self, state: StepState) -> Plan:
        if self.largest_batch is not None and len(state.slots) > self.largest_batch:
            return Plan.plain(len(state.slots), Reason.FIXED)
        return uniform_plan(state, self.draft_length, self.drafter)


class RandomLengths(Stateless):
    """Off with probability `off`, else a K in 1..`longest` drawn per sequence: for proofs, not for speed.

    Where history matches, every other speculative step takes as much of it as K allows. With `stops`, every other one
    with a drafter that can be stopped goes on as the digits of its leads have it.
    """

    def __init__(self, seed: int, longest: int = 8, off: float = 0.3, stops: bool = True) -> None:
        self._rng, self.longest, self.off = np.random.default_rng(seed), longest, off
        self.stops = stops

    def plan(self, state: StepState) -> Plan:
        batch = len(state.slots)
        if self._rng.random() < self.off:
            return Plan.plain(batch, Reason.OFF)
        lengths = np.minimum(self._rng.integers(1, self.longest + 1, batch), state.allowed - 1)
        from_history = np.zeros(batch, np.int64)
        if state.matches is not None and self._rng.random() < 0.5:
            from_history = np.minimum(lengths, state.matches.lengths)
        drafter = state.drafters[0] if state.drafters else None
        if drafter is None:
            lengths = from_history
        if not lengths.any():
            return Plan.plain(batch, Reason.LAST_TOKEN if drafter else Reason.NO_DRAFTER)
        stops = self.stops and state.stoppable and self._rng.random() < 0.5
        stop = ByTheDigits(lengths - from_history) if stops else None
        return Plan(lengths, from_history, drafter, Reason.FIXED, stop=stop)


class ByTheDigits:
    """A `Stop` for proofs: a sequence goes on where the digits of its leads say so, three times in four."""

    def __init__(self, limits: np.ndarray) -> None:
        self._limits, self._going = limits, limits > 0
        self.lengths = np.zeros_like(limits)

    def more(self, leads: np.ndarray) -> bool:
        count = len(leads)
        self.lengths[:count] += self._going[:count]
        digits = np.minimum(leads, 1e6) * 1000 % 4  # the lead of the only possible token is infinite
        self._going[:count] &= (digits > 1) & (self.lengths < self._limits)[:count]
        return bool(self._going.any())

    def take(self, index: np.ndarray, limits: np.ndarray) -> ByTheDigits:
        return type(self)(limits)


class EfficientRollout(SpeculationPolicy):
    """Roofline toggle and acceptance-aware draft length, as published.

    Off until more than `armed_above` sequences have been live; from then on, on at the first step whose predicted
    gain tau * T_T / (K * T_D + T_V) reaches `least_gain`, and on for the rest of the rollout. K starts at the
    lowest rung of `ladder` and moves by one rung between rollouts: up after `patience` rollouts in a row that
    accepted at least `raise_at` of the drafted tokens, down after as many that accepted at most `lower_at`.

    Args:
        cost_model: Predicts T_T, T_D and T_V.
        drafter: Which drafter; None: the first usable.
        alpha: Acceptance per token assumed before any was measured; 1.0 is their "trained-policy regime".
    """

    def __init__(
        self,
        cost_model: CostModel,
        *,
        drafter: str | None = None,
        ladder: Sequence[int] = (5, 7, 9, 11),
        least_gain: float = 1.05,
        armed_above: int = 32,
        raise_at: float = 0.94,
        lower_at: float = 0.85,
        patience: int = 2,
        alpha: float = 1.0,
    ) -> None:
        self._costs, self.drafter, self.ladder = cost_model, drafter, tuple(ladder)
        self.least_gain, self.armed_above, self.patience = least_gain, armed_above, patience
        self.raise_at, self.lower_at, self._alpha = raise_at, lower_at, alpha
        self._rung = self._above = self._below = 0
        self._on: bool = False
        self._armed: bool = False
        self._drafted = self._accepted = self._rejected = 0

    @property
    def draft_length(self) -> int:
        """K of this rollout."""
        return self.ladder[self._rung]

    def plan(self, state: StepState) -> Plan:
        batch = len(state.slots)
        self._armed = self._armed or batch > self.armed_above
        if self._on:
            return uniform_plan(state, self.draft_length, self.drafter, Reason.STILL_PAYS)
        drafter = self.drafter or next(iter(state.drafters), None)
        if drafter is None:
            return Plan.plain(batch, Reason.NO_DRAFTER)
        gain = self._gain(batch, int(state.lengths.sum()), drafter)
        if not self._armed or gain < self.least_gain:
            return Plan.plain(batch, Reason.NOT_WORTH)
        plan = uniform_plan(state, self.draft_length, drafter, Reason.PAYS, gain)
        self._on = plan.speculates
        return plan

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if plan.speculates:
            self._drafted += int(plan.draft_lengths.sum())
            self._accepted += int(outcome.accepted.sum())
            self._rejected += int((outcome.accepted < plan.draft_lengths).sum())

    def after_update(self) -> None:
        if self._drafted:
            ratio = self._accepted / self._drafted
            self._above = self._above + 1 if ratio >= self.raise_at else 0
            self._below = self._below + 1 if ratio <= self.lower_at else 0
            if self._above >= self.patience:
                self._rung, self._above = min(self._rung + 1, len(self.ladder) - 1), 0
            if self._below >= self.patience:
                self._rung, self._below = max(self._rung - 1, 0), 0
            self._alpha = self._accepted / max(1, self._accepted + self._rejected)
        self._on = self._armed = False
        self._drafted = self._accepted = self._rejected = 0

    def forget(self, slots: np.ndarray) -> None:
        pass

    def _gain(self, batch: int, kv_tokens: int, drafter: str) -> float:
        """Gain over plain decoding as they predict it, tau * T_T / (K * T_D + T_V)."""
        K = self.draft_length
        plain = self._costs.target(batch, batch, kv_tokens)
        draft = K * self._costs.draft(drafter, batch, kv_tokens)
        verify = self._costs.target(batch, batch * (K + 1), kv_tokens)
        return expected_emitted(self._alpha, K) * plain / (draft + verify)


class TLTBandit(SpeculationPolicy):
    """Bucketed epsilon-greedy bandit over draft lengths (BEG-MAB).

    Each range of batch sizes has its own arms. An arm's value is the median of its last `window` rewards
    (mean accepted + 1) * B / seconds; untried arms come first, then the best, or with probability `epsilon` any.

    Args:
        arms: Draft lengths by the largest batch of their bucket, e.g. {4: (3, 7, 11), 32: (3, 5)}. A step with
            more live sequences than the largest bucket, or than `largest_batch`, decodes plainly.
        seed: Of the exploration.
        drafter: Which drafter; None: the first usable.

    Raises:
        ValueError: A bucket with fewer than two arms has nothing to choose, so it would never learn anything.
    """

    def __init__(
        self,
        arms: Mapping[int, Sequence[int]] | None = None,
        *,
        seed: int = 0,
        epsilon: float = 0.1,
        largest_batch: int = 32,
        window: int = 32,
        drafter: str | None = None,
    ) -> None:
        if arms is None:
            arms = {2: (5, 7, 11), 8: (3, 5, 7), 32: (2, 3, 5)}
        for bucket, lengths in arms.items():
            if len(set(lengths)) < 2:
                raise ValueError(
                    f"arms[{bucket}]={tuple(lengths)}: give a bucket two draft lengths or more, else it never explores"
                )
        self.arms = {bucket: tuple(arms[bucket]) for bucket in sorted(arms)}
        self.epsilon, self.largest_batch, self.drafter = epsilon, largest_batch, drafter
        self._rng = np.random.default_rng(seed)
        self._rewards: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=window))
        self._pulled: tuple[int, int] | None = None

    def plan(self, state: StepState) -> Plan:
        batch = len(state.slots)
        bucket = next((size for size in self.arms if size >= batch), None)
        self._pulled = None
        if bucket is None or batch > self.largest_batch:
            return Plan.plain(batch, Reason.FIXED)
        values = [self._value(bucket, arm) for arm in self.arms[bucket]]
        choice = int(np.argmax(values))
        reason = Reason.PAYS if values[choice] < float("inf") else Reason.EXPLORE
        if self._rng.random() < self.epsilon:
            choice, reason = int(self._rng.integers(len(values))), Reason.EXPLORE
        plan = uniform_plan(state, self.arms[bucket][choice], self.drafter, reason)
        if plan.speculates:
            self._pulled = bucket, self.arms[bucket][choice]
        return plan

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if plan.speculates and self._pulled is not None:
            tokens = (float(outcome.accepted.mean()) + 1) * len(state.slots)
            self._rewards[self._pulled].append(tokens / outcome.seconds)

    def after_update(self) -> None:
        pass

    def forget(self, slots: np.ndarray) -> None:
        pass

    def _value(self, bucket: int, arm: int) -> float:
        rewards = self._rewards[bucket, arm]
        return float(np.median(rewards)) if rewards else float("inf")
