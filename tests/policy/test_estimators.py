"""What the automatic policy learns: acceptance, remaining lengths, corrections of costs, and the arbiter's bandit."""

import math

import numpy as np
import pytest

from rollout_spec.policy.acceptance import AcceptanceTracker
from rollout_spec.policy.arbiter import Arbiter
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.lengths import GRID, RemainingLength
from rollout_spec.policy.online_costs import OnlineCosts

# --- acceptance ------------------------------------------------------------------------------------------


def watch(tracker, alpha_of, slots, rounds, length=8, seed=0):
    """Drafts of `length` tokens whose token j of slot s is accepted with probability alpha_of(s, j)."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        hits = np.array([[rng.random() < alpha_of(s, j) for j in range(length)] for s in slots])
        accepted = np.where(hits.all(1), length, hits.argmin(1))
        tracker.observe(np.asarray(slots), np.full(len(slots), length), accepted)


def test_acceptance_is_estimated_per_position():
    tracker = AcceptanceTracker(8)
    watch(tracker, lambda s, j: 0.95 if j < 2 else 0.5, range(4), 400)
    survival = tracker.survival(np.array([9]))[0]
    hazard = survival[1:] / survival[:-1]
    assert survival[0] == pytest.approx(0.95, abs=0.03)
    assert hazard[0] == pytest.approx(0.95, abs=0.04)
    assert hazard[2] == pytest.approx(0.5, abs=0.08)
    assert (np.diff(survival) <= 0).all()


def test_acceptance_is_estimated_per_request():
    tracker = AcceptanceTracker(8)
    watch(tracker, lambda s, j: 0.97 if s == 0 else 0.6, range(4), 100)
    easy, hard = tracker.survival(np.array([0, 1]))[:, 0]
    assert easy > 0.9 > 0.75 > hard
    tracker.forget(np.array([0]))
    assert tracker.survival(np.array([0]))[0, 0] < easy


def test_acceptance_follows_a_change():
    tracker = AcceptanceTracker(8)
    watch(tracker, lambda s, j: 0.95, range(8), 300)
    watch(tracker, lambda s, j: 0.3, range(8), 900)
    assert tracker.mean == pytest.approx(0.3, abs=0.06)


def test_an_update_makes_room_for_new_evidence():
    old, updated = AcceptanceTracker(8), AcceptanceTracker(8)
    for tracker in (old, updated):
        watch(tracker, lambda s, j: 0.95, range(8), 200)
    updated.discount(0.1)
    for tracker in (old, updated):
        watch(tracker, lambda s, j: 0.4, range(8), 20, seed=1)
    assert updated.mean < old.mean


def test_of_slots_beyond_those_seen_nothing_is_known():
    tracker = AcceptanceTracker(4, capacity=2)
    tracker.observe(np.array([0, 1]), np.array([4, 4]), np.array([4, 0]))
    fresh = AcceptanceTracker(4, capacity=1000)
    fresh.observe(np.array([0, 1]), np.array([4, 4]), np.array([4, 0]))
    slots = np.array([0, 999, 1])
    np.testing.assert_array_equal(tracker.survival(slots), fresh.survival(slots))


def test_sequences_without_drafts_teach_nothing():
    tracker = AcceptanceTracker(4)
    tracker.observe(np.array([0, 1]), np.array([0, 0]), np.array([0, 0]))
    assert tracker.tried == 0


# --- remaining lengths -----------------------------------------------------------------------------------


def test_remaining_length_is_the_conditional_distribution_of_what_was_seen():
    rng, lengths = np.random.default_rng(0), RemainingLength()
    seen = (rng.pareto(1.5, 4000) * 30 + 5).astype(np.int64)
    lengths.observe(seen)
    for output in (10, 50, 200):
        beyond = seen[seen > output] - output
        wanted = np.array([(beyond > x).mean() for x in GRID])
        found = lengths.survival(np.array([output]), np.array([1 << 20]))[0]
        np.testing.assert_allclose(found, wanted, atol=0.03)


def test_the_request_that_outran_the_others_ends_last():
    lengths = RemainingLength()
    lengths.observe(np.array([20] * 500 + [400] * 3))
    last = lengths.last_to_finish(np.array([2, 3, 150, 4]), np.full(4, 500))
    assert last.sum() == pytest.approx(1)
    assert last.argmax() == 2
    assert last[2] > 0.7


def test_who_ends_last_agrees_with_drawing_lengths():
    rng, lengths = np.random.default_rng(0), RemainingLength()
    seen = (rng.pareto(1.2, 3000) * 20 + 3).astype(np.int64)
    lengths.observe(seen)
    outputs, allowed = np.array([5, 5, 40, 120]), np.full(4, 1000)
    draws = np.stack(
        [np.minimum(rng.choice(seen[seen > out], 20_000) - out, 1000) + rng.random(20_000) for out in outputs]
    )
    wanted = np.bincount(draws.argmax(0), minlength=4) / 20_000
    np.testing.assert_allclose(lengths.last_to_finish(outputs, allowed), wanted, atol=0.06)


def test_nothing_seen_yet():
    last = RemainingLength().last_to_finish(np.array([0, 0]), np.array([100, 100]))
    np.testing.assert_allclose(last, 0.5)


def test_nobody_runs_far_past_what_is_allowed():
    alive = RemainingLength().survival(np.array([0, 1000]), np.array([64, 8]))
    assert not alive[0, GRID >= 1.5 * 64].any()
    assert not alive[1, GRID >= 1.5 * 8].any()


@pytest.mark.parametrize("drift", [0.0, 1.0, 5.0, 20.0])
def test_the_delay_of_requests_that_drift_apart_agrees_with_drawing_their_ends(drift):
    rng, lengths = np.random.default_rng(0), RemainingLength()
    lengths.observe(np.full(4000, np.inf))  # whatever was seen ran into its limit
    allowed = np.full(6, 100)
    ends = allowed + 3**0.5 * drift * (2 * rng.random((40_000, 6)) - 1)
    wanted = ends.max(1).mean() - 100
    assert lengths.delay(np.zeros(6), allowed, drift) == pytest.approx(wanted, rel=0.08, abs=0.3)


def test_requests_that_end_far_apart_do_not_wait_for_each_other():
    lengths = RemainingLength()
    lengths.observe(np.full(4000, np.inf))
    assert lengths.delay(np.zeros(4), np.array([10, 200, 400, 800]), 5.0) < 0.3


def test_of_requests_with_like_limits_none_is_sure_to_end_last():
    """They advance at random paces: a token or two of lead say little while there is a way to go."""
    last = RemainingLength().last_to_finish(np.array([20, 22, 19, 21]), np.array([44, 42, 45, 43]))
    assert last.max() < 0.35
    assert last.argmax() == 2


def test_a_request_that_was_cut_off_teaches_no_length():
    lengths = RemainingLength()
    lengths.observe(np.array([np.inf] * 50))
    assert lengths.survival(np.array([10]), np.array([1 << 20]))[0, -1] > 0.9


# --- costs -----------------------------------------------------------------------------------------------


def test_corrections_are_local_and_spread_where_nothing_was_seen():
    costs = OnlineCosts(CostModel({"target": PassCost(1e-3, 0, 1e-2, 1e-4, 0)}))
    for _ in range(100):
        costs.observe_target(64, 64, 0, 2 * costs.model.target(64, 64, 0))
    assert costs.target(64, 64, 0) == pytest.approx(2 * costs.model.target(64, 64, 0), rel=0.05)
    assert costs.target(1, 1, 0) > 1.5 * costs.model.target(1, 1, 0)
    for _ in range(100):
        costs.observe_target(1, 1, 0, costs.model.target(1, 1, 0))
    assert costs.target(1, 1, 0) == pytest.approx(costs.model.target(1, 1, 0), rel=0.1)


def test_one_hiccup_hardly_counts():
    costs = OnlineCosts(CostModel({"target": PassCost(1e-3, 0, 1e-2, 1e-4, 0)}))
    usual = costs.model.target(1, 1, 0)
    for seconds in (50 * usual, usual, usual, usual, 50 * usual):
        costs.observe_target(1, 1, 0, seconds)
    assert costs.target(1, 1, 0) < 1.1 * usual


def test_verify_passes_do_not_change_what_plain_ones_cost():
    costs = OnlineCosts(CostModel({"target": PassCost(1e-3, 0, 1e-2, 1e-4, 0)}))
    plain, verify = costs.model.target(16, 16, 0), costs.model.target(4, 20, 0)
    for _ in range(20):
        costs.observe_target(16, 16, 0, 0.8 * plain)
        costs.observe_target(4, 20, 0, 1.3 * verify)
    assert costs.target(16, 16, 0) == pytest.approx(0.8 * plain)
    assert costs.target(4, 20, 0) == pytest.approx(1.3 * verify)


def test_a_kind_never_seen_is_as_wrong_as_plain_passes_are():
    costs = OnlineCosts(CostModel({kind: PassCost(1e-3, 0, 1e-2, 1e-4, 0) for kind in ("target", "nf4")}))
    for _ in range(5):
        costs.observe_target(4, 4, 0, 1.5 * costs.model.target(4, 4, 0))
    assert costs.target(4, 20, 0) == pytest.approx(1.5 * costs.model.target(4, 20, 0))
    assert costs.draft("nf4", 1, 0) == pytest.approx(1.5 * costs.model.draft("nf4", 1, 0))


def test_what_was_not_seen_for_long_tends_to_what_plain_passes_say():
    model = CostModel({"target": PassCost(1e-3, 0, 1e-2, 1e-4, 0)})
    costs = OnlineCosts(model)
    for _ in range(3):
        costs.observe_target(1, 5, 100, 3 * model.target(1, 5, 100))
    for _ in range(100):
        costs.observe_target(1, 1, 100, 1.2 * model.target(1, 1, 100))
    costs.fade(0.5)
    assert costs.target(1, 5, 100) == pytest.approx(3 * model.target(1, 5, 100)), "seen since"
    assert costs.target(16, 80, 100) == pytest.approx(3 * model.target(16, 80, 100)), (
        "as wrong as what was seen"
    )
    costs.fade(0.5)
    assert costs.target(1, 5, 100) == pytest.approx((3 * 1.2) ** 0.5 * model.target(1, 5, 100))
    assert costs.target(16, 80, 100) == pytest.approx((3 * 1.2) ** 0.5 * model.target(16, 80, 100))
    assert costs.target(1, 1, 100) == pytest.approx(1.2 * model.target(1, 1, 100))


def test_what_drafting_takes_is_learnt_of_as_many_sequences_as_were_drafted_for():
    cost = PassCost(1e-3, 0, 1e-2, 1e-4, 0)
    costs = OnlineCosts(CostModel({"target": cost, "nf4": cost}))
    for _ in range(3):
        costs.observe_target(16, 16, 0, costs.model.target(16, 16, 0))
        costs.observe_drafting("nf4", 0, np.full(16, 1), np.zeros(16, int), cost.seconds(16, 16, 0))
    few = np.array([3, 3, *[0] * 14])
    for _ in range(3):
        costs.observe_drafting("nf4", 0, few, np.zeros(16, int), 2 * 3 * cost.seconds(2, 2, 0))
    assert costs.draft("nf4", 2, 0) == pytest.approx(2 * cost.seconds(2, 2, 0))
    assert costs.draft("nf4", 16, 0) == pytest.approx(cost.seconds(16, 16, 0))


def test_a_pass_after_a_long_gap_counts_for_more():
    costs = OnlineCosts(CostModel({"target": PassCost(1e-3, 0, 1e-2, 1e-4, 0)}))
    usual = costs.model.target(1, 1, 0)
    for _ in range(20):
        costs.observe_target(1, 1, 0, usual)
    for _ in range(6):  # plain passes have become slower, and are seen rarely
        for _ in range(50):
            costs.observe_target(1, 8, 0, costs.model.target(1, 8, 0))
        costs.observe_target(1, 1, 0, 1.3 * usual)
    assert costs.target(1, 1, 0) > 1.15 * usual


# --- the bandit ------------------------------------------------------------------------------------------

FOUND_WITHIN, REGRET = 4000, 0.05  # passes; of the time the best arm would take


def play(true, predicted, passes, batch=1, share=0.01, seed=0):
    """Play arms whose prior gains are `predicted` and whose true gains are `true`; returns arms and regret."""
    rng = np.random.default_rng(seed)
    bandit = Arbiter(["plain", *true], explore_share=share)
    arms, lost = [], 0.0
    for _ in range(passes):
        gains = {a: g * bandit.correction(a, batch) for a, g in predicted.items()} | {"plain": 1.0}
        best = max(gains, key=gains.get)
        trial = bandit.explore(gains, best, batch, 1.0)
        arm = trial or best
        gain = 1.0 if arm == "plain" else true[arm] * rng.lognormal(0, 0.2)
        if arm != "plain":
            bandit.observe(arm, batch, predicted[arm], gain)
        if trial:
            bandit.charge(gains[best] / gain - 1)
        arms.append(arm)
        lost += 1 / (1.0 if arm == "plain" else true[arm]) - 1 / max(1.0, *true.values())
    return bandit, arms, lost / (passes / max(1.0, *true.values()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ({"nf4": 1.1, "history": 1.5}, {"nf4": 1.4, "history": 1.0}),  # the wrong drafter is preferred
        ({"nf4": 1.5}, {"nf4": 0.8}),  # one that pays is thought not to
        ({"nf4": 0.6}, {"nf4": 1.5}),  # one that does not pay is thought to
    ],
)
def test_a_wrong_prior_is_found_out_at_little_cost(true, predicted, seed):
    _, arms, regret = play(true, predicted, FOUND_WITHIN, seed=seed)
    best = max({"plain": 1.0} | true, key=({"plain": 1.0} | true).get)
    assert arms[-200:].count(best) > 180
    assert regret < REGRET


def test_exploration_stays_within_its_budget():
    _, arms, regret = play({"nf4": 0.2}, {"nf4": 0.7}, 3000)
    assert arms.count("nf4") > 0
    assert regret < 0.03


def test_what_is_not_played_is_forgotten():
    bandit = Arbiter(["plain", "nf4", "history"])
    for _ in range(100):
        bandit.observe("nf4", 4, 1.0, 0.5)
        bandit.observe("history", 4, 1.0, 0.5)
    before = bandit.correction("nf4", 4)
    for _ in range(40):
        bandit.fade("history", 0.9)
    assert bandit.correction("history", 4) == before
    assert before < 0.6 and bandit.correction("nf4", 4) > 0.85


def test_a_trial_that_lost_more_than_predicted_is_paid_back_before_the_next():
    bandit, gains = Arbiter(["plain", "nf4"], explore_share=0.01), {"plain": 1.0, "nf4": 0.98}

    def passes_to_a_trial():
        return next(n for n in range(1, 5000) if bandit.explore(gains, "plain", 1, 1.0))

    assert passes_to_a_trial() < 5
    bandit.charge(3.0)  # seconds, of passes of one second
    assert 290 < passes_to_a_trial() < 310


def test_what_is_learnt_at_one_batch_size_helps_at_another():
    bandit, _, _ = play({"nf4": 0.5}, {"nf4": 1.5}, 300, batch=1)
    assert bandit.correction("nf4", 64) < 0.7
    bandit.discount(0.0)
    assert bandit.correction("nf4", 64) == 1


@pytest.mark.parametrize("arms", [[], ["plain"], ["plain", "plain"]])
def test_a_bandit_with_one_arm_is_refused(arms):
    with pytest.raises(ValueError, match="at least two different arms"):
        Arbiter(arms)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_the_bandit_ignores_absurd_gains(value):
    bandit = Arbiter(["plain", "nf4"])
    bandit.observe("nf4", 1, 1.0, value)
    bandit.observe("nf4", 1, value, 1.0)
    assert bandit.correction("nf4", 1) == 1
