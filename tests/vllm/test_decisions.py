"""Between vLLM's scheduler and a policy, and costs measured while serving; no vLLM runs here."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from always_history import AlwaysHistory

from rollout_spec.config import SpeculationConfig
from rollout_spec.integrations.vllm import decisions as decisions_module
from rollout_spec.integrations.vllm.arguments import _graph_table
from rollout_spec.integrations.vllm.choose_policy import draft_lengths, longest_beside_drafts
from rollout_spec.integrations.vllm.decisions import WATCH_TOKENS, Decision, Decisions, Ended, Live, Verified
from rollout_spec.integrations.vllm.online_calibration import LATE_STEPS, STEPS, SelfCalibrating, StepTiming
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off, RandomLengths, Stateless
from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost
from rollout_spec.policy.records import Matches, PassTiming, Plan, Reason, StepOutcome, StepState


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock by which a decision takes `ticks.seconds`, however busy the machine is."""
    given = SimpleNamespace(seconds=1e-6)
    count = itertools.count()
    monkeypatch.setattr(
        decisions_module, "time", SimpleNamespace(perf_counter=lambda: given.seconds * next(count))
    )
    return given


class Recording(Stateless):
    """Fixed(4) that keeps what it is told."""

    def __init__(self) -> None:
        self.states: list[StepState] = []
        self.told: list[tuple[StepState, Plan, StepOutcome]] = []
        self.forgotten: list[int] = []

    def plan(self, state: StepState) -> Plan:
        self.states.append(state)
        return Fixed(4).plan(state)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        self.told.append((state, plan, outcome))

    def forget(self, slots: np.ndarray) -> None:
        self.forgotten += slots.tolist()


def live(*names: str, allowed: int = 50) -> list[Live]:
    return [Live(name, 30, 10, allowed) for name in names]


class Foretelling(Recording):
    """Forecasts the number of the plan."""

    def plan(self, state: StepState) -> Plan:
        return dataclasses.replace(super().plan(state), forecast=len(self.states))


def test_a_policy_is_told_what_it_forecast_of_this_pass_and_not_of_the_next() -> None:
    policy = Foretelling()
    decisions = Decisions(policy, "nf4", range(5))
    made = [decisions.decide(live("a"), 0) for _ in range(3)]
    for before, now in itertools.pairwise(made):
        decisions.observe(before, now, [Verified("a", 4, 3, False)], 0.1, True)
    assert [plan.forecast for _, plan, _ in policy.told] == [1, 2]


def test_a_request_keeps_its_slot_until_it_is_gone() -> None:
    policy = Recording()
    decisions = Decisions(policy, "nf4", range(5))
    before = decisions.decide(live("a", "b", "c"), 0)
    assert before.draft_length == 4 and policy.states[0].slots.tolist() == [0, 1, 2]
    now = decisions.decide(live("c", "a", "d"), 0)
    assert policy.states[1].slots.tolist() == [2, 0, 3]
    decisions.observe(before, now, [Verified("b", 4, 2, True), Verified("c", 4, 5, False)], 0.01, True)
    assert policy.forgotten == [1]
    decisions.decide(live("e", "a"), 0)
    assert policy.states[2].slots.tolist() == [1, 0]
    decisions.forget_others(["a"])
    assert sorted(policy.forgotten) == [1, 1, 2, 3]


def test_the_policy_hears_of_the_pass_it_planned() -> None:
    """The plan made when a step was scheduled meets what the next step verified, in that step's order."""
    policy = Recording()
    decisions = Decisions(policy, "nf4", range(5))
    first = decisions.decide(live("a", "b"), 0)
    second = decisions.decide(live("b", "a", "new"), 0)
    decisions.observe(first, second, [Verified("b", 4, 1, False), Verified("a", 3, 4, True)], 0.02, True)
    (state, plan, outcome), *more = policy.told
    assert not more and state.slots.tolist() == [1, 0]
    assert plan.draft_lengths.tolist() == [4, 3] and plan.drafter == "nf4"
    assert outcome.accepted.tolist() == [0, 3] and outcome.emitted.tolist() == [1, 4]
    assert outcome.finished.tolist() == [False, True]
    assert outcome.draft_seconds + outcome.target_seconds == pytest.approx(0.02)
    assert outcome.decision_seconds == decisions.looking > 0


