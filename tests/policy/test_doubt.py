"""Drafting until in doubt: what a lead is worth, when to stop, and that it pays."""

from dataclasses import replace

import numpy as np
import pytest

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.doubt import Leads, UntilInDoubt, classes_of
from rollout_spec.policy.records import Plan, Reason, StepOutcome, StepState
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import from_lengths

COSTS = CostModel(
    {
        "target": PassCost(1e-3, 4e-4, 18e-3, 1.2e-3, 5e-8),
        "nf4": PassCost(1e-3, 0.0, 8e-3, 1.5e-3, 5e-8),
    }
)
SURE, TORN = 9.0, 0.01


# --- what a lead is worth


def test_acceptance_is_learnt_by_lead():
    leads, rng = Leads(), np.random.default_rng(0)
    for _ in range(400):
        found = np.where(rng.random((4, 5)) < 0.3, TORN, SURE)
        hits = rng.random((4, 5)) < np.where(found == TORN, 0.5, 0.99)
        leads.observe(found, np.full(4, 5), np.cumprod(hits, 1).sum(1))
    torn, sure = leads.acceptance(0.8)[classes_of(np.array([TORN, SURE]))]
    assert torn == pytest.approx(0.5, abs=0.04)
    assert sure == pytest.approx(0.99, abs=0.01)


def test_what_was_not_tried_teaches_nothing():
    leads = Leads()
    leads.observe(np.array([[SURE, TORN, SURE], [TORN, SURE, SURE]]), np.array([3, 0]), np.array([1, 0]))
    classes = leads.acceptance(0.8)
    torn, sure = classes[classes_of(np.array([TORN, SURE]))]
    assert sure == pytest.approx((1 + 2 * 0.8) / 3)  # one accepted; the third lies behind the rejection
    assert torn == pytest.approx((0 + 2 * 0.8) / 3)
    untouched = np.delete(classes, classes_of(np.array([TORN, SURE])))
    assert (untouched == 0.8).all()


def test_a_lead_that_is_no_number_counts_as_none():
    assert classes_of(np.array([np.nan])) == classes_of(np.array([0.0]))


# --- when to stop


def stop(
    alive=(1.0, 1.0), following=(0.9, 0.9), weights=(0.5, 0.5), limits=(6, 6), planned=(6, 6), torn=0.5, sure=1.0,
    near=0.02, far=0.02, step=lambda drafting: 0.3,
):  # fmt: skip
    acceptance = np.where(np.arange(13) == 0, torn, sure)
    arrays = (np.array(x) for x in (alive, following, weights, limits, planned))
    return UntilInDoubt(*arrays, acceptance, (near, far), step)


def test_the_sure_go_on_to_their_limit():
    made = stop(limits=(4, 2))
    assert made.more(np.array([SURE, SURE]))
    assert made.more(np.array([SURE, SURE]))
    assert made.lengths.tolist() == [2, 2]
    assert made.more(np.array([SURE])) and not made.more(np.array([SURE]))
    assert made.lengths.tolist() == [4, 2]


def test_a_step_must_be_worth_it_to_those_that_go_on_together():
    assert stop().more(np.array([SURE, TORN]))  # 0.45 + 0.225 of 0.3
    assert not stop(torn=0.3).more(np.array([TORN, TORN]))  # 0.135 + 0.135
    assert not stop(step=lambda drafting: 0.9).more(np.array([SURE, SURE]))
    assert stop(step=lambda drafting: 0.1 * drafting).more(np.array([SURE, SURE]))


def test_beyond_what_was_planned_a_row_has_another_price():
    made = stop(planned=(2, 1), far=1.0)
    assert made.more(np.array([SURE, SURE]))  # 0.45 - 0.02 of 0.3; the second is done
    assert not made.more(np.array([SURE, SURE]))
    assert made.lengths.tolist() == [2, 1]
    made = stop(planned=(2, 1), far=1.0).take(np.array([1, 0]), np.array([6, 6]))
    assert made.more(np.array([SURE, SURE])) and made.lengths.tolist() == [1, 1]
    assert not made.more(np.array([SURE, SURE])) and made.lengths.tolist() == [1, 2]


