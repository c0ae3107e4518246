"""A drafter with a cache of its own first reads what it missed: the policy must not take that for what it costs."""

import numpy as np
import pytest

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.own_caches import OwnCaches
from rollout_spec.policy.records import Plan, Reason, StepOutcome, StepState

from .invented import COSTS

TRAINED = PassCost(5e-4, 1e-4, 6e-4, 1e-4, 0.0)


def state(*slots):
    many = len(slots)
    return StepState(
        np.array(slots), np.full(many, 100), np.full(many, 50), np.full(many, 100_000), ("trained", "nf4")
    )


def draft(drafter, *lengths):
    drafts = np.array(lengths, np.int64)
    return Plan(drafts, np.zeros_like(drafts), drafter, Reason.FIXED)


@pytest.fixture
def policy():
    made = AutomaticPolicy(COSTS, probe_share=0.0, explore_share=0.0)
    made.add_drafter("trained", TRAINED)
    for _ in range(3):
        made.costs.observe_target(1, 1, 100, COSTS.target(1, 1, 100))
    made.luck, made.read_last = np.random.default_rng(0), None
    return made


class TestWhoIsBehind:
    @pytest.fixture
    def caches(self):
        made = OwnCaches()
        made.add("trained")
        return made

    def test_one_that_shares_the_targets_cache_never_is(self, caches):
        assert "nf4" not in caches and not caches.observe(draft("nf4", 4), state(0))
        assert not caches.observe(Plan.plain(1, Reason.OFF), state(0))

    def test_one_that_did_not_draft_in_the_last_pass_is(self, caches):
        drafters = ["trained", "trained", "nf4", "trained", None, "trained", "trained"]
        plans = [draft(name, 4) if name else Plan.plain(1, Reason.PROBE) for name in drafters]
        found = [caches.observe(plan, state(0)) for plan in plans]
        assert found == [True, False, False, True, False, True, False]

    @pytest.mark.parametrize(
        ("slots", "lengths", "behind"),
        [
            ((8, 7), (4, 4), False),  # in another order
            ((9, 8), (0, 4), False),  # it drafts for 8 alone
            ((8, 9), (4, 4), True),  # it did not draft for 9
            ((8, 10), (4, 4), True),  # 10 is new
        ],
    )
    def test_what_counts_is_for_whom_it_drafts(self, caches, slots, lengths, behind):
        caches.observe(draft("trained", 4, 4, 0), state(7, 8, 9))
        assert caches.observe(draft("trained", *lengths), state(*slots)) is behind

    @pytest.mark.parametrize(("slot", "behind"), [(7, False), (8, True)])
    def test_a_slot_used_again_is_another_sequence(self, caches, slot, behind):
        caches.observe(draft("trained", 4, 4), state(7, 8))
        caches.forget(np.array([8]))
        assert caches.observe(draft("trained", 4), state(slot)) is behind

    def test_all_is_read_anew_after_an_update(self, caches):
        caches.observe(draft("trained", 4), state(0))
        caches.clear()
        assert caches.observe(draft("trained", 4), state(0))


READING = 8.0  # times as long a drafter takes that first reads what it missed


def carry_out(made, where):
    plan = made.plan(where)
    batch, context = len(where.slots), int(where.lengths.sum())
    drafting = 0.0
    if plan.drafter == "trained":
        drafting = plan.draft_lengths.max() * TRAINED.seconds(batch, batch, context)
        drafting *= READING if made.read_last != "trained" else 1.0
    elif plan.drafter:
        drafting = plan.draft_lengths.max() * COSTS.draft("nf4", batch, context)
    made.read_last = plan.drafter
    hits = made.luck.random((batch, 65)) < (0.97 if plan.drafter == "nf4" else 0.8)
    accepted = np.minimum(hits.argmin(1), plan.draft_lengths)
    target = COSTS.target(batch, batch + int(plan.draft_lengths.sum()), context)
    done = np.zeros(batch, bool)
    made.observe(where, plan, StepOutcome(accepted, accepted + 1, done, float(drafting), target))
    return plan


