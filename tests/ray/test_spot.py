"""Spot training on a real Ray: workers that idle train, publish to everybody, yield, and may die at any time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spot_chaos import (
    LONG,
    SHORT,
    actor_pids,
    chaos,
    check,
    left_after,
    make_group,
    make_shares,
    make_undisturbed,
    same,
    undisturbed,
    wait_for_deaths,
    with_other_ids,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def group(cluster: None, tmp_path: Path) -> Iterator[Any]:
    made = make_group(tmp_path)
    pids = actor_pids()
    yield made
    made.shutdown()
    assert not left_after(pids | actor_pids())


def test_idle_workers_train_and_publish_to_every_engine(group: Any) -> None:
    alone = make_undisturbed()
    for round_ in range(3):
        shares = make_shares(round_)
        answers = group.rollout(shares)
        assert same(answers, undisturbed(alone, shares)) == (14, 14)
    figures = group.figures()
    coordinator, workers = figures["coordinator"], figures["workers"].values()
    assert coordinator["version"] >= 1 and coordinator["step"] >= 2, coordinator["said"]
    assert {worker["version"] for worker in workers} == {coordinator["version"]}
    assert any("published" in text for text in coordinator["said"])
    assert sum(c.spec.accepted for completions in answers for c in completions) > 0
    by_place = [figures["workers"][name] for name in group._names]
    assert by_place[SHORT]["micro_batches"] > 0 and by_place[SHORT]["used_seconds"] > 0


def test_a_worker_that_is_needed_yields_within_a_micro_batch(group: Any) -> None:
    import ray

    alone, worker = make_undisturbed(), group.workers[SHORT]
    extras: list[Any] = []
    asked: list[Any] = []
    yielded = False

    def need_it_as_it_trains() -> None:
        """Again if it was between two micro-batches. The end of a rollout preempts, too; this is called before it."""
        nonlocal yielded, trained
        now = ray.get(worker.figures.remote())
        yielded = yielded or now["preemption_seconds"]["count"] > before["preemption_seconds"]["count"]
        if not yielded and now["micro_batches"] > trained:
            extras.append(make_shares(50 + len(extras))[SHORT])
            asked.append(worker.generate.remote(extras[-1]))
        trained = now["micro_batches"]

    for round_ in range(4):
        before = ray.get(worker.figures.remote())
        trained = before["micro_batches"]
        shares = make_shares(round_, long=16)  # long enough for the request to come while it trains
        answers = group.rollout(shares, need_it_as_it_trains, interval=0.05)
        answers += [ray.get(answer) for answer in asked]
        right, all_of_them = same(answers, undisturbed(alone, [*shares, *extras]))
        assert right == all_of_them >= 32
        if yielded:
            break
    assert yielded
    times = ray.get(worker.figures.remote())
    assert times["preemption_seconds"]["max"] <= times["micro_batch_seconds"]["max"] + 0.5


def test_a_new_coordinator_goes_on_from_the_checkpoint(group: Any) -> None:
    import ray

    group.rollout(make_shares(0))
    group.rollout(make_shares(1))
    before = group.figures()["coordinator"]
    assert before["step"] >= 1 and before["version"] >= 1
    _wait_until_saved(Path(group._folder))
    os.kill(before["pid"], signal.SIGKILL)
    wait_for_deaths(group, 1)
    after = group.figures()["coordinator"]
    assert after["epoch"] > before["epoch"] and after["version"] >= before["version"]
    assert before["step"] - 1 <= after["step"]
    group.rollout(make_shares(2))
    later = group.figures()["coordinator"]
    assert later["step"] > after["step"] and ray.get(group.coordinator.figures.remote())["workers"]


def test_random_deaths_lose_no_rollout_and_change_no_token(cluster: None, tmp_path: Path) -> None:
    group = make_group(tmp_path)
    rounds, pids = chaos(group, rounds=4, seed=3, update_every=2)
    group.shutdown()
    check(rounds)
    assert len(pids) >= 3 + sum(round_["replaced"] for round_ in rounds)
    assert not left_after(pids)


def test_a_share_asked_anew_under_other_ids_would_be_noticed(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, asked = type(group)._ask, set()

    def ask(self: Any, place: int, share: Any) -> Any:
        again = (place, share) in asked
        asked.add((place, share))
        return kept(self, place, with_other_ids(share) if again else share)

    monkeypatch.setattr(type(group), "_ask", ask)
    shares = make_shares(0)
    killed: list[int] = []

    def kill() -> None:
        if not killed:
            killed.append(group.figures()["workers"][group._names[LONG]]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    answers = group.rollout(shares, kill, interval=0.05)
    assert group.deaths == 1
    count, equal = same(answers, undisturbed(make_undisturbed(), shares))
    assert count == 14 and equal < 14


def test_an_actor_that_is_left_behind_would_be_noticed(cluster: None, tmp_path: Path) -> None:
    import ray

    group = make_group(tmp_path)
    group.figures()
    pids = actor_pids()
    for worker in group.workers:
        ray.kill(worker)
    assert len(left_after(pids, seconds=3)) == 1
    group.shutdown()
    assert not left_after(pids)


def _wait_until_saved(folder: Path) -> None:
    until = time.monotonic() + 20
    while not (folder / "spot.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