def test_a_sequence_in_doubt_stops_while_the_others_go_on():
    made = stop(torn=0.02, near=0.05)
    assert made.more(np.array([SURE, TORN])) and made.more(np.array([SURE, SURE]))
    assert made.lengths.tolist() == [2, 1]


def test_everybody_keeps_the_first_token():
    made = stop(torn=0.0)
    assert not made.more(np.array([TORN, TORN]))
    assert made.lengths.tolist() == [1, 1]


def test_a_broken_drafter_is_in_doubt():
    assert not stop(torn=0.0).more(np.array([np.nan, np.nan]))


def test_what_history_drafts_ahead_must_be_accepted_first():
    assert not stop(alive=(0.2, 0.2)).more(np.array([SURE, SURE]))


def test_the_order_may_change_and_limits_fall():
    made = stop(weights=(0.9, 0.1), alive=(1.0, 0.5), limits=(6, 6)).take(np.array([1, 0]), np.array([3, 1]))
    assert not made.more(np.array([SURE, SURE]))  # the heavy one may draft one token only
    assert made.lengths.tolist() == [1, 1]


# --- that it pays


def rollouts(doubts, stoppable, alpha=0.999, count=10, samples=4, **options):
    """Makespans of rollouts of one kind under one policy."""
    policy, found = AutomaticPolicy(COSTS, probe_share=0.0, **options), []
    rng = np.random.default_rng(0)
    for seed in range(count):
        workload = from_lengths("w", rng.integers(100, 400, samples), alpha=alpha)
        acceptance = replace(workload.drafters["nf4"], doubts=doubts)
        workload = replace(workload, drafters={"nf4": acceptance}, stoppable=stoppable)
        found.append(makespan(simulate(workload, policy, COSTS, seed=seed)))
        policy.after_update()
    return np.array(found)


@pytest.mark.parametrize("samples", [1, 4])
def test_a_drafter_that_knows_its_doubts_is_faster(samples):
    doubts = ((0.08, 0.5),)  # at 8 % of the positions it is right half of the time
    ratios = rollouts(doubts, False, samples=samples) / rollouts(doubts, True, samples=samples)
    assert np.median(ratios[3:]) > 1.04


def test_nothing_is_lost_where_drafting_hardly_pays():
    ratios = rollouts(((0.08, 0.5),), False, samples=16) / rollouts(((0.08, 0.5),), True, samples=16)
    assert np.median(ratios[3:]) > 0.985


@pytest.mark.parametrize("alpha", [0.95, 0.8, 0.3])
def test_a_drafter_without_doubts_loses_nothing(alpha):
    ratios = rollouts((), False, alpha) / rollouts((), True, alpha)
    assert np.median(ratios) > 0.985


def test_uniform_lengths_are_not_cut():
    """Where one length holds for all sequences, as vLLM wants it, nobody is stopped."""
    policy = AutomaticPolicy(COSTS, ragged=False, probe_share=0.0)
    workload = replace(from_lengths("w", np.full(3, 200), alpha=0.95), stoppable=True)
    plans = []

    class Watched:
        def __getattr__(self, name):
            return getattr(policy, name)

        def plan(self, state):
            plans.append(policy.plan(state))
            return plans[-1]

    simulate(workload, Watched(), COSTS)
    assert any(plan.speculates for plan in plans) and all(plan.stop is None for plan in plans)


def test_drafting_is_paid_for_whether_or_not_it_is_verified():
    """What was taken back has cost its time: the learnt price of a draft step stays what it is."""
    policy, ones = AutomaticPolicy(COSTS, probe_share=0.0), np.ones(8, np.int64)
    state = StepState(np.arange(8), 300 * ones, 200 * ones, 100 * ones, ("nf4",), stoppable=True)
    plan = Plan(ones, 0 * ones, "nf4", Reason.PAYS)
    drafting = sum(COSTS.draft("nf4", 8, 2400) for _ in range(4))
    outcome = StepOutcome(
        ones, 2 * ones, ones < 0, drafting, COSTS.target(8, 16, 2400),
        drafted=4 * ones, leads=np.ones((8, 4), np.float32),
    )  # fmt: skip
    for _ in range(10):
        policy.observe(state, plan, outcome)
    assert policy.costs.draft("nf4", 8, 2400) == pytest.approx(COSTS.draft("nf4", 8, 2400), rel=0.02)