def test_neither_price_nor_worth_is_learnt_from_the_pass_that_reads(policy):
    """What it drafted there is as good as ever."""
    where, price = state(0), policy.costs.draft("trained", 1, 100)
    assert carry_out(policy, where).drafter == "trained"
    assert policy.costs.draft("trained", 1, 100) == price
    assert policy.arbiter.correction("trained", 1) == 1.0
    assert policy.acceptance["trained"].tried > 0
    carry_out(policy, where)
    assert policy.costs.draft("trained", 1, 100) == pytest.approx(price, rel=0.01)
    assert policy.arbiter.correction("trained", 1) != 1.0


@pytest.mark.parametrize("why", ["new weights", "another sequence in its slot", "another drafter"])
def test_what_was_read_is_worth_nothing_for(why, policy, monkeypatch):
    learnt, where = [], state(0)
    monkeypatch.setattr(policy.arbiter, "observe", lambda arm, *rest: learnt.append(arm))
    carry_out(policy, where)
    carry_out(policy, where)
    assert learnt == ["trained"], "the second pass is learnt from"
    if why == "new weights":
        policy.after_update()
    elif why == "another drafter":
        policy.add_drafter("trained", TRAINED)
    else:
        policy.forget(where.slots)
    carry_out(policy, where)
    assert learnt == ["trained"]
    carry_out(policy, where)
    assert learnt == ["trained"] * 2


def test_of_one_that_takes_the_place_of_another_what_is_known_stays_if_it_costs_the_same(policy):
    where = state(0)
    for _ in range(20):
        carry_out(policy, where)
    tried = policy.acceptance["trained"].tried
    policy.add_drafter("trained", TRAINED)
    assert policy.acceptance["trained"].tried == tried > 0
    assert policy.arbiter.correction("trained", 1) != 1.0
    policy.add_drafter("trained", PassCost(5e-3, 0, 0, 0, 0))
    assert policy.acceptance["trained"].tried == 0
    assert policy.arbiter.correction("trained", 1) == 1.0
    assert policy.arbiter.arms.count("trained") == 1
    assert policy.costs.model.draft("trained", 1, 100) == 5e-3


def test_what_a_drafter_that_comes_later_needs_is_compiled_when_it_comes(monkeypatch):
    compiled = []
    made = AutomaticPolicy(CostModel({"target": COSTS.passes["target"]}))
    monkeypatch.setattr(made, "_until_in_doubt", lambda round, chosen, gain: compiled.append(chosen.drafter))
    made.add_drafter("trained", TRAINED)
    assert "trained" in compiled


def trial(made, monkeypatch, arm):
    tries = iter([arm])
    monkeypatch.setattr(made.arbiter, "explore", lambda *args: next(tries, None))
    made._mode = "nf4" if arm == "trained" else "trained"
    made.margin = 10.0  # what runs goes on


def test_a_trial_of_one_lasts_two_passes_both_charged(policy, monkeypatch):
    trial(policy, monkeypatch, "trained")
    charged, learnt, where = [], [], state(0)
    monkeypatch.setattr(policy.arbiter, "charge", charged.append)
    monkeypatch.setattr(policy.arbiter, "observe", lambda arm, *rest: learnt.append(arm))
    plans = [carry_out(policy, where) for _ in range(4)]
    assert [plan.drafter for plan in plans] == ["trained", "trained", "nf4", "nf4"]
    assert [plan.reason for plan in plans] == [Reason.EXPLORE] * 2 + [Reason.STILL_PAYS] * 2
    assert len(charged) == 2
    assert learnt == ["trained", "nf4", "nf4"], "the second of the two"


def test_a_trial_of_any_other_is_one_pass(policy, monkeypatch):
    trial(policy, monkeypatch, "nf4")
    plans = [carry_out(policy, state(0)) for _ in range(3)]
    assert [plan.drafter for plan in plans] == ["nf4", "trained", "trained"]


def test_a_trial_that_a_plain_pass_takes_the_place_of_ends_there(policy, monkeypatch):
    """Nothing was tried; the pass after is what it would have been."""
    trial(policy, monkeypatch, "trained")
    policy._mode = "plain"
    policy.probe_share = 1.0
    assert policy.plan(state(0)).reason is Reason.PROBE
    policy.probe_share = 0.0
    assert policy.plan(state(0)).drafter is None