def test_steps_that_did_something_else_teach_nothing() -> None:
    policy = Recording()
    decisions = Decisions(policy, "nf4", range(5))
    first = decisions.decide(live("a"), 0)
    decisions.observe(first, Decision(0), [Verified("a", 4, 5, False)], 0.5, False)
    decisions.observe(first, Decision(0), [Verified("a", 4, 5, False), Verified("x", 4, 5, False)], 0.5, True)
    assert not policy.told


def test_k_is_one_that_the_runner_has_graphs_for() -> None:
    decisions = Decisions(Fixed(5), "nf4", [8, 4, 1])
    assert decisions.decide(live("a"), 0).draft_length == 4
    assert decisions.decide(live("a", allowed=4), 0).draft_length == 1
    assert decisions.decide(live("a", allowed=1), 0).draft_length == 0
    assert decisions.decide([], 0) == Decision(0)
    assert decisions.reasons == {Reason.FIXED: 2, Reason.LAST_TOKEN: 1}
    assert decisions.draft_lengths == {4: 1, 1: 1, 0: 1}


@pytest.mark.parametrize(("planned", "carried_out"), [(1, 0), (2, 4), (3, 4), (5, 4), (64, 8)])
def test_k_is_rounded_up_where_there_is_none_shorter(planned: int, carried_out: int) -> None:
    """Few sequences leave V2 few lengths: a policy that wants three tokens would otherwise never draft."""
    decisions = Decisions(Fixed(planned), "nf4", [0, 4, 8])
    assert decisions.decide(live("a", allowed=100), 0).draft_length == carried_out
    assert decisions.decide(live("a", allowed=4), 0).draft_length == 0  # no more than three are of use


def test_nobody_to_draft() -> None:
    decisions = Decisions(Fixed(4), None, range(5))
    assert decisions.decide(live("a"), 0).draft_length == 0
    assert decisions.reasons == {Reason.NO_DRAFTER: 1}


