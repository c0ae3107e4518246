"""The turns that engines take in `rollout-spec bench vllm`."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("vllm")

from rollout_spec.benchmarks import vllm as bench
from rollout_spec.policy.baselines import Fixed, Off

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

taken: list[str] = []


class Llm:
    """A vLLM that takes `steps` steps for whatever it is given."""

    def __init__(self, name: str, steps: int, seconds: float) -> None:
        self.name, self.steps, self.seconds, self.left = name, steps, seconds, 0
        self.llm_engine = self
        self.decisions = SimpleNamespace(policy=Fixed(1))
        self.policies: list[Any] = []

    def enqueue(self, prompts: list[str], params: list[Any], use_tqdm: bool) -> None:
        assert len(prompts) == len(params) and all(x.ignore_eos and x.max_tokens == 5 for x in params)
        self.left = self.steps

    def has_unfinished_requests(self) -> bool:
        return self.left > 0

    def step(self) -> None:
        self.left -= 1
        taken.append(self.name)
        self.policies.append(self.decisions.policy)
        time.sleep(self.seconds)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> bench.VllmBenchmark:
    made = bench.VllmBenchmark(Path("none"), 1, 0, Console(quiet=True))
    made._engines = {"quick": Llm("quick", 2, 0.0), "slow": Llm("slow", 4, 0.02)}
    monkeypatch.setattr(bench, "scheduler", lambda engine: engine)
    taken.clear()
    return made


ROUNDS = [(["a", "b"], [5, 5])] * 3


def test_on_a_cpu_engines_alternate_and_only_the_own_steps_are_timed(benchmark: bench.VllmBenchmark) -> None:
    seconds = benchmark._turns(("quick", "slow"), ROUNDS)
    first = ["quick", "slow"] * 2 + ["slow"] * 2
    assert taken == first + ["slow", "quick"] * 2 + ["slow"] * 2 + first
    assert [len(x) for x in seconds.values()] == [2, 2]  # the first round does not count
    assert seconds["quick"].max() < 0.02 and seconds["slow"].min() >= 0.08


def test_on_a_gpu_every_engine_has_a_round_to_itself(benchmark: bench.VllmBenchmark) -> None:
    benchmark.on_gpu = True
    benchmark._turns(("quick", "slow"), ROUNDS)
    assert taken == ["quick"] * 2 + ["slow"] * 8 + ["quick"] * 4 + ["slow"] * 4


def test_an_engine_that_is_off_does_not_speculate(benchmark: bench.VllmBenchmark) -> None:
    slow = benchmark._engines["slow"]
    own = slow.decisions.policy
    benchmark._turns(("quick", "slow off"), ROUNDS)
    assert len(slow.policies) == 12 and all(isinstance(x, Off) for x in slow.policies)
    assert slow.decisions.policy is own
