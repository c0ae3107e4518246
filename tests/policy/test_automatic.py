"""The automatic policy's decisions, on invented costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.policy.automatic import HOLD, AutomaticPolicy
from rollout_spec.policy.candidates import Candidate
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import HISTORY, Matches, Plan, Reason, StepOutcome

from .invented import COSTS, policy, run, seen, state


def test_a_match_without_room_is_no_match():
    made = policy()
    plan = made.plan(
        state(2, allowed=[1, 10], drafters=(), matches=Matches(np.array([4, 0]), np.array([0.9, 0.0])))
    )
    assert plan.reason is Reason.NO_DRAFTER


def test_speculates_alone_and_not_in_a_crowd():
    assert policy().plan(state(1)).drafter == "nf4"
    crowd = policy(objective="throughput").plan(state(256))
    assert not crowd.speculates
    assert crowd.reason is Reason.NOT_WORTH


def test_stragglers_in_a_crowd_get_longer_drafts():
    made = policy()
    made.lengths.observe(np.array([20] * 2000 + [400, 450, 500]))
    outputs = np.full(32, 3)
    outputs[7] = 300
    plan = made.plan(state(32, outputs=outputs))
    assert plan.speculates
    assert plan.draft_lengths[7] == plan.draft_lengths.max() > np.median(plan.draft_lengths)


def ahead_alone(allowed):
    """The plan where history knows what one of eight sequences says next, after 40 passes in which it knew nothing."""
    made = policy()
    made.lengths.observe(np.full(2000, np.inf))
    known = Matches(np.array([12, *[0] * 7]), np.array([0.95, *[0.0] * 7]))
    made.plan(state(8, allowed=allowed, drafters=(), matches=known))
    made._passes += 200
    made._held = 0
    return made.plan(state(8, allowed=allowed, drafters=(), matches=known))


def test_nobody_is_hurried_who_must_wait_for_the_others():
    """All end at one limit: one that gets there sooner saves no pass."""
    assert not ahead_alone([60] * 8).speculates
    assert ahead_alone([400, *[60] * 7]).speculates


def test_throughput_objective_treats_all_alike():
    made = policy(objective="throughput")
    made.lengths.observe(np.array([20] * 60 + [400, 450, 500]))
    outputs = np.array([3, 3, 3, 300])
    assert len(set(made.plan(state(4, outputs=outputs)).draft_lengths)) == 1


def test_a_queue_makes_makespan_a_matter_of_throughput():
    made = policy()
    outputs = np.array([3, 3, 3, 300])
    assert len(set(made.plan(state(4, outputs=outputs, waiting=9)).draft_lengths)) == 1


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (state(4, drafters=()), Reason.NO_DRAFTER),
        (state(4, drafters=("unheard of",)), Reason.NO_DRAFTER),
        (state(4, allowed=1), Reason.LAST_TOKEN),
    ],
)
def test_reasons_for_plain_decoding(where, reason):
    plan = policy().plan(where)
    assert not plan.speculates
    assert plan.reason is reason


def test_nothing_beyond_what_is_on_offer_is_planned_even_if_more_rows_were_seen_to_take_less_time():
    batch, rng = 32, np.random.default_rng(0)
    made = policy()
    for _ in range(20):
        made.costs.observe_target(batch, 2 * batch, 100 * batch, 0.4)
        made.costs.observe_target(batch, 4 * batch, 100 * batch, 0.01)
    planned = 0
    for _ in range(50):
        matches = Matches(rng.integers(0, 9, batch), rng.uniform(0.5, 1.0, batch))
        plan = made.plan(state(batch, matches=matches))
        assert (plan.from_history <= matches.lengths).all()
        planned += int(plan.from_history.sum())
    assert planned > 0


def test_a_ragged_plan_costs_what_its_steps_and_its_verification_cost():
    """A draft step has as many sequences as still draft there."""
    made = seen(0.95)
    where = state(3, allowed=[2, 5, 40])
    plan, context = made.plan(where), int(where.lengths.sum())
    active = [int((plan.draft_lengths > depth).sum()) for depth in range(plan.draft_lengths.max())]
    assert len(set(active)) > 1
    drafting = sum(made.costs.draft("nf4", count, context * count // 3) for count in active)
    assert plan.seconds == pytest.approx(drafting + made.costs.target(3, 3 + sum(active), context))


def test_never_drafts_more_than_is_allowed():
    plan = policy().plan(state(3, allowed=[1, 2, 100]))
    assert (plan.draft_lengths <= [0, 1, 99]).all()


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan, -1.0])
@pytest.mark.parametrize("kind", ["target", "nf4"])
def test_absurd_costs_end_in_plain_decoding_with_a_reason(bad, kind):
    costs = CostModel(dict(COSTS.passes) | {kind: PassCost(bad, 0.0, 0.0, 0.0, 0.0)})
    made = policy(costs)
    for batch in (1, 7):
        plan = made.plan(state(batch))
        if kind == "nf4" and bad == 0.0:
            continue  # a free drafter is odd, not absurd
        assert not plan.speculates
        assert plan.reason in (Reason.BAD_COST, Reason.NOT_WORTH)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan, -1.0])
def test_absurd_timings_are_not_learnt_from(bad):
    made = policy()
    where = state(1)
    before = made.costs.target(1, 1, 100)
    plan = Plan.plain(1, Reason.OFF)
    made.observe(where, plan, StepOutcome(np.zeros(1, int), np.ones(1, int), np.zeros(1, bool), 0.0, bad))
    assert made.costs.target(1, 1, 100) == before


def test_costs_are_corrected_by_what_passes_take():
    made, slower = (
        policy(),
        CostModel({k: PassCost(3e-3, 0, 3 * c.weights, 2 * c.per_row, 0) for k, c in COSTS.passes.items()}),
    )
    run(made, state(1), 0.9, 150, costs=slower)
    assert made.costs.target(1, 1, 100) == pytest.approx(slower.target(1, 1, 100), rel=0.4)


def test_two_way_hysteresis():
    made = policy(margin=0.5)
    weak = seen(0.62)
    gain = weak.plan(state(1)).gain
    assert 1.02 < gain < 1.5
    made.acceptance = weak.acceptance

    def reasons():
        return [made.plan(state(1)).reason for _ in range(20)][HOLD:]

    assert set(reasons()) == {Reason.NOT_WORTH}  # off stays off below the margin
    made.acceptance = seen(0.95).acceptance
    assert set(reasons()) == {Reason.STILL_PAYS}
    made.acceptance = weak.acceptance
    assert set(reasons()) == {Reason.STILL_PAYS}  # on stays on above 1
    made.acceptance = seen(0.05).acceptance
    assert set(reasons()) == {Reason.NOT_WORTH}


def test_no_latch():
    """A drafter that failed is tried again, and one that recovers is used again."""
    made = policy(explore_share=0.01)
    run(made, state(1), 0.0, 50)
    bad = run(made, state(1), 0.0, 3000)
    tried = sum(plan.speculates for plan in bad)
    assert 0 < tried < 100
    good = run(made, state(1), 0.95, 4000)
    assert all(plan.speculates or plan.reason is Reason.REFERENCE for plan in good[-50:])


def test_a_useless_drafter_costs_little():
    made = policy(explore_share=0.01)
    plans = run(made, state(8), 0.0, 1000)
    assert sum(plan.speculates for plan in plans) < 30


def test_probes_are_as_frequent_as_asked_and_only_where_it_would_speculate():
    made = policy(probe_share=0.1)
    reasons = [plan.reason for plan in run(made, state(1), 0.95, 2000)]
    assert 150 < reasons.count(Reason.PROBE) < 250
    crowd = policy(probe_share=0.5, objective="throughput")
    assert Reason.PROBE not in {crowd.plan(state(256)).reason for _ in range(50)}


def test_history_drafts_alone_and_before_another():
    matches = Matches(np.array([12]), np.array([0.97]))
    alone = policy().plan(state(1, drafters=(), matches=matches))
    assert alone.drafter is None
    assert alone.draft_lengths[0] == alone.from_history[0] > 0
    cheap = CostModel(dict(COSTS.passes) | {"nf4": PassCost(0.0, 0.0, 1e-3, 0.0, 0.0)})
    short = policy(cheap).plan(state(1, matches=Matches(np.array([2]), np.array([0.98]))))
    assert short.drafter == "nf4"
    assert short.from_history[0] == 2 < short.draft_lengths[0]
    useless = policy().plan(state(1, matches=Matches(np.array([12]), np.array([0.01]))))
    assert not useless.from_history.any()


# --- planning before the tokens of the last pass are known -----------------------------------------------------------


def matching(*lengths, confidence=0.9):
    return Matches(np.array(lengths), np.where(np.array(lengths) > 0, confidence, 0.0))


def test_history_is_planned_anew_by_what_it_has_by_then():
    made = policy(behind_history=False)
    where = state(2, drafters=(), matches=matching(12, 0))
    plan = made.plan(where)
    assert plan.drafter is None and plan.draft_lengths[0] > 2 and plan.draft_lengths[1] == 0
    revised = made.revise(plan, replace(where, matches=matching(0, 12)))
    assert revised.draft_lengths.tolist() == plan.draft_lengths[::-1].tolist()
    assert revised.from_history.tolist() == revised.draft_lengths.tolist() and revised.reason is plan.reason
    assert not made.revise(plan, replace(where, matches=matching(0, 0))).speculates
    assert not made.revise(plan, replace(where, matches=matching(9, 9, confidence=0.01))).speculates


def test_history_that_was_not_foreseen_is_drafted_all_the_same():
    made = policy()
    where = state(2, drafters=(), matches=matching(0, 0))
    plan = made.plan(where)
    assert not plan.speculates
    revised = made.revise(plan, replace(where, matches=matching(12, 0)))
    assert revised.draft_lengths[0] > 2 and revised.reason is Reason.PAYS


def test_of_other_sequences_than_were_planned_for_nothing_old_is_kept():
    made = policy(behind_history=False)
    plan = made.plan(state(3, drafters=(), matches=matching(12, 12, 12)))
    left = state(1, drafters=(), matches=matching(12))
    left = replace(left, slots=np.array([2]))
    revised = made.revise(plan, left)
    assert revised.draft_lengths.shape == (1,) and revised.draft_lengths[0] > 2
    made.observe(left, revised, StepOutcome(np.array([3]), np.array([4]), np.array([False]), 0.0, 0.03))
    plan = made.plan(left)
    other = replace(left, slots=np.array([3]))
    assert made.revise(plan, left).forecast is plan.forecast is not None
    assert made.revise(plan, other).forecast is not plan.forecast


def test_a_plan_of_somebody_elses_for_other_sequences_ends_what_was_held():
    """As when the costs of a batch have just been measured, by plans that were not this policy's."""
    made = policy(behind_history=False)
    assert made.plan(state(2)).drafter == "nf4"
    crowd = state(4, matches=matching(0, 0, 0, 0))
    assert not made.revise(Plan.plain(4, Reason.EXPLORE), crowd).speculates
    assert made.plan(crowd).draft_lengths.shape == (4,)


