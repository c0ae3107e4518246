"""What a pool does when engines fail over an update or say nothing, with stand-ins for engines on a real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_kills import POLICY

from rollout_spec.contracts import WeightError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def make_engine(fails: Callable[[Any], Exception | None]) -> type:
    """A class of engines that know their policy; `fails` says what an update ends with. Nested, so that Ray sends it along."""

    class Engine:
        def __init__(self, path: str, config: dict, first: int, weights: Any, now: int) -> None:
            self.policy = (None, first) if weights is None else (float(weights["w"]), now)

        def update_weights(self, weights: Any, version: int) -> float:
            error = fails(weights)
            if error is not None:
                raise error
            self.policy = float(weights["w"]), version
            return 0.25

        def reader(self) -> None: ...

        def state(self) -> Any:
            import os

            return self.policy, os.getpid()

        def hang(self) -> None:
            time.sleep(600)

    return Engine


@pytest.fixture
def make_pool(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    from rollout_spec.integrations.ray import pool as module

    made: list[Any] = []

    def make(fails: Callable[[Any], Exception | None] = lambda weights: None, size: int = 2) -> Any:
        monkeypatch.setattr(module, "EngineActor", make_engine(fails))
        made.append(module.EnginePool(POLICY, size=size, timeout=60, actor_options={"num_cpus": 0}))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def policies(pool: Any) -> list[Any]:
    return [policy for policy, _ in pool._ask_all("state")]


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    return [("w", torch.tensor(value))]


def test_an_update_that_one_engine_cannot_take_is_in_force_nowhere(
    make_pool: Callable[..., Any], tmp_path: Path
) -> None:
    claimed = str(tmp_path / "claimed")

    def fails(given: Any) -> Exception | None:
        """The first to be given 2."""
        import os

        if float(given["w"]) == 2:
            try:
                os.close(os.open(claimed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return None
            return RuntimeError("out of memory")
        return None

    pool = make_pool(fails)
    assert pool.update_weights(weights(1)) == 0.25
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.update_weights(weights(2))
    assert policies(pool) == [(1, 1), (1, 1)]
    pool.update_weights(weights(2))
    assert policies(pool) == [(2, 2), (2, 2)]


def test_what_all_refuse_restarts_nobody(make_pool: Callable[..., Any]) -> None:
    pool = make_pool(lambda given: WeightError("w: misshapen") if float(given["w"]) == 2 else None)
    pool.update_weights(weights(1))
    before = pool._ask_all("state")
    with pytest.raises(WeightError, match="misshapen"):
        pool.update_weights(weights(2))
    assert pool._ask_all("state") == before


def test_weights_that_cannot_be_read_change_nothing(make_pool: Callable[..., Any]) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights(2)
        raise OSError("the trainer is gone")

    pool = make_pool()
    pool.update_weights(weights(1))
    with pytest.raises(OSError, match="the trainer is gone"):
        pool.update_weights(broken())
    assert pool._version == 1
    pool.update_weights(weights(2))
    assert policies(pool) == [(2, 2), (2, 2)]


def test_an_engine_lost_over_an_update_is_replaced_by_one_that_has_it(make_pool: Callable[..., Any]) -> None:
    import ray

    pool = make_pool()
    ray.kill(pool._actors[0])
    pool.update_weights(weights(1))
    assert policies(pool) == [(1, 1), (1, 1)]


def test_an_engine_that_is_silent_over_an_update_does_not_come_back_with_the_old_policy(
    make_pool: Callable[..., Any], tmp_path: Path
) -> None:
    claimed = str(tmp_path / "claimed")

    def fails(given: Any) -> Exception | None:
        """The first to be given 2 takes long, and has not taken it then."""
        import os

        if float(given["w"]) != 2 or os.path.exists(claimed):
            return None
        os.close(os.open(claimed, os.O_CREAT))
        time.sleep(6)
        return RuntimeError("too late")

    pool = make_pool(fails, size=1)
    pool.update_weights(weights(1))
    pool.timeout = 2.0
    pool.update_weights(weights(2))
    pool.timeout = 60
    assert policies(pool) == [(2, 2)]


def test_silent_engines_are_waited_for_together(make_pool: Callable[..., Any]) -> None:
    pool = make_pool(size=4)
    policies(pool)  # all have started
    pool.timeout = 1.0
    start = time.monotonic()
    assert pool._ask(range(4), "hang") == []
    assert time.monotonic() - start < 2.5
    pool.timeout = 60
    assert policies(pool) == [(None, 0)] * 4
