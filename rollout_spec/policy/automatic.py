"""The automatic policy: before every pass, who drafts and how far ahead, or nobody.

Value. A token of sequence i is worth w_i, with sum w_i = 1. For the least makespan, w_i follows from how the time
until the last sequence ends depends on the tokens i has to come: with a plain pass of
t(B) = t0 + t1 * B it is t0 / g * P(i ends last) + t1, up to a factor, where g is the gain expected once a single
sequence is left: tokens put off until then are cheaper by it. For the most tokens per second, w_i = 1/B. A plain
pass is then worth 1, a pass with draft lengths K_i is worth V = sum w_i * tau_i, and its gain is

    gain = V / T(K)  *  t(B)

the speed over plain decoding. The policy takes the candidate of largest gain, if that exceeds what runs now by
the margin.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

import numpy as np

from rollout_spec.policy.acceptance import AcceptanceTracker
from rollout_spec.policy.arbiter import Arbiter
from rollout_spec.policy.candidates import Candidate, Round
from rollout_spec.policy.compiled import catching_up, further, gain_alone, survey
from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost
from rollout_spec.policy.doubt import Leads, UntilInDoubt
from rollout_spec.policy.lengths import RemainingLength
from rollout_spec.policy.online_costs import OnlineCosts
from rollout_spec.policy.own_caches import OwnCaches
from rollout_spec.policy.records import (
    HISTORY,
    PLAIN,
    Matches,
    Plan,
    Reason,
    SpeculationPolicy,
    StepOutcome,
    StepState,
)

logger = logging.getLogger("rollout_spec")

# Passes between looks at the other arms: a drafter drafts as far as it did, history plans anew, and pauses if its matches do
# not pay.
HOLD = 3
_REST, _LONGEST_REST = 3, 63  # plain passes between looks while nothing changes
_LOOKING = 0.0015  # share of the time that looks may take: rests are as long as it takes
_CHANGE = 8  # a batch that changes by more than this part of it is another
_DECISIONS = 9  # of whose times the median is what a decision takes
_ALONE_EVERY = 16  # passes between estimates of the gain that the last sequence will have
_NEAR = 0.9  # a gain below this is not looked at more closely
_WEIGH_EVERY = 32  # passes between looks at how far sequences drift apart
_OFTEN_STEP = 0.03  # weight of one pass in how often an arm pays
_KEPT_BY_UPDATE = 0.3  # weight that observations keep when the policy's weights change
_ROOM = 2  # draft lengths may grow by this factor on the way, as long as the drafter is sure
_SURE = 1.6  # a gain that is one even if plain passes are cheaper than predicted by as much as they ever were
_REFERENCES, _REFERENCE_AGE = (
    3,
    64,
)  # else: plain passes to have seen at about this batch size, the last so long ago
_FADE_EVERY, _FADE = 64, 0.9  # every so many passes what was learnt of an idle drafter keeps this weight

_NOT_REVISED = {Reason.PROBE, Reason.REFERENCE, Reason.LAST_TOKEN, Reason.BAD_COST}


@dataclass
class _Known:
    """What was found of an arm.

    Attributes:
        looked: Pass in which it was evaluated last.
        gain: Then expected of it.
        often: Share of the recent passes in which it would have paid.
        together: Share of its gain that stays, see `AutomaticPolicy._together`, and the pass in which this was weighed.
        valid: Whether it holds for the batch of now.
    """

    looked: int
    gain: float = 0.0
    often: float = 1.0
    together: float = 1.0
    weighed: int = 0
    valid: bool = False


class _Forecast(NamedTuple):
    """What is expected of a pass.

    Attributes:
        gain: Not corrected by what the arbiter learnt.
        instead: Gain of what would have run, if this is a trial; else None.
        together: Share of its worth that stays, see `AutomaticPolicy._together`.
        weights: What a token of each of `slots` was worth.
    """

    arm: str
    slots: np.ndarray
    gain: float
    plain_seconds: float
    instead: float | None
    together: float
    weights: np.ndarray


class AutomaticPolicy(SpeculationPolicy):
    """Decides from measured costs and observed acceptance.

    Args:
        cost_model: Costs of this machine and model, from calibration.
        objective: `makespan` (the batch is done soonest) or `throughput` (most tokens per second now).
        longest: Largest draft length considered.
        margin: Predicted gain over what runs now that a switch must promise, e.g. 0.02.
        probe_share: Share of the passes that would speculate and are run plainly instead, at random, to measure
            the time really saved.
        explore_share: Largest share of the time that exploration may cost.
        ragged: Whether a drafter's K may differ between sequences of one pass. History's may always.
        behind_history: Whether a drafter can go on behind what history proposes, in one pass.
        seed: Of the probes.
    """

    def __init__(
        self,
        cost_model: CostModel,
        *,
        objective: str = "makespan",
        longest: int = 16,
        margin: float = 0.02,
        probe_share: float = 0.005,
        explore_share: float = 0.002,
        ragged: bool = True,
        behind_history: bool = True,
        seed: int = 0,
    ) -> None:
        self.costs = OnlineCosts(cost_model)
        self.objective, self.longest, self.margin, self.ragged = objective, longest, margin, ragged
        self.probe_share = probe_share
        self.lengths = RemainingLength()
        names = [name for name in cost_model.passes if name != TARGET]
        behind = [f"{HISTORY}+{name}" for name in names if behind_history]
        self.arbiter = Arbiter([PLAIN, HISTORY, *names, *behind], explore_share=explore_share)
        self.acceptance = {name: AcceptanceTracker(longest) for name in names}
        self.leads = {name: Leads() for name in names}
        self._rng = np.random.default_rng(seed)
        self._mode = PLAIN
        self._weights = np.zeros(0)
        self._makespan = 0.0  # share of a plain pass's worth that lies in the end of the last sequence
        self._alone = (0, 1.0)  # the pass it was estimated in, and the gain once a single sequence is left
        self._passes = self._batch = 0
        self._rest = self._pause = 0  # plain passes to the next look, and between the last two
        self._held = self._asked = 0  # passes to the next look, and the pass of the last
        self._last: Plan | None = None  # what a drafter does again until then
        self._offers: tuple[object, ...] = ()  # at the last look: whether history matched, and the drafters
        self._slots = np.zeros(0, np.int64)  # and the sequences
        self._plain_seconds = math.nan
        self._looked = False  # whether the plan of this pass took a decision
        self._decisions: deque[float] = deque(maxlen=_DECISIONS)
        self.deciding = 0.0  # seconds that a decision takes
        self._known: dict[str, _Known] = {}
        self._own_caches = OwnCaches()
        self._compile()

    def _compile(self) -> None:
        """Have the inner loops compiled now, not in a pass, whose time counts."""
        began, pair = time.perf_counter(), np.ones(2, np.int64)
        weights = self.lengths.last_to_finish(pair, pair)
        self.lengths.delay(pair, pair, 1.0)
        self._gain_alone(tuple(self.acceptance), self.costs.target(1, 1, 2), 2)
        for name in self.acceptance:
            catching_up(self.costs.prices[name], 2, 2)
        for matches in (None, Matches(pair, np.full(2, 0.5))):
            state = StepState(pair, pair, pair, pair, matches=matches)
            survey(pair, pair, pair, pair, None if matches is None else pair, self.longest)
            round = Round(self, state, weights, pair, pair, 2, 1.0)
            for arm in self.arbiter.arms[1:] if matches else self.acceptance:
                chosen = round.candidate(arm)
                _ = chosen.spread
                if chosen.drafter is not None:
                    self._until_in_doubt(round, chosen, 1.0)
        if (took := time.perf_counter() - began) > 1:
            logger.info(
                "compiled the policy's inner loops in %.0f s; the code is kept for the next start", took
            )

    # --- deciding --------------------------------------------------------------------------------------

    def looks(self, batch: int) -> bool:
        return not self._rest or self._changed(batch)

    def plan(self, state: StepState) -> Plan:
        batch = len(state.slots)
        self._passes += 1
        if self._passes % _FADE_EVERY == 0:
            self._fade()
        self._looked = self.looks(batch)
        if not self._looked:
            self._rest -= 1
            return Plan.plain(batch, Reason.NOT_WORTH, self._plain_seconds)
        self._rest = 0
        lengths = None if state.matches is None else state.matches.lengths
        room, found, fits, context, matched, same = survey(
            state.slots, self._slots, state.allowed, state.lengths, lengths, self.longest
        )
        if not fits:
            return Plan.plain(batch, Reason.LAST_TOKEN)
        offers = (matched, state.drafters)
        if self._held and same and offers == self._offers:
            self._held -= 1
            if self._last is None:
                round = Round(self, state, self._weights, room, found, context, self._plain_seconds)
                return self._carry_out(round, self._mode, None, Reason.STILL_PAYS)
            if np.count_nonzero(lengths := np.minimum(self._last.draft_lengths, room)):
                return self._again(self._last, lengths)
        self._held, self._offers, self._slots = 0, offers, state.slots
        drafters = [name for name in state.drafters if name in self.acceptance]
        if not drafters and not matched:
            self._mode, self._weights = PLAIN, np.zeros(0)
            return Plan.plain(batch, Reason.NO_DRAFTER)
        plain_seconds = self.costs.target(batch, batch, context)
        if not 0 < plain_seconds < math.inf:
            self._mode = PLAIN
            return Plan.plain(batch, Reason.BAD_COST)

        self._plain_seconds = plain_seconds
        weights = self._value_of_tokens(state, context, plain_seconds)
        round = Round(self, state, weights, room, found, context, plain_seconds)
        arms = [HISTORY] if matched else []
        for name in drafters:
            behind = f"{HISTORY}+{name}"
            arms += [name, behind] if matched and behind in self.arbiter.arms else [name]
        if self._changed(batch):
            self._batch, self._pause = batch, 0
            for known in self._known.values():
                known.valid, known.weighed = False, 0
        return self._settle(round, arms, plain_seconds)

    def revise(self, plan: Plan, state: StepState) -> Plan:
        if (
            plan.drafter is not None
            or not self._looked
            or plan.reason in _NOT_REVISED
            or state.matches is None
        ):
            return plan
        batch, same = len(state.slots), np.array_equal(state.slots, self._slots)
        room, found, _, context, matched, _ = survey(
            state.slots, self._slots, state.allowed, state.lengths, state.matches.lengths, self.longest
        )
        plain_seconds = self.costs.target(batch, batch, context)
        forecast = plan.forecast
        if not same or len(self._weights) != batch:
            self._held, self._slots, forecast = 0, state.slots, None
            self._value_of_tokens(state, context, plain_seconds)
        if matched and 0 < plain_seconds < math.inf:
            chosen = Round(self, state, self._weights, room, found, context, plain_seconds).candidate(HISTORY)
            together = self._known[HISTORY].together if HISTORY in self._known else 1.0
            gain = self._corrected(HISTORY, chosen, batch) * together
            if gain > 1:
                forecast = forecast or _Forecast(
                    HISTORY, state.slots, chosen.gain, plain_seconds, None, together, self._weights
                )
                reason = plan.reason if plan.speculates else Reason.PAYS
                return Plan(
                    chosen.draft_lengths,
                    chosen.from_history,
                    None,
                    reason,
                    gain,
                    chosen.seconds,
                    forecast=forecast,
                )
        reason = Reason.NOT_WORTH if plan.speculates else plan.reason
        return Plan.plain(batch, reason, plain_seconds, forecast)

    def _changed(self, batch: int) -> bool:
        """Whether what was found for another batch does not hold for this one."""
        return abs(batch - self._batch) > self._batch // _CHANGE

    def _settle(self, round: Round, arms: list[str], plain_seconds: float) -> Plan:
        """Compare the arms; of those that neither run nor are near to paying, one in turn is evaluated anew."""
        batch = round.batch
        candidates = {arm: round.candidate(arm) for arm in self._due(arms)}
        for name, candidate in candidates.items():
            self._learn_of(name, candidate, round.state)
        gains = {arm: self._known[arm].gain for arm in arms if self._known[arm].gain > 0} | {PLAIN: 1.0}
        if len(gains) == 1:
            self._mode = PLAIN
            return Plan.plain(batch, Reason.BAD_COST, plain_seconds)
        best = self._with_hysteresis(gains)
        reason = Reason.STILL_PAYS if best == self._mode else Reason.PAYS
        self._mode = best
        arm = self.arbiter.explore(gains, best, batch, plain_seconds, self._passes - self._asked)
        self._asked = self._passes
        if arm is None:
            arm = best
        else:
            reason = Reason.EXPLORE
        if best != PLAIN:
            self._pause = 0
        if arm == PLAIN:
            longest = min(max(_REST, self.deciding / (_LOOKING * plain_seconds)), _LONGEST_REST)
            self._rest = self._pause = min(2 * self._pause + 1, int(longest))
            return Plan.plain(batch, Reason.NOT_WORTH, plain_seconds)
        if arm == best:
            self._held = HOLD
            return self._carry_out(round, arm, candidates.get(arm), reason)
        plan = self._carry_out(round, arm, candidates.get(arm), reason, gains[best])
        if self._last is not None and arm in self._own_caches:
            self._held = 1  # it reads what it missed first; the pass after shows what it is worth
        return plan

    def _carry_out(
        self, round: Round, arm: str, chosen: Candidate | None, reason: Reason, instead: float | None = None
    ) -> Plan:
        """Draft as `arm` does, unless this pass is to show what plain decoding does."""
        known, plain_seconds, self._last = self._known[arm], round.plain_seconds, None
        chosen = chosen or round.candidate(arm)
        gain = self._corrected(arm, chosen, round.batch)
        if arm == HISTORY and instead is None and gain * known.together <= 1:  # its matches come and go
            return Plan.plain(round.batch, Reason.NOT_WORTH, plain_seconds)
        if (why := self._plain_for_comparison(round.batch, known.gain)) is not None:
            return Plan.plain(round.batch, why, plain_seconds)
        forecast = _Forecast(
            arm, round.state.slots, chosen.gain, plain_seconds, instead, known.together, round.weights
        )
        lengths, stop = chosen.draft_lengths, None
        if chosen.drafter is not None and round.state.stoppable and self.ragged:
            lengths, stop = self._until_in_doubt(round, chosen, gain)
        plan = Plan(
            lengths, chosen.from_history, chosen.drafter, reason, known.gain, chosen.seconds, stop, forecast
        )
        if arm == chosen.drafter:
            self._last = plan
        return plan

    def _corrected(self, arm: str, candidate: Candidate, batch: int) -> float:
        """Gain of an arm's candidate in this pass, corrected by what the arbiter learnt."""
        return candidate.gain * self.arbiter.correction(arm, batch)

    def _again(self, last: Plan, lengths: np.ndarray) -> Plan:
        """Draft as in the last pass, `lengths` tokens; history would have to match anew for that."""
        if (why := self._plain_for_comparison(len(lengths), last.gain)) is not None:
            return Plan.plain(len(lengths), why, self._plain_seconds)
        reason = last.reason if last.reason is Reason.EXPLORE else Reason.STILL_PAYS
        return Plan(
            lengths, last.from_history, last.drafter, reason, last.gain, last.seconds, last.stop, last.forecast
        )  # fmt: skip

    def _plain_for_comparison(self, batch: int, gain: float) -> Reason | None:
        """Why this pass is to show what plain decoding does, if it is."""
        if self._rng.random() < self.probe_share:
            return Reason.PROBE
        if gain >= _SURE:
            return None
        seen, age = self.costs.plain_age(batch)
        return Reason.REFERENCE if seen < _REFERENCES or age > _REFERENCE_AGE else None

    def _until_in_doubt(
        self, round: Round, chosen: Candidate, gain: float
    ) -> tuple[np.ndarray, UntilInDoubt]:
        """Draft lengths with room beyond those chosen, and what decides on the way how much of it is used, at that gain."""
        assert chosen.drafter is not None
        name, batch, context = chosen.drafter, round.batch, round.context
        matches = round.state.matches
        confidence = None if matches is None else matches.confidence
        lengths, own, reached, following, near, far = further(
            chosen.draft_lengths, chosen.before, round.room, chosen.alive, confidence, _ROOM,
            self.costs.prices[TARGET], context,
        )  # fmt: skip
        rate = max(gain, 1.0) / round.plain_seconds

        def step(drafting: int) -> float:
            return rate * self.costs.draft(name, drafting, context * drafting // batch)

        acceptance = self.leads[name].acceptance(self.acceptance[name].mean)
        planned = chosen.draft_lengths - chosen.before
        return lengths, UntilInDoubt(
            reached, following, round.weights, own, planned, acceptance, (near * rate, far * rate), step
        )

    @property
    def last_gain(self) -> float:
        """Gain of what runs, at least that of plain decoding."""
        known = self._known.get(self._mode)
        return 1.0 if known is None or not known.valid else max(known.gain, 1.0)

    def _due(self, arms: list[str]) -> list[str]:
        """The arms to evaluate: new ones, what runs, what is near to paying and, in turn, the stalest of the others."""
        due: list[str] = []
        others: list[str] = []
        for arm in arms:
            known = self._known.get(arm)
            if known is None:
                known = self._known[arm] = _Known(self._passes - 1)
            near = self._mode == PLAIN and known.gain > _NEAR
            (due if near or not known.valid or arm == self._mode else others).append(arm)
        if others:
            due.append(min(others, key=lambda arm: self._known[arm].looked))
        return due

    def _learn_of(self, arm: str, candidate: Candidate, state: StepState) -> None:
        """Note what an arm has to offer now."""
        known, gain = self._known[arm], self._corrected(arm, candidate, len(state.slots))
        if not math.isfinite(gain):
            gain = 0.0
        known.often *= (1 - _OFTEN_STEP) ** (self._passes - known.looked)
        known.often += _OFTEN_STEP * (gain > 1)
        if gain > _NEAR:
            if not known.weighed or self._passes - known.weighed >= _WEIGH_EVERY:
                known.together, known.weighed = self._together(candidate, state, known.often), self._passes
            gain *= known.together
        known.gain, known.looked, known.valid = gain, self._passes, True

    def _with_hysteresis(self, gains: dict[str, float]) -> str:
        """A switch must promise the margin, except the one to plain decoding, taken as soon as drafting would lose."""
        running = self._mode if self._mode in gains else PLAIN
        best = max(gains, key=gains.__getitem__)
        if best != PLAIN and gains[best] <= max(gains[running], 1.0) * (1 + self.margin):
            return running if gains[running] >= 1 else PLAIN
        return best

    def _value_of_tokens(self, state: StepState, context: int, plain_seconds: float) -> np.ndarray:
        batch = len(state.slots)
        if self.objective == "throughput" or state.waiting or batch == 1:
            self._weights, self._makespan = np.full(batch, 1 / batch), 0.0
            return self._weights
        share = context // batch
        alone = self.costs.target(1, 1, share)
        when, gain = self._alone
        if not when or self._passes - when >= _ALONE_EVERY:
            gain = self._gain_alone(state.drafters, alone, share)
            self._alone = self._passes, gain
        marginal = max(plain_seconds - alone, 0.0) / (batch - 1)
        fixed = max(plain_seconds - batch * marginal, 0.0)
        worth = fixed / gain + marginal * batch
        self._makespan = fixed / gain / worth
        last = self.lengths.last_to_finish(state.outputs, state.allowed)
        self._weights = self._makespan * last + marginal / worth
        return self._weights

    def _together(self, candidate: Candidate, state: StepState, often: float) -> float:
        """Share of a candidate's gain that stays, seen that sequences it advances unevenly do not end together.

        n passes of variance s^2 take the sequences s * sqrt(n) tokens apart; each bears its part of what that costs, but
        even the last sequence advances by a token.
        `often` says in which share of the passes the candidate would be worth it.
        """
        if not self._makespan:
            return 1.0
        tau, variance = candidate.spread
        passes = max(often * float(state.allowed.max()) / tau, 1.0)
        drift = math.sqrt(variance * passes)
        lost = self.lengths.delay(state.outputs, state.allowed, drift) / passes
        return 1.0 - self._makespan * min(lost, tau - 1.0) / tau

    def _gain_alone(self, drafters: tuple[str, ...], plain_seconds: float, context: int) -> float:
        """Largest gain expected for a single sequence, at the mean acceptance; at least 1."""
        prices = self.costs.prices
        gains = [
            gain_alone(
                self.acceptance[name].mean, self.longest, prices[TARGET], plain_seconds, prices[name], context
            )
            for name in drafters
            if name in self.acceptance
        ]
        return max(gains, default=1.0)

    # --- learning --------------------------------------------------------------------------------------

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        rests = plan.reason is Reason.NOT_WORTH and self._rest > 0  # of a rest, the last pass is enough
        behind = self._own_caches.observe(plan, state)
        if not rests:
            self._learn_pass(state, plan, outcome, behind)
        if self._looked and math.isfinite(outcome.decision_seconds):
            self._decisions.append(outcome.decision_seconds)
            self.deciding = median_low(self._decisions)
        self._learn_gain(state, plan.forecast, outcome, behind)
        if outcome.finished.any():
            gone = state.slots[outcome.finished]
            cut_off = outcome.emitted >= state.allowed
            lengths = np.where(cut_off, np.inf, state.outputs + outcome.emitted)
            self.lengths.observe(lengths[outcome.finished])
            self.forget(gone)

    def _learn_pass(self, state: StepState, plan: Plan, outcome: StepOutcome, behind: bool) -> None:
        """What the target and, unless it was `behind`, the drafter took, and how much of the drafts was accepted."""
        batch, context = len(state.slots), int(state.lengths.sum())
        rows = batch + int(plan.draft_lengths.sum())
        self.costs.observe_target(batch, rows, context, outcome.target_seconds)
        if plan.drafter is not None and rows > batch:
            own = plan.draft_lengths - plan.from_history
            drafted = own if outcome.drafted is None else outcome.drafted
            if not behind:
                self.costs.observe_drafting(
                    plan.drafter, context, drafted, plan.from_history, outcome.draft_seconds
                )
            self._learn_acceptance(plan.drafter, state, plan, outcome, own)

    def _learn_gain(self, state: StepState, forecast: object, outcome: StepOutcome, behind: bool) -> None:
        """What the pass was worth, also if nothing came of its drafts; nothing if only some sequences took part."""
        if not isinstance(forecast, _Forecast) or len(state.slots) != len(forecast.slots):
            return
        if outcome.seconds <= 0:
            return
        weights, planned = np.empty_like(forecast.weights), np.argsort(forecast.slots)
        weights[np.argsort(state.slots)] = forecast.weights[planned]  # the order may differ
        worth = float(weights @ np.minimum(outcome.accepted + 1, state.allowed))
        gain = worth * forecast.plain_seconds / outcome.seconds
        if not behind:
            self.arbiter.observe(forecast.arm, len(state.slots), forecast.gain, gain)
        if forecast.instead is not None:
            worth *= forecast.together
            self.arbiter.charge(outcome.seconds - worth * forecast.plain_seconds / forecast.instead)

    def _learn_acceptance(
        self, drafter: str, state: StepState, plan: Plan, outcome: StepOutcome, own: np.ndarray
    ) -> None:
        reached = outcome.accepted >= plan.from_history
        tried, accepted = (
            np.where(reached, own, 0),
            np.where(reached, outcome.accepted - plan.from_history, 0),
        )
        self.acceptance[drafter].observe(state.slots, tried, accepted)
        if outcome.leads is not None:
            self.leads[drafter].observe(outcome.leads, tried, accepted)

    def add_drafter(self, name: str, cost: PassCost) -> None:
        """It drafts by itself only, not behind history, and has a cache of its own; see `SpeculationPolicy.add_drafter`."""
        self._own_caches.add(name)
        self._rest = self._held = 0
        if self.costs.model.passes.get(name) == cost:
            return
        self.costs.add(name, cost)
        self.arbiter.add(name)
        self.acceptance[name], self.leads[name] = AcceptanceTracker(self.longest), Leads()
        self._known.pop(name, None)
        self._compile()

    def observe_shadow(self, drafter: str, slots: np.ndarray, accepted: np.ndarray) -> None:
        if drafter in self.acceptance:
            self.acceptance[drafter].observe(slots, np.ones_like(slots), accepted)

    def after_update(self) -> None:
        for tracker in self.acceptance.values():
            tracker.discount(_KEPT_BY_UPDATE)
        self.arbiter.discount(_KEPT_BY_UPDATE)
        self._own_caches.clear()
        self._rest = self._held = 0

    def _fade(self) -> None:
        """What is not used is known less and less, so that it is tried again: no verdict is for ever."""
        self.costs.fade(_FADE)
        self.arbiter.fade(self._mode, _FADE)
        for name, tracker in self.acceptance.items():
            if name not in self._mode.split("+"):
                tracker.discount(_FADE)

    def forget(self, slots: np.ndarray) -> None:
        left = (self._slots[:, None] != slots).all(1)
        if not left.all():
            self._held = 0  # others may take their places
        self._slots = self._slots[left]
        if not self._slots.size:
            self._rest = 0
        self._own_caches.forget(slots)
        for tracker in self.acceptance.values():
            tracker.forget(slots)
