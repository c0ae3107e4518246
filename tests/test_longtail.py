"""`rollout-spec bench longtail`: what its rollouts are predicted from."""

import numpy as np
import pytest

from rollout_spec.benchmarks.longtail import SELF, LongTail, Rollouts, _simulated
from rollout_spec.contracts import SpecCounts
from rollout_spec.policy.baselines import Fixed
from rollout_spec.policy.cost_model import TARGET, PassTiming, fit
from rollout_spec.policy.workloads import acceptance_of, from_lengths


def timings(seconds: float) -> list[PassTiming]:
    """Of passes that all take as long."""
    return [PassTiming(kind, b, b, c, seconds) for kind in (TARGET, "nf4") for b in (1, 2) for c in (0, 99)]


def test_each_rollout_is_simulated_with_passes_timed_before_and_after_it():
    tail = LongTail.__new__(LongTail)
    tail.batch, tail.seed, tail.drafter, tail._alpha, tail.notes = 2, 0, "nf4", 0.9, {}
    tail.costs = fit(timings(1.0))
    two_that_do_not_count = 9.0, 1.0
    tail._timings = [timings(seconds) for seconds in (*two_that_do_not_count, 1.0, 4.0, 4.0, 4.0)]
    counted = [1.0, 2.5, 4.0, 4.0]
    runs = {name: Rollouts(counted, SpecCounts()) for name in ("plain", SELF)}
    tail._predict(runs, [[500, 510]] * 2 + [[10, 20]] * 4)
    found = tail.notes["simulated over measured makespan, plain"]
    passes = found["median"]
    assert passes == pytest.approx(20, abs=1) and found["of_total"] == pytest.approx(passes, rel=1e-3)
    assert tail.notes["a plain pass in epoch 1 over one before"] == {"least": 1.0, "most": 4.0}


def test_to_a_simulated_policy_every_draw_is_an_rl_step_with_luck_of_its_own(monkeypatch):
    updates = []
    monkeypatch.setattr(Fixed, "after_update", lambda self: updates.append(1))
    costs = fit(timings(1.0))
    seconds = _simulated([from_lengths("same", np.full(4, 200), alpha=0.7)] * 3, Fixed(3), [costs] * 3)
    assert len(updates) == 3
    assert len(set(seconds)) > 1


@pytest.mark.parametrize("K", [1, 6])
def test_acceptance_is_told_from_the_share_of_drafts_that_was_accepted(K):
    drafts = np.random.default_rng(0).random((20_000, K)) < 0.9
    share = np.cumprod(drafts, axis=1).mean()
    assert acceptance_of(share, K) == pytest.approx(0.9, abs=0.005)