@pytest.mark.parametrize("why", ["drafted", "probe", "resting"])
def test_what_is_not_historys_to_decide_is_left(why):
    made = policy(probe_share=1.0 if why == "probe" else 0.0)
    where = state(1, matches=matching(12)) if why == "probe" else state(1)
    if why == "resting":
        made = policy(objective="throughput")
        where = state(256)
        made.plan(where)
    plan = made.plan(where)
    assert plan.speculates == (why == "drafted")
    many = matching(*[12] * len(where.slots))
    assert made.revise(plan, replace(where, matches=many)) is plan


def test_the_price_of_history_that_never_comes_is_learnt():
    """It is always expected to match, and never does when it counts: the drafter is taken instead."""
    made = policy(behind_history=False)
    where = state(1, matches=matching(16))
    assert made.plan(where).drafter is None
    for _ in range(60):
        plan = made.revise(made.plan(where), replace(where, matches=matching(0)))
        drafting = 16e-3 * plan.draft_lengths.max() / 2 if plan.drafter else 0.0
        accepted = plan.draft_lengths
        done = np.zeros(1, bool)
        made.observe(where, plan, StepOutcome(accepted, accepted + 1, done, drafting, 25e-3))
    assert made.plan(where).drafter == "nf4"


def test_a_drafter_that_cannot_go_on_behind_history_is_not_asked_to():
    made = policy(behind_history=False)
    assert not [arm for arm in made.arbiter.arms if "+" in arm]
    plans = [made.plan(state(2, matches=matching(3, 0))) for _ in range(20)]
    assert all(plan.drafter is None or not plan.from_history.any() for plan in plans)