@pytest.mark.parametrize(("emitted", "aside"), [(1, True), (2, False)])
def test_a_drafter_that_is_hardly_accepted_is_set_aside(
    emitted: int, aside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    decisions = Decisions(Fixed(4), "nf4", range(5), least_acceptance=0.3)
    for _ in range(WATCH_TOKENS + 1):
        before = decisions.decide(live("a"), 0)
        decisions.observe(before, before, [Verified("a", 4, emitted, False)], 0.01, True)
    assert (decisions.set_aside is not None) is aside
    assert len([x for x in caplog.records if "drafter set aside" in x.message]) == aside
    assert decisions.decide(live("a"), 0).draft_length == (0 if aside else 4)
    decisions.after_update()
    assert decisions.set_aside is None and decisions.decide(live("a"), 0).draft_length == 4


# --- history -------------------------------------------------------------------------------------------------------


class TestHistory:
    @pytest.fixture
    def policy(self) -> AlwaysHistory:
        return AlwaysHistory(4)

    @pytest.fixture
    def decisions(self, policy: AlwaysHistory) -> Decisions:
        return Decisions(policy, "nf4", range(5), least_acceptance=0.3, history=True)

    def matches(self, *lengths: int) -> Matches:
        return Matches(np.array(lengths, np.int64), np.full(len(lengths), 0.5))

    def test_the_drafter_draws_nothing_for_it(self, decisions: Decisions) -> None:
        decision = decisions.decide(live("a", "b"), 0, matches=self.matches(3, 0))
        assert decision.by_history and decision.draft_length == 0 and decision.longest == 3
        assert decisions.draft_lengths == {3: 1} and decisions.drafters == {"history": 1}

    def test_a_revised_decision_counts_once(self, decisions: Decisions) -> None:
        decision = decisions.decide(live("a", "b"), 0, matches=self.matches(3, 0))
        looking = decisions.looking
        revised = decisions.revise(decision, live("b"), 0, self.matches(2))
        assert revised.requests == ("b",) and revised.longest == 2 and decisions.looking > looking
        assert +decisions.draft_lengths == {2: 1} and +decisions.drafters == {"history": 1}
        none = decisions.revise(revised, live("b"), 0, self.matches(0))
        assert not none.by_history and +decisions.draft_lengths == {0: 1} and not +decisions.drafters

    def test_the_policy_hears_whose_drafts_they_were(
        self, decisions: Decisions, policy: AlwaysHistory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[Plan, StepOutcome]] = []
        monkeypatch.setattr(policy, "observe", lambda state, plan, outcome: told.append((plan, outcome)))
        before = decisions.decide(live("a", "b"), 0, matches=self.matches(3, 4))
        now = decisions.decide(live("a", "b"), 0, matches=self.matches(0, 0))
        decisions.observe(before, now, [Verified("a", 3, 4, False), Verified("b", 2, 1, False)], 0.02, True)
        ((plan, outcome),) = told
        assert plan.drafter is None and plan.from_history.tolist() == plan.draft_lengths.tolist() == [3, 2]
        assert outcome.accepted.tolist() == [3, 0] and outcome.draft_seconds == 0.0

    def test_its_misses_are_not_the_drafters(self, decisions: Decisions) -> None:
        for _ in range(WATCH_TOKENS + 1):
            before = decisions.decide(live("a"), 0, matches=self.matches(4))
            decisions.observe(before, before, [Verified("a", 4, 1, False)], 0.01, True)
        assert decisions.set_aside is None

    def test_it_goes_on_where_the_drafter_is_set_aside(self, decisions: Decisions) -> None:
        decisions.set_aside = "for a test"
        assert decisions.rest(1) is None
        assert decisions.decide(live("a"), 0, matches=self.matches(4)).by_history
        decisions.history = False
        rested = decisions.rest(1)
        assert rested is not None and rested.plan is not None and rested.plan.reason is Reason.NO_DRAFTER

    def test_it_is_searched_only_where_the_policy_looks(
        self, ticks: SimpleNamespace, policy: AlwaysHistory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last step of a rest is observed, but nobody looks; and the price of a look has both its searches."""
        decisions = Decisions(policy, "nf4", range(5), history=True)
        looked = decisions.decide(live("a"), 0, began=-1e-3, matches=self.matches(4))
        before = decisions.looking
        decisions.revise(looked, live("a"), 0, self.matches(4), began=-1e-3)
        assert looked.looked and decisions.looking > 1.9 * before > 1e-3
        looks = iter([False, True])
        monkeypatch.setattr(policy, "looks", lambda batch: next(looks))
        monkeypatch.setattr(policy, "plan", lambda state: Plan.plain(1, Reason.NOT_WORTH))
        assert decisions.looks and decisions.rest(1) is None and not decisions.looks
        last = decisions.decide(live("a"), 0)
        assert last.state is not None and not last.looked and decisions.looks

    def test_while_costs_are_measured_it_waits(self) -> None:
        made = SelfCalibrating("nf4", make, 8)
        decisions = Decisions(made, "nf4", range(9), history=True)
        for _ in range(STEPS // 2):
            decision = decisions.decide(live("a"), 0, matches=self.matches(8))
            if not decision.draft_length:  # else the drafter has drafted by then
                assert decisions.revise(decision, live("a"), 0, self.matches(8)) is decision
        assert decisions.reasons == {Reason.EXPLORE: STEPS // 2}


# --- costs ---------------------------------------------------------------------------------------------------------

TRUE = CostModel(
    {
        TARGET: PassCost(2e-3, 1e-5, 1e-3, 2e-5, 1e-8),
        "nf4": PassCost(5e-4, 1e-5, 3e-4, 1e-5, 1e-8),
    }
)


def true_seconds(batch: int, verified: int, drafting: int, kv_tokens: int, truth: CostModel = TRUE) -> float:
    return truth.target(batch, batch + verified, kv_tokens) + drafting * truth.draft("nf4", batch, kv_tokens)


def make(costs: CostModel) -> AutomaticPolicy:
    return AutomaticPolicy(costs, longest=8, ragged=False)


def run(
    decisions: Decisions,
    batch: int,
    steps: int,
    noise: float = 0.0,
    seed: int = 0,
    slower: float = 1.0,
    truth: CostModel = TRUE,
    lag: float = 0.0,
    late: bool | None = None,
) -> list[int]:
    """Requests that never end, drafts accepted with 0.9 each; K of every step. As the scheduler does, steps that
    verify nothing may rest. Drafts are `late` if `decisions` take them to be; the host needs `lag` seconds for what a step
    that verified drafts emitted."""
    rng = np.random.default_rng(seed)
    chosen, before, length, behind = [], Decision(0), 100, False
    for _ in range(steps):
        drafted = 0 if before.dropped else before.draft_length
        now = None if drafted else decisions.rest(batch)
        now = now or decisions.decide([Live(f"r{batch}.{i}", length, 50, 10_000) for i in range(batch)], 0)
        drafting = (before if (decisions.late if late is None else late) else now).draft_length
        accepted = [next((j for j in range(drafted) if rng.random() > 0.9), drafted) for _ in range(batch)]
        verified = [Verified(f"r{batch}.{i}", drafted, 1 + n, False) for i, n in enumerate(accepted)]
        seconds = true_seconds(batch, batch * drafted, drafting, batch * length, truth)
        seconds, behind = max(seconds, lag * behind), drafted > 0
        seconds *= slower * float(np.exp(noise * rng.standard_normal()))
        decisions.observe(before, now, () if before.state is None else verified, seconds, True)
        chosen.append(now.draft_length)
        before = now
    return chosen


def test_the_first_steps_measure_what_the_costs_are() -> None:
    kept: list[list[PassTiming]] = []
    calibrating = SelfCalibrating("nf4", make, 8, keep=lambda timings: kept.append(list(timings)))
    chosen = run(Decisions(calibrating, "nf4", range(9)), 4, STEPS + 30)
    assert chosen[:8] == [0, 0, 4, 4, 0, 0, 4, 4]
    assert calibrating.policy is not None and len(kept) == 1
    for timing in kept[0]:
        rows = timing.rows if timing.kind == TARGET else timing.batch
        assert timing.seconds == pytest.approx(
            TRUE.passes[timing.kind].seconds(4, rows, timing.kv_tokens), rel=0.02
        )
    assert [(x.kind, x.batch, x.rows) for x in kept[0]] == [(TARGET, 4, 4), (TARGET, 4, 20), ("nf4", 4, 4)]
    assert set(chosen[-20:]) - {0}  # and then it drafts, which pays in this world


def test_drafts_that_are_late_are_told_from_their_verification() -> None:
    """Their time falls into the step that verifies them, so some are made that no step verifies; and a plain step after
    others that emitted much shows how far the host was behind, not what plain steps take."""
    calibrating = SelfCalibrating("nf4", make, 8, late=True)
    decisions = Decisions(calibrating, "nf4", range(9), late=True)
    chosen = run(decisions, 4, LATE_STEPS + 40, lag=0.02)
    assert chosen[:8] == [0, 0, 0, 4, 0, 4, 4, 4]
    timings = calibrating.timings
    assert [(x.kind, x.batch, x.rows) for x in timings] == [(TARGET, 4, 4), (TARGET, 4, 20), ("nf4", 4, 4)]
    draft = TRUE.draft("nf4", 4, 400)
    assert timings[0].seconds == pytest.approx(TRUE.target(4, 4, 400), rel=0.02)
    assert timings[2].seconds == pytest.approx(draft, rel=0.02)
    assert timings[1].seconds == pytest.approx(max(0.02 - 4 * draft, TRUE.target(4, 20, 400)), rel=0.02)


def test_a_step_after_one_of_another_kind_shows_no_cost() -> None:
    """Where drafts are late the host is still busy with the tokens of a step that verified, or not yet busy."""
    calibrating = SelfCalibrating("nf4", make, 8, late=True)
    for turn in range(LATE_STEPS):
        kind = ((0, 0, 0.004), (0, 4, 0.012), (16, 4, 0.015))[turn % 3]
        calibrating.observe_step(
            StepTiming(4, *kind[:2], 400, kind[2] if turn % 4 == 0 else 0.5, turn % 4 == 0)
        )
    assert [x.seconds for x in calibrating.timings] == pytest.approx([0.004, 0.007, 0.002])


def test_what_the_host_was_behind_is_not_learnt_as_the_cost_of_a_plain_step() -> None:
    policy = make(TRUE)
    decisions = Decisions(policy, "nf4", range(9), late=True)
    policy.plan = RandomLengths(0, longest=8, off=0.5).plan  # type: ignore[method-assign]
    run(decisions, 4, 600, lag=0.03)
    assert policy.costs.target(4, 4, 400) == pytest.approx(TRUE.target(4, 4, 400), rel=0.05)


def test_late_drafts_taken_for_punctual_ones_seem_to_cost_nothing() -> None:
    """The control: all of their time looks like verification, as it did on an H200."""
    calibrating = SelfCalibrating("nf4", make, 8)
    run(Decisions(calibrating, "nf4", range(9)), 4, STEPS + 8, late=True)
    assert calibrating.timings[2].seconds < 0.5 * TRUE.draft("nf4", 4, 400)


# Much like an H200's for a 7B model (`benchmarks/results/gpu`): a draft costs 0.6 of a plain step, and plain steps hardly
# more for 16 sequences than for one.
H200 = CostModel(
    {
        TARGET: PassCost(2e-4, 1e-5, 4.2e-3, 2.0e-5, 1e-8),
        "nf4": PassCost(2e-4, 5e-6, 2.5e-3, 3.0e-5, 1e-8),
    }
)


@pytest.mark.parametrize(
    ("batch", "lag"),
    [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 0), (64, 0.012), (128, 0.025)],
)
def test_late_drafts_are_made_where_they_pay(batch: int, lag: float) -> None:
    """After calibration, tokens take hardly longer than with the best K, plain decoding among them."""
    calibrating = SelfCalibrating("nf4", make, 8, late=True)
    decisions = Decisions(calibrating, "nf4", range(9), late=True)
    for other in sorted({1, batch}):
        run(decisions, other, LATE_STEPS + 8, truth=H200, lag=lag)
    chosen = run(decisions, batch, 400, noise=0.02, seed=1, truth=H200, lag=lag)[100:]

    def took(length: int) -> float:
        return max(true_seconds(batch, batch * length, length, batch * 100, H200), lag * (length > 0))

    def tokens(length: int) -> float:
        return sum(0.9**i for i in range(length + 1))

    best = min(took(length) / tokens(length) for length in range(9))
    assert sum(map(took, chosen)) / sum(map(tokens, chosen)) <= 1.04 * best, chosen[-40:]


def test_each_range_of_batches_is_measured_once_and_kept() -> None:
    calibrating = SelfCalibrating("nf4", make, 8)
    decisions = Decisions(calibrating, "nf4", range(9))
    for batch in (1, 4, 16):
        run(decisions, batch, STEPS + 5)
    assert sorted({x.batch for x in calibrating.timings}) == [1, 4, 16]
    again = SelfCalibrating("nf4", make, 8, calibrating.timings)
    assert Reason.EXPLORE not in {again.plan(state(5)).reason for _ in range(3)}
    assert again.plan(state(200)).reason == Reason.EXPLORE


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("longest", [2, 16])
@pytest.mark.parametrize("most", [1, 2, 4, 64])
def test_costs_are_measured_however_few_sequences_there_may_be(most: int, longest: int, v2: bool) -> None:
    """vLLM looks K up by batch size and so sees the first `max_num_seqs` rows of its table; the policy sees enough."""
    arguments = _graph_table(SpeculationConfig(longest_draft=longest))
    captured = ([k for *_, k in arguments] + [0] * most)[:most]
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=longest, num_speculative_tokens_per_batch_size=arguments
        ),
        use_v2_model_runner=v2,
        model_config=SimpleNamespace(enforce_eager=False),
    )
    lengths = draft_lengths(config, captured)
    assert 0 in captured and (not v2 or most == 1 or set(lengths) == set(captured))
    calibrating = SelfCalibrating("nf4", make, longest, lengths=lengths)
    run(Decisions(calibrating, "nf4", lengths), 1, STEPS + 5)
    assert calibrating.policy is not None
    assert {x.rows for x in calibrating.timings if x.kind == TARGET} == {1, 1 + min(longest, 4)}


def test_costs_are_measured_with_a_length_that_there_is() -> None:
    """A table of one's own may have none that is as short as the usual one."""
    lengths = draft_lengths(
        SimpleNamespace(
            speculative_config=SimpleNamespace(
                num_speculative_tokens=8, num_speculative_tokens_per_batch_size=[[1, 4, 6], [5, 8, 0]]
            ),
            use_v2_model_runner=False,
        ),
        [6] * 4,
    )
    calibrating = SelfCalibrating("nf4", make, 8, lengths=lengths)
    run(Decisions(calibrating, "nf4", lengths), 1, STEPS + 5)
    assert {x.rows for x in calibrating.timings if x.kind == TARGET} == {1, 7}


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 252),
        ({"method": "dflash"}, 251),
        ({"draft_model_config": SimpleNamespace(max_model_len=128)}, 124),
        ({"quantization": "rollout_spec_nf4"}, None),
    ],
)
def test_how_long_sequences_may_be_beside_drafts(changes: dict[str, object], longest: int | None) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 4, "draft_model_config": None} | changes
    config = SimpleNamespace(speculative_config=SimpleNamespace(**speculative), use_v2_model_runner=False)
    assert longest_beside_drafts(config, 256) == longest
    config.use_v2_model_runner = True
    assert longest_beside_drafts(config, 256) is None


