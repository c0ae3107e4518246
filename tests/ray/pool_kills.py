"""Rollouts during which engines are killed, and what they are compared with."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

from rollout_spec import Completion, RolloutEngine, SamplingParams
from rollout_spec.example_policy import example_folder, load_problems

POLICY = example_folder() / "policy"
CONFIG: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "seed": 5,
    "speculation": {"drafter": "int8", "draft_length": 4},
}
COUPLED = {**CONFIG, "speculation": {**CONFIG["speculation"], "verifier": "coupled"}}
PARAMS = SamplingParams(n=4, max_tokens=256)


def make_prompts(count: int, seed: int) -> list[str]:
    return [problem.prompt for problem in load_problems().sample(count, seed=seed)]


def trajectories(completions: list[Completion]) -> list[tuple[Any, ...]]:
    """All of a completion but for what speculation did, which depends on the company."""
    return [tuple(vars(replace(c, spec=None)).items()) for c in completions]


class Killer(threading.Thread):
    """Kills an engine of a pool as soon as it decodes, as the system kills a process."""

    def __init__(self, pool: Any, engine: int, after_tokens: int) -> None:
        super().__init__(daemon=True)
        self.pool, self.engine, self.after_tokens = pool, engine, after_tokens
        self.tokens_lost = 0

    def run(self) -> None:
        import ray

        actor = self.pool._actors[self.engine]
        start = ray.get(actor.stats.remote(), timeout=60).generated_tokens
        until = time.monotonic() + 60
        while time.monotonic() < until:
            stats = ray.get(actor.stats.remote(), timeout=60)
            if stats.live and stats.generated_tokens - start >= self.after_tokens:
                self.tokens_lost = stats.generated_tokens - start
                ray.kill(actor)
                return


def kill_in_mid_rollout(pool: Any, rounds: int) -> list[dict[str, Any]]:
    """Rounds of a rollout during which an engine is killed, each compared with an engine that nobody kills."""
    alone = RolloutEngine.from_pretrained(POLICY, COUPLED, version=pool.report().version)
    done = []
    for round_ in range(rounds):
        prompts = make_prompts(24, seed=100 + round_)
        before = pool.report()
        killer = Killer(pool, engine=round_ % 2, after_tokens=1 + 40 * (round_ % 7))
        killer.start()
        start = time.perf_counter()
        ids = [f"round-{round_}-{row}" for row in range(len(prompts))]
        completions = pool.generate(prompts, PARAMS, request_ids=ids)
        seconds = time.perf_counter() - start
        killer.join(60)
        after = pool.report()
        expected = alone.generate(prompts, PARAMS, request_ids=ids)
        done.append(
            {
                "killed_after_tokens": killer.tokens_lost,
                "replaced": after.replaced - before.replaced,
                "replayed_samples": after.replayed - before.replayed,
                "completions": len(completions),
                "same": sum(a == b for a, b in zip(trajectories(completions), trajectories(expected))),
                "tokens": sum(len(c.token_ids) for c in completions),
                "seconds": round(seconds, 2),
            }
        )
    return done


def check(rounds: list[dict[str, Any]]) -> None:
    for round_ in rounds:
        assert (
            round_["killed_after_tokens"] > 0 and round_["replaced"] == 1 and round_["replayed_samples"] > 0
        )
        assert round_["completions"] == round_["same"] == 96