def test_history_may_draft_unevenly_where_a_drafter_may_not():
    made = policy(ragged=False, objective="throughput")
    lengths = made.plan(
        state(2, drafters=(), matches=Matches(np.array([16, 16]), np.array([0.95, 0.4])))
    ).draft_lengths
    assert lengths[0] > lengths[1] > 0
    assert len(set(made.plan(state(2)).draft_lengths)) == 1


def test_updates_fade_what_was_seen_of_a_drafter():
    made = policy()
    made.acceptance["nf4"].observe(np.array([0]), np.array([8]), np.array([8]))
    before = made.acceptance["nf4"].tried
    made.after_update()
    assert 0 < made.acceptance["nf4"].tried < before


terms = st.floats(1e-5, 1e-1)


@pytest.mark.parametrize("objective", ["throughput", "makespan"])
@settings(max_examples=300)
@given(
    launch=terms, weights=terms, ratio=st.floats(0.05, 1.5), row=st.floats(1e-6, 1e-2), kv=st.floats(1e-9, 1e-6),
    batch=st.integers(1, 64), less=st.integers(1, 2000), more=st.integers(1, 20000), alpha=st.floats(0.0, 0.99),
)  # fmt: skip
def test_more_context_never_turns_the_self_drafter_on(
    objective, launch, weights, ratio, row, kv, batch, less, more, alpha
):
    """A self-drafter reads the same cache as the target, so context makes drafting relatively dearer."""
    costs = CostModel(
        {
            "target": PassCost(launch, 0.0, weights, row, kv),
            "nf4": PassCost(launch, 0.0, weights * ratio, row, kv),
        }
    )
    plans = []
    for context in (less, less + more):
        made = policy(costs, objective=objective, margin=0.0)
        made.acceptance["nf4"] = seen(alpha).acceptance["nf4"]
        plans.append(made.plan(state(batch, context=context)))
    assert plans[0].speculates or not plans[1].speculates