def state(batch: int, drafters: tuple[str, ...] = ("nf4",)) -> StepState:
    ones = np.ones(batch, np.int64)
    return StepState(np.arange(batch), ones * 100, ones * 50, ones * 1000, drafters)


def test_nothing_is_learnt_before_every_kind_of_step_was_seen() -> None:
    calibrating = SelfCalibrating("nf4", make, 8)
    for _ in range(3 * STEPS):
        calibrating.observe_step(StepTiming(4, 0, 0, 400, 0.003))
    assert calibrating.policy is None and not calibrating.timings
    assert calibrating.plan(state(4, ())).reason == Reason.NO_DRAFTER


@pytest.mark.parametrize("found", [0.05, 0.6])
def test_costs_are_measured_with_a_drafter_that_finds_what_it_finds(found: float) -> None:
    """N-grams draft for some requests, as far as they match; and one request in a batch may not draft at all."""
    chance = np.random.default_rng(3)
    calibrating = SelfCalibrating("nf4", make, 8)
    decisions, verified = Decisions(calibrating, "nf4", range(9)), 0
    for _ in range(1000):
        if calibrating.policy is not None:
            break
        asked = decisions.decide(live("a", "b", "c", "d", allowed=10_000), 0).draft_length
        seconds = true_seconds(4, verified, asked, 400)
        calibrating.observe_step(StepTiming(4, verified, asked, 400, seconds))
        verified = int((chance.integers(1, 5, 4) * (chance.random(4) < found)).sum()) if asked else 0
    assert calibrating.policy is not None and not calibrating._steps
    assert 4 < calibrating.timings[1].rows < 20
    for timing in calibrating.timings:
        rows = timing.rows if timing.kind == TARGET else 4
        assert timing.seconds == pytest.approx(TRUE.passes[timing.kind].seconds(4, rows, 400), rel=0.1)


