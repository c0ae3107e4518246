"""Baselines do what was published, within the contract of `Plan`."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from rollout_spec.policy.baselines import (
    Delegate,
    EfficientRollout,
    Fixed,
    Off,
    RandomLengths,
    TLTBandit,
    expected_emitted,
    uniform_plan,
)
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import (
    HISTORY,
    Matches,
    Plan,
    Reason,
    SpeculationPolicy,
    StepOutcome,
    StepState,
)

WEIGHTS = PassCost(launch=0.001, per_sequence=0.0, weights=0.010, per_row=1e-4, per_kv_token=1e-8)
DRAFT = PassCost(launch=0.001, per_sequence=0.0, weights=0.003, per_row=1e-4, per_kv_token=1e-8)
COSTS = CostModel({"target": WEIGHTS, "nf4": DRAFT})


def state(batch: int, allowed: int = 100, drafters: tuple[str, ...] = ("nf4",), matches=None) -> StepState:
    full = np.full(batch, 50, np.int64)
    return StepState(np.arange(batch), full, full // 2, np.full(batch, allowed, np.int64), drafters, matches)


def matches(*lengths: int) -> Matches:
    return Matches(np.array(lengths), np.full(len(lengths), 0.8))


def outcome(plan: Plan, accepted: np.ndarray, seconds: float = 1.0) -> StepOutcome:
    return StepOutcome(accepted, accepted + 1, np.zeros(len(accepted), bool), 0.0, seconds)


def everything() -> dict:
    return {
        "off": Off(),
        "fixed": Fixed(5),
        "history": Fixed(5, drafter=HISTORY),
        "random": RandomLengths(0),
        "efficientrollout": EfficientRollout(COSTS, armed_above=0),
        "tlt": TLTBandit(),
    }


@pytest.mark.parametrize("name", everything())
@pytest.mark.parametrize("drafters", [(), ("nf4",), ("eagle", "nf4")])
@pytest.mark.parametrize("allowed", [1, 2, 4, 100])
@pytest.mark.parametrize("matched", [None, (0, 0, 0), (0, 3, 9)])
def test_plans_keep_the_contract(name: str, drafters: tuple[str, ...], allowed: int, matched) -> None:
    policy = everything()[name]
    if "eagle" in drafters and name == "efficientrollout":
        policy = EfficientRollout(COSTS, armed_above=0, drafter="nf4")
    here = state(3, allowed, drafters, None if matched is None else matches(*matched))
    for _ in range(20):
        plan = policy.plan(here)
        K, history = plan.draft_lengths, plan.from_history
        assert K.dtype == history.dtype == np.int64
        assert ((K >= 0) & (here.allowed > K)).all()
        assert (history <= np.minimum(K, 0 if here.matches is None else here.matches.lengths)).all()
        assert plan.drafter in here.drafters if (history < K).any() else True
        assert plan.drafter is None or plan.speculates
        assert isinstance(plan.reason, Reason)
        policy.observe(here, plan, outcome(plan, K))
    policy.after_update()
    policy.forget(here.slots)


def test_plain_plans_say_why() -> None:
    assert Off().plan(state(2)).reason is Reason.OFF
    assert Fixed(3).plan(state(2, allowed=1)).reason is Reason.LAST_TOKEN
    assert Fixed(3).plan(state(2, drafters=())).reason is Reason.NO_DRAFTER
    assert Fixed(3, drafter="eagle").plan(state(2)).reason is Reason.NO_DRAFTER
    assert Fixed(3, drafter=HISTORY).plan(state(2)).reason is Reason.NO_DRAFTER
    assert TLTBandit().plan(state(33)).reason is Reason.FIXED


def test_fixed_stops_at_its_batch_and_history_stops_at_its_match() -> None:
    policy = Fixed(4, largest_batch=2)
    assert policy.plan(state(2)).draft_lengths.tolist() == [4, 4]
    assert not policy.plan(state(3)).speculates
    plan = Fixed(4, drafter=HISTORY).plan(state(3, matches=matches(0, 3, 9)))
    assert plan.draft_lengths.tolist() == plan.from_history.tolist() == [0, 3, 4]
    assert plan.drafter is None
    with pytest.raises(ValueError, match="draft_length=0"):
        Fixed(0)


def test_the_first_usable_drafter_is_taken() -> None:
    assert uniform_plan(state(1, drafters=("eagle", "nf4")), 2).drafter == "eagle"
    assert Fixed(2, drafter="nf4").plan(state(1, drafters=("eagle", "nf4"))).drafter == "nf4"


def test_random_lengths_are_off_as_often_as_asked_and_ragged_otherwise() -> None:
    policy, here = RandomLengths(1, longest=4, off=0.3), state(8)
    plans = [policy.plan(here) for _ in range(2000)]
    assert np.mean([not plan.speculates for plan in plans]) == pytest.approx(0.3, abs=0.04)
    drawn = np.concatenate([plan.draft_lengths for plan in plans if plan.speculates])
    assert sorted(set(drawn.tolist())) == [1, 2, 3, 4]


def test_expected_emitted_is_leviathans() -> None:
    assert expected_emitted(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_emitted(1.0, 4) == 5


# --- EfficientRollout


def test_the_toggle_is_a_latch_armed_by_a_large_batch() -> None:
    policy = EfficientRollout(COSTS, armed_above=32)
    assert not policy.plan(state(1)).speculates  # would pay, but a small engine never arms it
    assert policy.plan(state(200)).reason is Reason.NOT_WORTH
    assert policy.plan(state(4)).reason is Reason.PAYS
    assert policy.plan(state(200)).reason is Reason.STILL_PAYS  # one-way
    policy.after_update()
    assert policy.plan(state(200)).reason is Reason.NOT_WORTH


def test_the_toggle_opens_at_the_gain_asked_for() -> None:
    gain = EfficientRollout(COSTS, armed_above=0, alpha=0.9).plan(state(8)).gain
    K, kv = 5, 8 * 50
    seconds = K * COSTS.draft("nf4", 8, kv) + COSTS.target(8, 8 * 6, kv)
    assert gain == pytest.approx(expected_emitted(0.9, K) * COSTS.target(8, 8, kv) / seconds)
    for least, on in ((gain - 1e-6, True), (gain + 1e-6, False)):
        policy = EfficientRollout(COSTS, armed_above=0, alpha=0.9, least_gain=least)
        assert policy.plan(state(8)).speculates is on


def rollout_with(policy: EfficientRollout, accepted_share: float) -> None:
    here = state(100)
    policy.plan(here)
    for batch in (4, 4, 4):
        here = state(batch)
        plan = policy.plan(here)
        assert plan.speculates
        policy.observe(here, plan, outcome(plan, np.floor(plan.draft_lengths * accepted_share).astype(int)))
    policy.after_update()


def test_the_draft_length_climbs_after_two_good_rollouts_and_falls_after_two_bad() -> None:
    policy = EfficientRollout(COSTS)
    lengths = [policy.draft_length]
    for share in (1.0, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.8):
        rollout_with(policy, share)
        lengths.append(policy.draft_length)
    assert lengths == [5, 5, 7, 7, 7, 7, 9, 9, 11, 11, 11, 11, 9, 9, 7]


def test_a_rollout_without_speculation_leaves_the_ladder_alone() -> None:
    policy = EfficientRollout(COSTS)
    rollout_with(policy, 1.0)
    policy.after_update()
    rollout_with(policy, 1.0)
    assert policy.draft_length == 7


# --- TLT's bandit


def test_a_bucket_with_a_single_arm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"arms\[32\]=\(5,\)"):
        TLTBandit({4: (3, 7), 32: (5,)})
    with pytest.raises(ValueError, match="two draft lengths"):
        TLTBandit({4: (3, 3)})


def test_the_bandit_tries_every_arm_and_keeps_the_best_of_each_bucket() -> None:
    policy = TLTBandit({4: (3, 7), 32: (3, 7)}, epsilon=0.1, seed=3)
    best = {2: 7, 16: 3}
    pulls: dict[int, list[int]] = {2: [], 16: []}
    for _ in range(300):
        for batch in best:
            here = state(batch)
            plan = policy.plan(here)
            K = int(plan.draft_lengths[0])
            pulls[batch].append(K)
            seconds = 1.0 if best[batch] == K else 3.0
            policy.observe(here, plan, outcome(plan, np.full(batch, 2), seconds))
    for batch, K in best.items():
        assert set(pulls[batch][:10]) == {3, 7}
        assert np.mean(np.array(pulls[batch]) == K) == pytest.approx(0.95, abs=0.04)


def test_a_delegate_passes_everything_on():
    told = []

    class Told:
        def __getattr__(self, name):
            return lambda *arguments: told.append((name, arguments))

    names = [name for name in vars(SpeculationPolicy) if not name.startswith("_")]
    delegate = Delegate(Told())
    for name in names:
        arguments = tuple(range(len(inspect.signature(getattr(delegate, name)).parameters)))
        getattr(delegate, name)(*arguments)
        assert told.pop() == (name, arguments)
    assert len(names) == 8
