"""One engine trained for in one process, with a stand-in for the drafter's trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.local import LocalSpot


class Idle:
    """An engine without requests."""

    busy, free_bytes = False, 1 << 30

    def __init__(self) -> None:
        self.published: list[int] = []

    def publish(self, tensors: Any, version: int) -> None:
        self.published.append(version)


class Checked:
    """A trainee whose checks take ten micro-batches, each of which finds the same; `asked` says how often it was stopped."""

    bytes, needs = 0, 0

    def micro_step(self) -> float:
        return 1.0

    def state(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    candidate = state

    def load(self, state: Any) -> None: ...

    def evaluate(self, tensors: Any, needed: Callable[[], bool]) -> tuple[float, int]:
        for batch in range(10):
            if needed():
                self.needs += 1
                return 0.5, 10 * batch
        return 0.5, 100


def make() -> tuple[LocalSpot, Idle, Checked]:
    engine, trainee = Idle(), Checked()
    return LocalSpot(engine, trainee, SpotOptions(micro_batches=1, publish_every=1)), engine, trainee


def test_a_check_ends_when_time_is_up_and_what_it_found_counts_for_nothing() -> None:
    spot, engine, trainee = make()
    asked: list[int] = []

    def until() -> bool:
        """Before the micro-batch, before the check, and three times in it."""
        asked.append(1)
        return len(asked) > 5

    assert spot.train(until) == 2
    assert trainee.needs == 1 and not engine.published
    assert spot.train(lambda: bool(engine.published)) > 0, "it goes on, and checks anew"
    assert engine.published == [1]


def test_a_check_ends_when_work_comes() -> None:
    spot, engine, trainee = make()

    def work_comes(tensors: Any, needed: Callable[[], bool]) -> tuple[float, int]:
        engine.busy = True
        return Checked.evaluate(trainee, tensors, needed)

    trainee.evaluate = work_comes  # type: ignore[method-assign]
    assert spot.train(lambda: False) == 2
    assert trainee.needs == 1 and not engine.published
