"""Rollouts of spot-training workers during which processes are killed, and what they are compared with."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from pool_kills import trajectories

from rollout_spec import Completion, RolloutEngine, SamplingParams
from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.serving import ServedEngine, Share
from rollout_spec.adaptive.spot.trainee import DrafterTrainee
from rollout_spec.adaptive.trainer import TrainConfig
from rollout_spec.example_policy import example_folder, load_problems
from rollout_spec.models.checkpoint import read_checkpoint

POLICY = example_folder() / "policy"
SPECULATION = {"drafter": "none", "verifier": "coupled", "history": False, "shadow": False, "draft_length": 3,
               "canary_min_acceptance": 0.0}  # fmt: skip
CONFIG: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "seed": 5, "max_model_len": 640, "max_num_seqs": 16, "speculation": SPECULATION,
}  # fmt: skip
TRAINING = TrainConfig(unroll=2, warmup_steps=5, row_tokens=192)
OPTIONS = SpotOptions(micro_batches=2, publish_every=2)
ALONE = (("trainer",), ("coordinator",), ("worker",))
TOGETHER = (("trainer", "coordinator"), ("worker", "coordinator"), ("trainer", "worker"))
VICTIMS = (*ALONE, *ALONE, *ALONE, *TOGETHER)
SHORT, LONG = 0, 1  # places of the worker that idles, and trains, and of the one that decodes on


def make_group(folder: Path) -> Any:
    from rollout_spec.adaptive.spot.group import SpotGroup

    engine = partial(ServedEngine.from_pretrained, str(POLICY), CONFIG)
    trainee = partial(DrafterTrainee.begin, config=TRAINING, batch_tokens=192, held_out=2, judged_tokens=384)
    return SpotGroup(2, engine, trainee, folder, OPTIONS)


def make_shares(round_: int, long: int = 3) -> list[Share]:
    pool = sorted(load_problems().prompts(128, seed=round_, split="test"), key=len)
    parts = pool[:4], pool[-long:]
    params = SamplingParams(n=2, max_tokens=256, seed=round_)
    return [Share(tuple(p), tuple(f"{round_}-{place}-{i}" for i in range(len(p))), params)
            for place, p in enumerate(parts)]  # fmt: skip


def undisturbed(engine: RolloutEngine, shares: list[Share]) -> list[list[Completion]]:
    return [engine.generate(list(s.prompts), s.params, request_ids=s.request_ids) for s in shares]


def make_undisturbed() -> RolloutEngine:
    return RolloutEngine.from_pretrained(POLICY, CONFIG)


def same(answers: list[Any], expected: list[list[Completion]]) -> tuple[int, int]:
    """How many completions came, and how many of them are the undisturbed engine's."""
    found = [trajectories(completions) for completions in answers]
    wanted = [trajectories(completions) for completions in expected]
    equal = sum(a == b for mine, other in zip(found, wanted) for a, b in zip(mine, other))
    return sum(map(len, found)), equal


def actor_pids() -> set[int]:
    """Processes of spot actors that this process's Ray has started."""
    return {p.pid for p in psutil.Process().children(recursive=True) if "ray::Spot" in _command(p)}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def left_after(pids: set[int], seconds: float = 20.0) -> list[int]:
    """Those of `pids` that still run after so long."""

    def running() -> list[int]:
        return [pid for pid in sorted(pids) if psutil.pid_exists(pid) and _runs(pid)]

    until = time.monotonic() + seconds
    while running() and time.monotonic() < until:
        time.sleep(0.1)
    return running()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Killer:
    """Kills processes of a group during one rollout, as the system would: to be called every now and then.

    The trainer is the worker that has answered its share and has trained since; the worker is the one that decodes.
    """

    def __init__(self, group: Any, victims: tuple[str, ...], rng: random.Random) -> None:
        import ray

        self._get, self._group = ray.get, group
        self._wait = {victim: rng.randrange(1, 12) for victim in victims}
        self._trained = self._figures(SHORT)["micro_batches"] if "trainer" in victims else 0
        self._pids = {
            "coordinator": self._get(group.coordinator.figures.remote(), timeout=60)["pid"],
            "trainer": self._figures(SHORT)["pid"],
            "worker": self._figures(LONG)["pid"],
        }
        self.killed: list[str] = []

    def __call__(self) -> None:
        for victim in list(self._wait):
            if (victim == "trainer" and self._idle_trainer()) or victim != "trainer":
                self._wait[victim] -= 1
            if self._wait[victim] <= 0:
                self._kill(victim)

    def finish(self) -> tuple[str, ...]:
        """Kill whom the rollout was too short for; returns them."""
        late = tuple(self._wait)
        for victim in late:
            self._kill(victim)
        return late

    def _idle_trainer(self) -> bool:
        import ray

        try:
            return bool(self._figures(SHORT)["micro_batches"] > self._trained)
        except ray.exceptions.RayError:
            return False

    def _kill(self, victim: str) -> None:
        del self._wait[victim]
        os.kill(self._pids[victim], signal.SIGKILL)
        self.killed.append(victim)

    def _figures(self, place: int) -> dict[str, Any]:
        figures: dict[str, Any] = self._get(self._group.workers[place].figures.remote(), timeout=60)
        return figures