@settings(max_examples=150)
@given(
    launch=terms, weights=terms, ratio=st.floats(0.05, 1.0), row=st.floats(1e-6, 1e-2), batch=st.integers(1, 64),
    low=st.floats(0.0, 0.97), step=st.floats(0.0, 0.5), lengths=st.lists(st.integers(1, 500), max_size=20),
)  # fmt: skip
def test_higher_acceptance_never_shortens_drafts(launch, weights, ratio, row, batch, low, step, lengths):
    costs = CostModel(
        {
            "target": PassCost(launch, 0.0, weights, row, 0.0),
            "nf4": PassCost(launch, 0.0, weights * ratio, row, 0.0),
        }
    )
    longest = []
    for alpha in (low, min(low + step, 0.98)):
        made = policy(costs, margin=0.0)
        made.lengths.observe(np.array(lengths))
        made.acceptance["nf4"] = Known(alpha)
        plans = [
            made.plan(state(batch)) for _ in range(3 * (HOLD + 1))
        ]  # the first does not know yet what drafting gains
        longest.append([plan.draft_lengths.max() for plan in plans])
    assert longest[0][0] <= longest[1][0] and longest[0][-1] <= longest[1][-1]


class Known:
    """An acceptance tracker that knows."""

    def __init__(self, alpha):
        self.alpha = self.mean = alpha

    def survival(self, slots):
        return np.tile(self.alpha ** np.arange(1.0, 17), (len(slots), 1))


def test_what_came_of_a_plan_is_weighed_by_slot():
    """The runner may carry a plan out in another order, and for fewer sequences if memory is short."""
    seen_gains = []
    for planned in (np.arange(4), np.array([2, 0, 3, 1])):
        where = state(4, outputs=np.array([3, 300, 3, 3])).take(planned)
        for order in (np.arange(4), np.array([1, 3, 0, 2]), np.array([3, 1])):
            made = policy()
            made.lengths.observe(np.array([20] * 2000 + [400, 450, 500]))
            plan = made.plan(where)
            assert plan.speculates
            done, kept = where.take(order), plan.draft_lengths[order]
            accepted = np.where(done.outputs == 300, 2, 0)
            carried = replace(plan, draft_lengths=kept, from_history=np.zeros_like(kept))
            made.arbiter.observe = lambda arm, batch, predicted, gain: seen_gains.append(gain)
            none = np.zeros(len(order), bool)
            made.observe(done, carried, StepOutcome(accepted, accepted + 1, none, 0.02, 0.03))
    assert len(seen_gains) == 4  # part of a plan says nothing about the whole
    assert seen_gains == pytest.approx(4 * seen_gains[:1])


