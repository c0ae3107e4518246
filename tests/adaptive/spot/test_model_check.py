"""The protocol, searched exhaustively; and each of its guards is needed."""

from __future__ import annotations

import pytest
from model import Setting, Violation, explore

from rollout_spec.adaptive.spot import coordinator, worker

GUARDS = {
    "epoch": (Setting((0, 0), coordinator_deaths=1), "version|called|averaged|judged|passes"),
    "known": (Setting((0, 1), worker_deaths=1), "deadlock"),
    "round": (Setting((0, 0), steps=2, rollouts=2), "averaged|passes"),
    "reports": (Setting((0, 0), coordinator_deaths=1), "version|called"),
    "version": (Setting((0, 0), coordinator_deaths=1), "version|called"),
    "left": (Setting((0, 1), steps=2), "deadlock"),
    "lost": (Setting((0, 0), worker_deaths=1), "KeyError|deadlock"),
    "open": (Setting((0, 0)), "outside a rollout"),
    "memory": (Setting((0, 0), too_large=True), "does not fit"),
    "better": (Setting((0,), steps=2), "no better"),
    "seen": (Setting((0, 1)), "deadlock|at once"),
    "micro_batch": (Setting((0, 1)), "at once"),
}
SETTINGS = {
    "one more share": Setting((0, 1)),
    "both busy first": Setting((1, 1)),
    "two rounds": Setting((0, 0), steps=2),
    "two batches": Setting((0, 1), micro_batches=2),
    "two rollouts": Setting((0, 0), rollouts=2),
    "ends at any time": Setting((0, 1), patient=False),
    "a worker dies": Setting((0, 0), worker_deaths=1),
    "the coordinator dies": Setting((0, 0), coordinator_deaths=1),
    "no memory": Setting((0, 0), too_large=True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_bad_is_reachable_and_everything_can_end_well(name: str) -> None:
    assert explore(SETTINGS[name]) > 30


@pytest.mark.parametrize("guard", sorted(coordinator.GUARDS | worker.GUARDS))
def test_each_guard_is_needed(guard: str) -> None:
    setting, wrong = GUARDS[guard]
    with pytest.raises(Violation, match=wrong):
        explore(setting, without=guard)
