"""When the automatic policy looks at what to do, and what it does in between."""

from dataclasses import replace

import numpy as np
import pytest

from rollout_spec.policy.automatic import HOLD
from rollout_spec.policy.records import Matches, Reason, StepOutcome

from .invented import COSTS, policy, run, seen, state


def test_while_drafting_pays_it_looks_before_every_fourth_pass_and_whenever_something_is_new(monkeypatch):
    made, looks = policy(), []
    value = made._value_of_tokens
    monkeypatch.setattr(made, "_value_of_tokens", lambda *args: looks.append(1) or value(*args))

    def looked(where):
        before = len(looks)
        plan = made.plan(where)
        assert plan.speculates and (plan.draft_lengths < where.allowed).all()
        return len(looks) > before

    assert [looked(state(2)) for _ in range(2 + 2 * HOLD)] == 2 * [True, *HOLD * [False]]
    assert looked(state(2)) and not looked(state(2, allowed=3)), "there is less room"
    assert looked(state(2, matches=Matches(np.array([4, 0]), np.array([0.9, 0.0])))), "history has a proposal"
    others = state(2)
    others.slots[:] = [5, 0]
    assert looked(others), "other sequences"


def drafted(stop, limits):
    """Draft lengths where the drafter is always sure."""
    taken = stop.take(np.arange(len(limits)), np.array(limits))
    while taken.more(np.full(len(limits), 9.0)):
        pass
    return taken.lengths.tolist()


def test_where_those_drafted_for_have_no_more_room_it_looks_anew():
    """The others have room, and what it had planned drafts nothing for them."""
    made = policy()
    first = made.plan(state(2, allowed=[400, 1]))
    assert first.draft_lengths[0] > 0 and not first.draft_lengths[1]
    then = made.plan(state(2, allowed=[1, 400]))
    assert then.draft_lengths[1] > 0 and not then.draft_lengths[0]


def test_between_looks_a_drafter_drafts_as_far_as_it_did_and_history_as_far_as_it_matches():
    made, where = policy(), state(2, allowed=[30, 4], stoppable=True)
    first = made.plan(where)
    room = first.draft_lengths.tolist()
    used = drafted(first.stop, room)
    assert max(used) > 1
    made.acceptance = seen(0.2).acceptance  # by which a new plan would be shorter
    again = made.plan(replace(where, allowed=np.array([30, 3])))
    assert again.reason is Reason.STILL_PAYS and again.drafter == "nf4"
    assert again.draft_lengths.tolist() == [room[0], 2], "there is room for no more"
    assert drafted(again.stop, room) == used, "what one pass used up, the next has again"

    made, plans = policy(), []
    for length in (6, 2, 9):
        where = state(1, drafters=(), matches=Matches(np.array([length]), np.array([0.95])))
        plans.append(made.plan(where))
    assert [plan.draft_lengths.tolist() for plan in plans] == [[6], [2], [9]]
    assert [plan.reason for plan in plans[1:]] == 2 * [Reason.STILL_PAYS]


def test_between_looks_history_pauses_where_its_matches_do_not_pay():
    made, plans = policy(), []
    for confidence in (0.95, 0.01, 0.95):
        where = state(8, drafters=(), matches=Matches(np.full(8, 6), np.full(8, confidence)))
        plans.append(made.plan(where))
    assert [plan.reason for plan in plans] == [Reason.PAYS, Reason.NOT_WORTH, Reason.STILL_PAYS]
    assert not plans[1].speculates and plans[2].draft_lengths.all()


def looks_of_400(decision_seconds):
    """How often a policy for which nothing pays looks at 8 sequences, once it has settled."""
    made, where, looks = policy(), state(8, drafters=("nf4",)), []
    made.acceptance["nf4"] = seen(0.0).acceptance["nf4"]
    zeros, ones = np.zeros(8, np.int64), np.ones(8, np.int64)
    for _ in range(600):
        looks.append(made.looks(8))
        plan = made.plan(where)
        assert not plan.speculates
        seconds = COSTS.target(8, 8, 800)
        made.observe(where, plan, StepOutcome(zeros, ones, zeros > 0, 0.0, seconds, decision_seconds))
    return sum(looks[-400:])


def test_it_rests_where_nothing_pays_and_longer_if_a_look_is_dear():
    assert looks_of_400(0.0) == 100
    assert 5 <= looks_of_400(1e-2) <= 10


@pytest.mark.parametrize("usual_before", [0, 40])
def test_a_decision_that_took_long_once_is_no_verdict(usual_before):
    """The first look may wait for memory and code, any for the machine: half a second weighs as much as forty passes."""
    made, where = seen(0.95), state(allowed=100_000)
    decided = [3e-5] * usual_before + [0.5] + [3e-5] * 30
    plans = run(made, where, 0.95, len(decided), deciding=decided)
    assert np.mean([plan.speculates for plan in plans[-20:]]) > 0.9


def test_a_decision_takes_what_most_of_the_last_took():
    made, where = seen(0.95), state(allowed=100_000)
    run(made, where, 0.95, 23, deciding=[3e-5] * 20 + [0.5] * 3)
    assert made.deciding == 3e-5
    run(made, where, 0.95, 9, deciding=[0.5] * 9)
    assert made.deciding == 0.5


def resting(batch=16, decision_seconds=1e-2, **where):
    """A policy for which nothing pays, in the midst of a long rest, and the pass it rests in."""
    made, here = seen(0.6), state(batch, **where)
    for _ in range(400):
        plan = run(made, here, 0.0, 1, deciding=[decision_seconds])[0]
        assert not plan.speculates
    while made.looks(batch):
        run(made, here, 0.0, 1, deciding=[decision_seconds])
    return made


def test_a_rest_ends_where_a_look_interrupts_it():
    """A batch that shrinks in the midst of a long rest is looked at; what then pays must not be rested for as well."""
    made = resting()
    made.acceptance = seen(0.95).acceptance
    plans = run(made, state(2), 0.95, 40)
    assert all(plan.speculates or plan.reason in (Reason.REFERENCE, Reason.PROBE) for plan in plans)


def test_new_weights_and_new_sequences_alone_end_a_rest():
    for news in (lambda made: made.after_update(), lambda made: made.forget(np.arange(16))):
        made = resting()
        made.forget(np.arange(15))
        assert not made.looks(16), "one of those it looked at is left"
        news(made)
        assert made.looks(16)


def test_what_was_held_is_dropped_with_its_sequences_and_with_its_weights():
    for news in (lambda made: made.after_update(), lambda made: made.forget(np.array([0]))):
        made, where = policy(), state(2)
        assert made.plan(where).speculates
        made.acceptance = seen(0.0).acceptance
        assert made.plan(where).speculates, "held"
        news(made)
        assert not made.plan(where).speculates


def test_from_one_that_loses_it_changes_to_none_that_promises_less_than_the_margin():
    made = policy(margin=0.02)
    made._mode = "nf4"
    assert made._with_hysteresis({"plain": 1.0, "nf4": 0.97, "history": 1.005}) == "plain"
    assert made._with_hysteresis({"plain": 1.0, "nf4": 0.97, "history": 1.03}) == "history"
    assert made._with_hysteresis({"plain": 1.0, "nf4": 1.02, "history": 1.03}) == "nf4"


def test_what_was_held_of_two_is_not_done_for_the_one_that_is_left():
    made = policy()
    assert made.plan(state(2)).speculates
    made.forget(np.array([1]))
    assert made.plan(state(1)).draft_lengths.shape == (1,)
