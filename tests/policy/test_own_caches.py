"""A drafter with a cache of its own first reads what it missed: the policy must not take that for what it costs."""

import numpy as np
import pytest

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.own_caches import OwnCaches
from rollout_spec.policy.records import Plan, Reason, StepOutcome, StepState

COSTS = CostModel(
    {
        "target": PassCost(1e-3, 2e-4, 18e-3, 7e-4, 5e-8),
        "nf4": PassCost(1e-3, 2e-4, 5e-3, 6e-4, 5e-8),
    }
)
TRAINED = PassCost(5e-4, 1e-4, 6e-4, 1e-4, 0.0)


def state(*slots):
    many = len(slots)
    return StepState(
        np.array(slots), np.full(many, 100), np.full(many, 50), np.full(many, 100_000), ("trained", "nf4")
    )


def draft(drafter, *lengths, reason=Reason.FIXED):
    drafts = np.array(lengths, np.int64)
    return Plan(drafts, np.zeros_like(drafts), drafter, reason)


@pytest.fixture
def policy():
    made = AutomaticPolicy(COSTS, probe_share=0.0, explore_share=0.0)
    made.add_drafter("trained", TRAINED)
    for _ in range(3):
        made.costs.observe_target(1, 1, 100, COSTS.target(1, 1, 100))
    return made


class TestWhoIsBehind:
    @pytest.fixture
    def caches(self):
        made = OwnCaches()
        made.add("trained")
        return made

    def test_one_that_shares_the_targets_cache_never_is(self, caches):
        assert "nf4" not in caches and not caches.behind(draft("nf4", 4), state(0))
        assert not caches.behind(Plan.plain(1, Reason.OFF), state(0))

    def test_one_that_did_not_draft_in_the_last_pass_is(self, caches):
        assert caches.behind(draft("trained", 4), state(0))
        caches.drafted(draft("trained", 4), state(0))
        assert not caches.behind(draft("trained", 4), state(0))
        caches.drafted(draft("nf4", 4), state(0))
        assert caches.behind(draft("trained", 4), state(0))
        caches.drafted(draft("trained", 4), state(0))
        caches.drafted(Plan.plain(1, Reason.PROBE), state(0))
        assert caches.behind(draft("trained", 4), state(0))

    def test_what_counts_is_for_whom_it_drafts(self, caches):
        caches.drafted(draft("trained", 4, 4, 0), state(7, 8, 9))
        assert not caches.behind(draft("trained", 4, 4), state(8, 7)), "another order"
        assert not caches.behind(draft("trained", 0, 4), state(9, 8)), "the other waits"
        assert caches.behind(draft("trained", 4, 4), state(8, 9)), "it did not draft for 9"
        assert caches.behind(draft("trained", 4, 4), state(8, 10)), "10 is new"

    def test_a_slot_used_again_is_another_sequence(self, caches):
        caches.drafted(draft("trained", 4, 4), state(7, 8))
        caches.forget(np.array([8]))
        assert not caches.behind(draft("trained", 4), state(7))
        assert caches.behind(draft("trained", 4), state(8))

    def test_all_is_read_anew_after_an_update(self, caches):
        caches.drafted(draft("trained", 4), state(0))
        caches.clear()
        assert caches.behind(draft("trained", 4), state(0))


def carry_out(made, where, reading=8.0, alpha=0.8, trained=1.0):
    """One pass: a `trained` drafter behind takes so many times as long, one that reads what it missed `reading` times."""
    plan = made.plan(where)
    return plan, finish(made, where, plan, reading, alpha, trained)


