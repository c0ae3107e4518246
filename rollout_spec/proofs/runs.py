"""The requests every proof repeats, and the ways to repeat them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rollout_spec.contracts import Completion, SamplingParams, SpecCounts
from rollout_spec.engine import RolloutEngine
from rollout_spec.policy.baselines import Fixed, Off, RandomLengths
from rollout_spec.policy.records import SpeculationPolicy

CUTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
OFF = Off()


@dataclass(frozen=True)
class Requests:
    """One sample each of `prompts`, under ids of their own: run twice, they meet the same noise."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @classmethod
    def build(cls, prompts: Sequence[list[int]], seeds: int, max_tokens: int, cuts: bool) -> Requests:
        """Every prompt with `seeds` seeds; with `cuts`, every other one at temperature 0.7 and top-p 0.9."""
        rows = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
        params = [
            SamplingParams(max_tokens=max_tokens, seed=seed, **(CUTS if cuts and row % 2 else {}))
            for row, (_, seed) in enumerate(rows)
        ]
        return cls([prompt for prompt, _ in rows], params)

    @property
    def ids(self) -> list[str]:
        return [f"verify-{row}" for row in range(len(self.prompts))]

    def run(
        self, engine: RolloutEngine, policy: SpeculationPolicy, *, coupled: bool = True
    ) -> list[Completion]:
        """Completions in order of the requests, with draft lengths from `policy`."""
        with mode(engine, policy, coupled=coupled):
            return engine.generate(self.prompts, self.params, request_ids=self.ids)


@contextmanager
def mode(engine: RolloutEngine, policy: SpeculationPolicy, *, coupled: bool = True) -> Iterator[None]:
    """Decode with this policy and verifier for a while. The engine must be idle."""
    backend = engine.backend
    before = backend.policy, backend.coupled
    backend.policy, backend.coupled = policy, coupled
    try:
        yield
    finally:
        backend.policy, backend.coupled = before


def ways_to_speculate(draft_length: int, seed: int) -> dict[str, SpeculationPolicy]:
    """What must not change a trajectory: speculation on, toggled at random, and with random draft lengths."""
    return {
        "on": Fixed(draft_length),
        "toggled": RandomLengths(seed, longest=draft_length, off=0.5),
        "K random": RandomLengths(seed, longest=8, off=0.0),
    }


def total(completions: Sequence[Completion]) -> SpecCounts:
    """What speculation did for all of them."""
    return sum((completion.spec for completion in completions), SpecCounts())
