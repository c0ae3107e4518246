"""What a group does when its workers fail, with stand-ins for engines and trainers on a real Ray."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_spec.contracts import InvalidRequest, WeightError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def make_parts(fails: Callable[[Any], Exception | None]) -> tuple[Any, Any]:
    """An engine whose shares are functions of it, and a trainee that never runs out; nested, so that Ray sends them along.

    `fails` says what an update ends with.
    """

    class Engine:
        busy, free_bytes, policy = False, 1 << 30, (None, 0)

        def generate(self, share: Any, draining: Callable[[], None]) -> Any:
            draining()
            return share(self)

        def update(self, weights: Any, version: int) -> None:
            error = fails(weights)
            if error is not None:
                raise error
            self.policy = float(weights["w"]), version

        def publish(self, tensors: Any, version: int) -> None: ...

    class Trainee:
        bytes = 0

        def __init__(self, engine: Any) -> None: ...

        def micro_step(self) -> float:
            time.sleep(0.01)
            return 0.0

        def state(self) -> dict[str, torch.Tensor]:
            return {"w": torch.zeros(1)}

        candidate = state

        def load(self, state: Any) -> None: ...

        def evaluate(self, tensors: Any, needed: Callable[[], bool]) -> tuple[float, int]:
            return 0.5, 1

    return Engine, Trainee


@pytest.fixture
def make_group(cluster: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from rollout_spec.adaptive.spot.group import SpotGroup

    made: list[Any] = []

    def make(workers: int = 1, fails: Callable[[Any], Exception | None] = lambda weights: None) -> Any:
        made.append(SpotGroup(workers, *make_parts(fails), tmp_path / "spot", timeout=60))
        return made[-1]

    yield make
    for group in made:
        group.shutdown()


def policies(group: Any) -> list[Any]:
    return group.rollout([lambda engine: engine.policy] * len(group.workers), lambda: not_for_ever(group))


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(value)}


def not_for_ever(group: Any) -> None:
    assert group.deaths < 8, "it goes on replacing"


def test_an_engine_that_cannot_be_made_is_an_error_at_once(cluster: None, tmp_path: Path) -> None:
    from rollout_spec.adaptive.spot.group import SpotGroup
    from rollout_spec.adaptive.spot.protocol import SpotError

    def make_engine() -> Any:
        raise FileNotFoundError("no such policy")

    with pytest.raises(SpotError, match=r"worker-0 could not start: .*no such policy"):
        SpotGroup(1, make_engine, make_parts(lambda weights: None)[1], tmp_path)


def test_a_share_that_ends_every_worker_is_given_up(make_group: Callable[..., Any]) -> None:
    from rollout_spec.adaptive.spot.group import LOSSES
    from rollout_spec.adaptive.spot.protocol import SpotError

    group = make_group()
    with pytest.raises(SpotError, match=f"{LOSSES} were lost in its place"):
        group.rollout([lambda engine: os._exit(1)], lambda: not_for_ever(group), interval=0.05)
    assert policies(group) == [(None, 0)], "and the group goes on"


def test_refused_weights_do_not_come_with_a_replacement(make_group: Callable[..., Any]) -> None:
    import ray

    group = make_group(fails=lambda given: WeightError("w: misshapen") if float(given["w"]) == 2 else None)
    group.update_weights(weights(1), 1)
    with pytest.raises(WeightError, match="misshapen"):
        group.update_weights(weights(2), 2)
    assert group.deaths == 0
    ray.kill(group.workers[0])
    assert policies(group) == [(1, 1)] and group.deaths == 1


def test_an_update_that_one_worker_cannot_take_is_in_force_nowhere(
    make_group: Callable[..., Any], tmp_path: Path
) -> None:
    claimed = str(tmp_path / "claimed")

    def fails(given: Any) -> Exception | None:
        """The first to be given 2."""
        if float(given["w"]) == 2:
            try:
                os.close(os.open(claimed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return None
            return RuntimeError("out of memory")
        return None

    group = make_group(2, fails)
    group.update_weights(weights(1), 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        group.update_weights(weights(2), 2)
    assert policies(group) == [(1, 1), (1, 1)]
    group.update_weights(weights(2), 2)
    assert policies(group) == [(2, 2), (2, 2)]


def test_training_ends_with_a_rollout_that_fails(make_group: Callable[..., Any], tmp_path: Path) -> None:
    import ray

    group, go_on = make_group(2), str(tmp_path / "go on")

    def wait_and_fail(engine: Any) -> None:
        while not os.path.exists(go_on):
            time.sleep(0.01)
        raise ValueError("a prompt that is none")

    def once_the_other_trains() -> None:
        if ray.get(group.coordinator.figures.remote())["step"] > 0:
            Path(go_on).touch()

    with pytest.raises(ValueError, match="a prompt that is none"):
        group.rollout([lambda engine: None, wait_and_fail], once_the_other_trains, interval=0.05)
    assert ray.get(group.coordinator.figures.remote())["phase"] == "waiting"
    assert policies(group) == [(None, 0)] * 2


def test_as_many_shares_as_workers(make_group: Callable[..., Any]) -> None:
    group = make_group()
    for count in (0, 2):
        with pytest.raises(InvalidRequest, match=f"shares={count}: give 1"):
            group.rollout([None] * count)


def test_silence_is_an_error_and_the_group_goes_on(make_group: Callable[..., Any]) -> None:
    from rollout_spec.adaptive.spot.protocol import SpotError

    group = make_group()
    before = list(group._names)
    group.timeout = 3.0
    with pytest.raises(SpotError, match="no share was answered within timeout=3 s: 1 were in flight"):
        group.rollout([lambda engine: threading.Event().wait()], interval=0.1)
    group.timeout = 60
    assert group._names != before and policies(group) == [(None, 0)]


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("timeout", 0)])
def test_mistakes_are_errors_at_start(name: str, value: int) -> None:
    from rollout_spec.adaptive.spot.group import SpotGroup

    options = {"workers": 1, "make_engine": None, "make_trainee": None, "folder": "", name: value}
    with pytest.raises(InvalidRequest, match=f"{name}={value}"):
        SpotGroup(**options)