def finish(made, where, plan, reading, alpha=0.8, trained=1.0):
    batch, context = len(where.slots), int(where.lengths.sum())
    drafting = 0.0
    if plan.drafter == "trained":
        drafting = trained * plan.draft_lengths.max() * TRAINED.seconds(batch, batch, context)
        drafting *= reading if made.read_last != "trained" else 1.0
    elif plan.drafter:
        drafting = plan.draft_lengths.max() * COSTS.draft("nf4", batch, context)
    made.read_last = plan.drafter
    hits = made.luck.random((batch, 65)) < (0.97 if plan.drafter == "nf4" else alpha)
    accepted = np.minimum(hits.argmin(1), plan.draft_lengths)
    target = COSTS.target(batch, batch + int(plan.draft_lengths.sum()), context)
    outcome = StepOutcome(accepted, accepted + 1, np.zeros(batch, bool), float(drafting), target)
    made.observe(where, plan, outcome)
    return outcome


def lucky(made):
    made.luck, made.read_last = np.random.default_rng(0), None
    return made


def test_neither_price_nor_worth_is_learnt_from_the_pass_that_reads(policy):
    """What it drafted there is as good as ever."""
    where, price = state(0), policy.costs.draft("trained", 1, 100)
    plan = policy.plan(where)
    assert plan.drafter == "trained"
    finish(lucky(policy), where, plan, reading=8.0)
    assert policy.costs.draft("trained", 1, 100) == price
    assert policy.arbiter.correction("trained", 1) == 1.0
    assert policy.acceptance["trained"].tried > 0
    finish(policy, where, policy.plan(where), reading=8.0)
    assert policy.costs.draft("trained", 1, 100) == pytest.approx(price, rel=0.01)
    assert policy.arbiter.correction("trained", 1) != 1.0


@pytest.mark.parametrize("why", ["new weights", "another sequence in its slot"])
def test_what_was_read_is_worth_nothing_for(why, policy, monkeypatch):
    learnt, where = [], state(0)
    monkeypatch.setattr(policy.arbiter, "observe", lambda arm, *rest: learnt.append(arm))
    carry_out(lucky(policy), where)
    carry_out(policy, where)
    assert learnt == ["trained"], "the second pass is learnt from"
    if why == "new weights":
        policy.after_update()
    else:
        policy.forget(where.slots)
    carry_out(policy, where)
    assert learnt == ["trained"]
    carry_out(policy, where)
    assert learnt == ["trained"] * 2


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
    plans = [carry_out(lucky(policy) if not n else policy, where)[0] for n in range(4)]
    assert [plan.drafter for plan in plans] == ["trained", "trained", "nf4", "nf4"]
    assert [plan.reason for plan in plans] == [Reason.EXPLORE] * 2 + [Reason.STILL_PAYS] * 2
    assert len(charged) == 2
    assert learnt == ["trained", "nf4", "nf4"], "the second of the two"


def test_a_trial_of_any_other_is_one_pass(policy, monkeypatch):
    trial(policy, monkeypatch, "nf4")
    plans = [carry_out(lucky(policy) if not n else policy, state(0))[0] for n in range(3)]
    assert [plan.drafter for plan in plans] == ["nf4", "trained", "trained"]


def test_a_trial_that_a_plain_pass_takes_the_place_of_ends_there(policy, monkeypatch):
    """Nothing was tried; the pass after is what it would have been."""
    trial(policy, monkeypatch, "trained")
    policy._mode = "plain"
    policy.probe_share = 1.0
    assert policy.plan(state(0)).reason is Reason.PROBE
    policy.probe_share = 0.0
    assert policy.plan(state(0)).drafter is None


def test_the_better_one_comes_to_draft_however_long_it_reads():
    """Once it looked bad. What it is worth now is found out by trials, each of which begins with that reading."""
    made, where = lucky(AutomaticPolicy(COSTS, probe_share=0.0, explore_share=0.01)), state(0)
    made.add_drafter("trained", TRAINED)
    for _ in range(100):
        made.arbiter.observe("trained", 1, 1.0, 0.5)
    drafters = [carry_out(made, where)[0].drafter for _ in range(6000)]
    assert drafters[:50].count("nf4") > 40
    assert drafters[-1000:].count("trained") > 900