def chaos(group: Any, rounds: int, seed: int = 0, update_every: int = 5) -> list[dict[str, Any]]:
    """Rollouts with kills at random, each compared with an engine that nobody kills."""
    rng, alone, done = random.Random(seed), make_undisturbed(), []
    weights = {name: tensor.float() for name, tensor in read_checkpoint(POLICY)}
    pids = actor_pids()
    for round_ in range(rounds):
        if round_ % update_every == update_every - 1:
            version = round_ + 1
            moved = {name: tensor * (1 + 0.002 * version) for name, tensor in weights.items()}
            group.update_weights(moved, version)
            alone.update_weights(moved.items(), version)
        victims = VICTIMS[rng.randrange(len(VICTIMS))]
        killer, deaths, start = Killer(group, victims, rng), group.deaths, time.perf_counter()
        shares = make_shares(round_)
        answers = group.rollout(shares, killer, interval=0.05)
        seconds = time.perf_counter() - start
        late = killer.finish()
        wait_for_deaths(group, deaths + len(victims))
        figures = group.figures()
        pids |= actor_pids()
        count, equal = same(answers, undisturbed(alone, shares))
        spec = sum((c.spec.accepted for completions in answers for c in completions), 0)
        done.append(
            {
                "killed": list(victims), "between_rollouts": list(late), "replaced": group.deaths - deaths,
                "completions": count, "same": equal, "expected": sum(len(s.prompts) * s.params.n for s in shares),
                "tokens": sum(len(c.token_ids) for completions in answers for c in completions),
                "accepted_drafts": spec, "drafter_version": figures["coordinator"]["version"],
                "rounds_agreed": figures["coordinator"]["step"], "epoch": figures["coordinator"]["epoch"],
                "actors": len(actor_pids()), "seconds": round(seconds, 2),
            }
        )  # fmt: skip
    return done, pids


def wait_for_deaths(group: Any, deaths: int, seconds: float = 30.0) -> None:
    """Have the group replace its dead until so many have been, for a kill takes a moment to be noticed."""
    until = time.monotonic() + seconds
    while group.deaths < deaths and time.monotonic() < until:
        group.heal()
        time.sleep(0.05)


def check(rounds: list[dict[str, Any]]) -> None:
    for round_ in rounds:
        assert round_["replaced"] == len(round_["killed"]) > 0
        assert round_["completions"] == round_["same"] == round_["expected"]
        assert round_["actors"] == 3
    epochs = [round_["epoch"] for round_ in rounds]
    assert epochs == sorted(epochs)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(round_[name] for round_ in rounds)
             for name in ("completions", "same", "expected", "tokens", "accepted_drafts", "replaced")}  # fmt: skip
    killed = Counter(victim for round_ in rounds for victim in round_["killed"])
    late = sum(len(round_["between_rollouts"]) for round_ in rounds)
    return {"rounds": len(rounds), "killed": dict(killed), "of_these_between_rollouts": late, **total,
            "drafters_published": rounds[-1]["drafter_version"], "rounds_agreed": rounds[-1]["rounds_agreed"]}  # fmt: skip


def with_other_ids(share: Share) -> Share:
    return replace(share, request_ids=tuple(f"{name}-again" for name in share.request_ids))
