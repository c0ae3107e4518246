"""`rollout-spec bench longtail`: what its rollouts are predicted from."""

import pytest

from rollout_spec.benchmarks.longtail import SELF, LongTail, Rollouts
from rollout_spec.contracts import SpecCounts
from rollout_spec.policy.cost_model import TARGET, PassTiming, fit


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
    tail._predict(runs, [[10, 20]] * 4)
    found = tail.notes["simulated over measured makespan, plain"]
    passes = found["median"]
    assert passes == pytest.approx(20, abs=1) and found["of_total"] == pytest.approx(passes, rel=1e-3)
    assert tail.notes["a plain pass in epoch 1 over one before"] == {"least": 1.0, "most": 4.0}
