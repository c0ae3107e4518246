"""`rollout-spec bench longtail`: what its rollouts are predicted from."""

from dataclasses import replace

import numpy as np
import pytest

from rollout_spec.benchmarks.longtail import SELF, LongTail, Rollouts, _simulated
from rollout_spec.benchmarks.watching import Listening, Timing, adding_up
from rollout_spec.contracts import SpecCounts
from rollout_spec.policy.baselines import Fixed
from rollout_spec.policy.cost_model import TARGET, CostModel, PassCost, PassTiming, fit
from rollout_spec.policy.doubt import classes_of
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import Acceptance, from_lengths


def timings(seconds: float) -> list[PassTiming]:
    """Of passes that all take as long."""
    return [PassTiming(kind, b, b, c, seconds) for kind in (TARGET, "nf4") for b in (1, 2) for c in (0, 99)]


def test_each_rollout_is_simulated_with_passes_timed_within_it():
    tail = LongTail.__new__(LongTail)
    tail.batch, tail.seed, tail.drafter, tail._doubts, tail.notes = 2, 0, "nf4", ((1.0, 0.9),), {}
    tail.costs = fit(timings(1.0))
    two_that_do_not_count = 9.0, 1.0
    counted = [1.0, 2.5, 4.0, 4.0]
    tail._timings = [timings(seconds) for seconds in (*two_that_do_not_count, *counted)]
    runs = {name: Rollouts(counted, SpecCounts()) for name in ("plain", SELF)}
    tail._predict(runs, [[500, 510]] * 2 + [[10, 20]] * 4)
    found = tail.notes["simulated over measured makespan, plain"]
    passes = found["median"]
    assert passes == pytest.approx(20, abs=1) and found["of_total"] == pytest.approx(passes, rel=1e-3)
    drift = tail.notes["a plain pass in epoch 1 over one before"]
    assert drift == {"least": pytest.approx(1.0, rel=2e-3), "most": pytest.approx(4.0, rel=2e-3)}


def test_to_a_simulated_policy_every_draw_is_an_rl_step_with_luck_of_its_own(monkeypatch):
    updates = []
    monkeypatch.setattr(Fixed, "after_update", lambda self: updates.append(1))
    costs = fit(timings(1.0))
    seconds = _simulated([from_lengths("same", np.full(4, 200), alpha=0.7)] * 3, Fixed(3), [costs] * 3)
    assert len(updates) == 3
    assert len(set(seconds)) > 1


def test_listening_tells_how_sure_the_drafter_is_and_changes_nothing():
    doubts = ((0.1, 0.6), (0.2, 0.9))  # of the rest it is as good as certain
    workload = from_lengths("w", np.full(40, 400))
    acceptance = Acceptance(np.full(40, 0.9999), doubts=doubts)
    workload = replace(workload, drafters={"nf4": acceptance}, stoppable=True)
    costs, listening = fit(timings(1.0)), Listening(Fixed(6))
    assert makespan(simulate(workload, listening, costs)) == makespan(simulate(workload, Fixed(6), costs))
    shares, found = listening.leads.shares, listening.leads.acceptance(1.0)
    kinds = classes_of(np.log([0.6 / 0.4, 0.9 / 0.1, 0.9999 / 0.0001]))
    assert shares[kinds] == pytest.approx([0.1, 0.2, 0.7], abs=0.015)
    assert found[kinds] == pytest.approx([0.6, 0.9, 1.0], abs=0.02)


def test_passes_timed_in_a_rollout_tell_what_passes_cost():
    cost = {TARGET: PassCost(0.0, 0.0, 0.02, 0.001, 1e-6), "nf4": PassCost(0.0, 0.0, 0.006, 0.001, 1e-6)}
    costs, timing = CostModel(cost), Timing()
    simulate(from_lengths("w", np.arange(50, 500, 50)), timing, costs)
    found = adding_up(timing.timings)
    for b, c in ((1, 300), (4, 800), (9, 2000)):
        assert found.target(b, b, c) == pytest.approx(costs.target(b, b, c), rel=0.03)
        assert found.target(b, 7 * b, c) == pytest.approx(costs.target(b, 7 * b, c), rel=0.03)
        assert found.draft("nf4", b, c) == pytest.approx(costs.draft("nf4", b, c), rel=0.03)


def test_a_rollouts_costs_add_up_to_the_time_it_took():
    passes = timings(1.0) * 7 + timings(3.0) * 3
    assert fit(passes).target(1, 1, 0) == pytest.approx(1.0, abs=0.01)
    found = adding_up(passes)
    assert found.target(1, 1, 0) == pytest.approx(1.6, abs=0.01)
    assert found.draft("nf4", 1, 0) == pytest.approx(1.6, abs=0.01)