def test_steps_are_not_kept_for_ever() -> None:
    calibrating = SelfCalibrating("nf4", make, 8)
    for turn in range(50 * STEPS):  # drafts are asked for, and none come
        calibrating.observe_step(StepTiming(4, 0, 4 * (turn % 2), 400, 0.003))
    assert calibrating.policy is None
    assert sum(len(kept) for kinds in calibrating._steps.values() for kept in kinds.values()) < 100


def test_costs_come_from_the_kinds_of_steps_there_are() -> None:
    """Of those wanted, one does not come here: steps that draft without verifying. It is waited for while drafts are asked for."""
    calibrating = SelfCalibrating("nf4", make, 8)
    for turn in range(50 * STEPS):
        calibrating.observe_step(StepTiming(4, 16 * (turn % 2), 0, 400, 0.1))
    for turn in range(50 * STEPS):
        calibrating.plan(state(4))
        kind = ((0, 0, 0.004), (16, 0, 0.006), (16, 4, 0.010))[turn % 3]
        calibrating.observe_step(StepTiming(4, *kind[:2], 400, kind[2]))
    assert [x.seconds for x in calibrating.timings] == pytest.approx([0.004, 0.006, 0.001])


def test_whole_steps_are_enough_to_correct_both_costs() -> None:
    """Calibrated costs that are wrong in opposite directions come right, though only whole steps are timed."""
    wrong = CostModel(
        {
            TARGET: PassCost(3e-3, 1e-5, 1.5e-3, 3e-5, 1e-8),
            "nf4": PassCost(2.5e-4, 1e-5, 1.5e-4, 5e-6, 1e-8),
        }
    )
    policy = make(wrong)
    decisions = Decisions(policy, "nf4", range(9))
    planner = RandomLengths(0, longest=8, off=0.3)
    policy.plan = planner.plan  # type: ignore[method-assign]
    run(decisions, 4, 1500, noise=0.05)
    for rows in (4, 20, 36):
        assert policy.costs.target(4, rows, 400) == pytest.approx(TRUE.target(4, rows, 400), rel=0.15)
    assert policy.costs.draft("nf4", 4, 400) == pytest.approx(TRUE.draft("nf4", 4, 400), rel=0.15)