def test_what_came_of_a_plan_is_learnt_though_others_were_made_since():
    """As in vLLM, where the next pass is planned before this one has run."""
    made, where, seen_of = policy(), state(1), []
    made.arbiter.observe = lambda arm, batch, predicted, gain: seen_of.append((arm, batch))
    plan = made.plan(where)
    crowd = state(256)
    after = made.plan(crowd)
    assert plan.speculates and not after.speculates
    accepted = plan.draft_lengths
    made.observe(where, plan, StepOutcome(accepted, accepted + 1, np.zeros(1, bool), 0.02, 0.03))
    assert seen_of == [("nf4", 1)]
    none = np.zeros(256, np.int64)
    made.observe(crowd, after, StepOutcome(none, none + 1, none.astype(bool), 0.0, 0.03))
    assert len(seen_of) == 1


def test_a_trial_is_charged_though_another_plan_was_made_since():
    made, where, charged = policy(behind_history=False), state(2, drafters=(), matches=matching(2, 0)), []
    made.arbiter.charge = charged.append
    tries = iter([HISTORY])
    made.arbiter.explore = lambda *args: next(tries, None)
    where = replace(where, matches=matching(2, 0, confidence=0.05))
    plan = made.plan(where)
    assert plan.reason is Reason.EXPLORE and plan.speculates
    assert not made.plan(where).speculates
    none = np.zeros(2, np.int64)
    plain = made.costs.target(2, 2, 200)
    made.observe(where, plan, StepOutcome(none, none + 1, np.zeros(2, bool), 0.0, 2 * plain))
    assert charged == [pytest.approx(plain, rel=0.05)]


def test_a_small_gain_waits_for_plain_passes_and_for_one_again_now_and_then():
    made = AutomaticPolicy(COSTS, probe_share=0.0, explore_share=0.0)
    plans = run(made, state(1), 0.7, 400)
    assert [plan.reason for plan in plans[:3]] == [Reason.REFERENCE] * 3
    assert plans[3].speculates
    references = [i for i, plan in enumerate(plans) if plan.reason is Reason.REFERENCE]
    assert max(np.diff([*references, len(plans)])) < 70


def test_a_price_seen_once_is_no_verdict_for_ever():
    """The first verify passes meet cold caches. What looked too dear then must be tried again, without any update."""
    made, where = seen(0.95), state(allowed=100_000)
    for rows in (2, 3, 4, 5, 6, 8, 9, 12, 17):
        for _ in range(3):
            made.costs.observe_target(1, rows, 100, 8 * COSTS.target(1, rows, 100))
    assert not any(plan.speculates for plan in run(made, where, 0.95, 40))
    plans = run(made, where, 0.95, 3000)
    drafted = [plan.speculates for plan in plans]
    assert np.mean(drafted[-200:]) > 0.9


def test_a_bad_record_is_no_verdict_for_ever():
    made, where = seen(0.95), state(allowed=100_000)
    for _ in range(200):
        made.arbiter.observe("nf4", 1, 1.0, 0.2)
    assert not any(plan.speculates for plan in run(made, where, 0.95, 40))
    drafted = [plan.speculates for plan in run(made, where, 0.95, 3000)]
    assert np.mean(drafted[-200:]) > 0.9


def test_the_variance_of_a_candidate_is_that_of_its_own_tokens():
    """Over sequences and passes; what history has ahead of a drafter's does not change how they drift apart here."""
    alive = np.array([[0.9, 0.81, 0.6, 0.5], [0.5, 0.2, 0.1, 0.1]])
    rng = np.random.default_rng(0)
    luck = rng.random((200_000, 2, 1))
    taken = (luck < alive[:, :3]).sum(-1)  # P(1..j accepted) = alive[:, j - 1]
    for certain in (np.zeros(2), np.full(2, 3.0)):
        many = certain.astype(int)
        found = Candidate("nf4", many + 3, many, certain, alive, 3, 1.0, 1.0)
        mean, variance = found.spread
        assert variance == pytest.approx(taken.var(), rel=0.02)
        assert mean == pytest.approx(1 + certain.mean() + taken.mean(), rel=0.02)