def test_off_asks_nobody() -> None:
    decisions = Decisions(Off(), "nf4", range(5))
    assert set(run(decisions, 4, 20)) == {0} and decisions.reasons == {Reason.OFF: 20}


# --- rests ---------------------------------------------------------------------------------------------------------

DEAR = CostModel({TARGET: TRUE.passes[TARGET], "nf4": PassCost(2e-2, 1e-4, 1e-2, 1e-4, 1e-8)})


class TestRests:
    """Where drafting does not pay, steps cost nothing but counters, and what has to be known is still learnt."""

    @pytest.fixture
    def policy(self, monkeypatch: pytest.MonkeyPatch) -> AutomaticPolicy:
        policy = make(DEAR)
        self.asked: list[StepState] = []
        plan = policy.plan

        def asking(state: StepState) -> Plan:
            self.asked.append(state)
            return plan(state)

        monkeypatch.setattr(policy, "plan", asking)
        return policy

    def test_most_steps_rest_and_every_one_is_counted(self, policy: AutomaticPolicy) -> None:
        decisions = Decisions(policy, "nf4", range(9))
        assert set(run(decisions, 4, 400)) == {0}
        looked = sum(1 for state in self.asked if state.lengths.any())
        assert len(self.asked) == 400 and looked < 120
        assert decisions.reasons == {Reason.NOT_WORTH: 400} and decisions.draft_lengths == {0: 400}

    def test_what_plain_steps_cost_now_is_learnt_from_the_last_of_a_rest(
        self, policy: AutomaticPolicy
    ) -> None:
        decisions = Decisions(policy, "nf4", range(9))
        run(decisions, 4, 400, slower=1.5)
        assert policy.costs.target(4, 4, 400) == pytest.approx(1.5 * TRUE.target(4, 4, 400), rel=0.02)

    def test_dear_decisions_make_for_longer_rests(
        self, policy: AutomaticPolicy, ticks: SimpleNamespace
    ) -> None:
        looks = []
        for ticks.seconds in (1e-6, 1e-3):
            self.asked.clear()
            run(Decisions(policy, "nf4", range(9)), 4, 900)
            assert policy.deciding == pytest.approx(ticks.seconds, rel=0.4)
            looks.append(sum(1 for state in self.asked[600:] if state.lengths.any()))
        assert looks[1] < 0.2 * looks[0]

    def test_a_new_batch_size_ends_a_rest(self, policy: AutomaticPolicy) -> None:
        decisions = Decisions(policy, "nf4", range(9))
        run(decisions, 4, 50)
        while decisions.rest(4) is None:
            decisions.decide(live("a", "b", "c", "d"), 0)
        assert decisions.rest(16) is None

    def test_lengths_of_what_ends_in_a_rest_are_kept(self, policy: AutomaticPolicy) -> None:
        decisions = Decisions(policy, "nf4", range(9))
        decisions.decide(live("a", "b"), 0)
        decisions.ended([Ended("a", 70, False), Ended("unseen", 90, True)])
        seen = policy.lengths._finished
        assert seen.tolist() == [70.0, np.inf]
        costs = policy.costs.target(2, 2, 60)
        assert costs == TRUE.target(2, 2, 60)  # no time was taken from it
        decisions.decide(live("c", "b"), 0)
        assert self.asked[-1].slots.tolist() in ([0, 1], [2, 1])  # the slot of one that ended is free again

    def test_a_drafter_set_aside_is_not_asked_about(self, policy: AutomaticPolicy) -> None:
        decisions = Decisions(policy, "nf4", range(9))
        decisions.set_aside = "on purpose"
        assert set(run(decisions, 4, 30)) == {0} and not self.asked
        assert decisions.reasons == {Reason.NO_DRAFTER: 30}

    def test_costs_that_are_not_known_leave_no_rest(self) -> None:
        calibrating = SelfCalibrating("nf4", make, 8)
        assert calibrating.looks(4)
        run(Decisions(calibrating, "nf4", range(9)), 4, STEPS + 5)
        assert calibrating.looks(64)
        calibrating.policy = make(DEAR)
        run(Decisions(calibrating, "nf4", range(9)), 4, 50)
        looks = []
        for _ in range(12):
            calibrating.plan(state(4))
            looks.append(calibrating.looks(4))
        assert set(looks) == {True, False}


def test_a_draft_of_unknown_duration_teaches_no_cost() -> None:
    """The step that made the drafts also prefilled: what of its time was drafting is not known."""
    policy = Recording()
    decisions = Decisions(policy, "nf4", range(5))
    first, second = decisions.decide(live("a"), 0), decisions.decide(live("a"), 0)
    decisions.observe(Decision(0), first, (), 0.5, False)
    decisions.observe(first, second, [Verified("a", 4, 3, False)], 0.01, True)
    (_, _, outcome), *more = policy.told
    assert not more and np.isnan(outcome.draft_seconds)
