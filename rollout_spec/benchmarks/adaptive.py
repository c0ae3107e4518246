"""What a trained drafter is worth at a realistic size: against the quantized self-drafter, and both under the policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rollout_spec.adaptive.checkpoint import Checkpoint
from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.benchmarks.calibrated import calibrated
from rollout_spec.benchmarks.longtail import stratified
from rollout_spec.contracts import Completion, RolloutSpecError, SamplingParams, SpecCounts
from rollout_spec.drafters.eagle import NAME
from rollout_spec.engine import RolloutEngine
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Delegate, Fixed, Off
from rollout_spec.policy.records import Plan, SpeculationPolicy, StepOutcome, StepState

_FEW, _LONGEST = 96, 192  # tokens of an answer: at a fixed draft length, and in a rollout
LENGTHS = {1: (3, 5, 7, 10), 4: (1, 2, 3)}  # draft lengths to choose from, by batch size
_CHOOSING = 2  # rollouts to choose one by


class Only(Delegate):
    """A policy that is shown no drafter with weights but `drafter`."""

    def __init__(self, inner: SpeculationPolicy, drafter: str) -> None:
        super().__init__(inner)
        self.drafter = drafter

    def plan(self, state: StepState) -> Plan:
        return super().plan(self._seen(state))

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        super().observe(self._seen(state), plan, outcome)

    def _seen(self, state: StepState) -> StepState:
        drafters = tuple(name for name in state.drafters if name == self.drafter)
        return replace(state, drafters=drafters)


class AdaptiveBenchmark:
    """One engine with both drafters; every way of using them decodes the same tokens (coupled verifier), in turns.

    Args:
        policy: Folder of the policy.
        drafter: A trained drafter for it.
        self_drafter: Kind of the quantized copy.
        quantizer: What the trained drafter's linears and head are quantized with.
        seed: Of prompts and noise.
        console: For progress.
        dtype: Of the engine.
    """

    def __init__(
        self,
        policy: Path,
        drafter: Checkpoint,
        self_drafter: str,
        quantizer: str,
        seed: int,
        console: Console,
        dtype: str = "auto",
    ) -> None:
        self.seed, self.console = seed, console
        self.engine = RolloutEngine.from_pretrained(
            policy,
            dtype=dtype,
            seed=seed,
            max_model_len=640,
            max_num_seqs=32,
            speculation={
                "drafter": self_drafter,
                "draft_length": 5,
                "verifier": "coupled",
                "canary_min_acceptance": 0.0,
                "adaptive": True,
                "adaptive_quantizer": quantizer,
                "shadow": False,
            },
        )
        chosen = self.engine.backend.weights.drafter
        if chosen is None:
            raise RolloutSpecError(f"self_drafter={self_drafter!r}: no kind pays on this machine; name one")
        self.self_drafter = chosen.name
        self.costs = calibrated(self.engine, console).cost_model
        self.engine.backend.policy = AutomaticPolicy(self.costs, seed=seed)
        self.engine.publish_drafter(drafter.weights.items(), spec=drafter.spec)
        adaptive = self.engine.backend.adaptive
        assert adaptive is not None
        self._adaptive_cost = adaptive.costs().passes[NAME]
        self.results: dict[str, dict[str, Any]] = {}

    def fixed(self, batch: int, pairs: int) -> dict[str, Any]:
        """A few long answers at a time, each drafter at the fixed draft length that is best for it.

        Answers end, and fewer are left: a gain from B=4 on is largely that of the last ones.

        Args:
            batch: A key of `LENGTHS`. The lengths are chosen on other prompts.
            pairs: How often.
        """
        prompts = stratified(4, batch * (pairs + _CHOOSING), self.seed)[3::4]  # the longest quarter
        rollouts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        choosing, counted = rollouts[:_CHOOSING], rollouts[_CHOOSING:]
        chosen = {name: self._best_length(name, choosing) for name in (self.self_drafter, NAME)}
        policies: dict[str, SpeculationPolicy] = {"plain": Off()} | {
            name: Fixed(length, drafter=name) for name, length in chosen.items()
        }
        seconds, spec = self._interleaved(f"fixed-{batch}", policies, counted, longest=_FEW)
        found = self._ratios(seconds, spec, "plain")
        return {
            "draft_lengths": chosen,
            "speedup": found,
            "adaptive_over_self_drafter": self._ratio(seconds[self.self_drafter], seconds[NAME]),
        }

    def longtail(self, batch: int, draws: int) -> dict[str, Any]:
        """Makespans of rollouts, automatic mode with one drafter and with both; two more draws come first, uncounted."""
        prompts = stratified(batch, draws + 2, self.seed + 1)
        rollouts = [prompts[i * batch : (i + 1) * batch] for i in range(draws + 2)]
        policies: dict[str, SpeculationPolicy] = {
            "self-drafter alone": Only(self._automatic(), self.self_drafter),
            "adaptive alone": Only(self._automatic(), NAME),
            "both": self._automatic(),
        }
        seconds, spec = self._interleaved(f"longtail-{batch}", policies, rollouts, uncounted=2)
        totals = {name: sum(times) for name, times in seconds.items()}
        better = min(("self-drafter alone", "adaptive alone"), key=totals.__getitem__)
        return {
            "over_self_drafter_alone": self._ratios(seconds, spec, "self-drafter alone"),
            "tau_self_drafter_alone": round(spec["self-drafter alone"].tau, 3),
            "better_alone": better,
            "both_over_better_alone": self._ratio(seconds[better], seconds["both"]),
        }

    # --- inside ----------------------------------------------------------------------------------------

    def _automatic(self) -> AutomaticPolicy:
        policy = AutomaticPolicy(self.costs, seed=self.seed)
        policy.add_drafter(NAME, self._adaptive_cost)
        return policy

    def _best_length(self, drafter: str, rollouts: Sequence[Sequence[str]]) -> int:
        def total(length: int) -> float:
            policies: dict[str, SpeculationPolicy] = {"": Fixed(length, drafter=drafter)}
            return sum(self._interleaved("choose", policies, rollouts, longest=_FEW)[0][""])

        return min(LENGTHS[len(rollouts[0])], key=total)

    def _interleaved(
        self,
        name: str,
        policies: Mapping[str, SpeculationPolicy],
        rollouts: Sequence[Sequence[str]],
        uncounted: int = 0,
        longest: int = _LONGEST,
    ) -> tuple[dict[str, list[float]], dict[str, SpecCounts]]:
        orders = list(permutations(policies))  # the end of one rollout can delay the next
        seconds: dict[str, list[float]] = {policy: [] for policy in policies}
        spec = {policy: SpecCounts() for policy in policies}
        for draw, prompts in enumerate(rollouts):
            ids = [f"{name}-{draw}-{row}" for row in range(len(prompts))]
            tokens: list[list[int]] | None = None
            for policy in orders[draw % len(orders)]:
                with self.console.status(f"{name}, {draw + 1} of {len(rollouts)}: {policy}"):
                    took, completions = self._rollout(policies[policy], prompts, ids, longest)
                found = [c.token_ids for c in completions]
                assert tokens is None or tokens == found, "speculation changed a token"
                tokens = found
                if draw >= uncounted:
                    seconds[policy].append(took)
                    spec[policy] = sum((c.spec for c in completions), spec[policy])
        return seconds, spec

    def _rollout(
        self, policy: SpeculationPolicy, prompts: Sequence[str], ids: list[str], longest: int
    ) -> tuple[float, list[Completion]]:
        self.engine.backend.policy, self.engine.backend.history = policy, None
        start = time.perf_counter()
        completions = self.engine.generate(list(prompts), SamplingParams(max_tokens=longest), request_ids=ids)
        return time.perf_counter() - start, completions

    def _ratios(
        self, seconds: dict[str, list[float]], spec: dict[str, SpecCounts], baseline: str
    ) -> dict[str, Any]:
        return {
            name: self._ratio(seconds[baseline], times)
            | {"tau": round(spec[name].tau, 3) if spec[name].verify_steps else None,
               "median_seconds": round(float(np.median(times)), 3)}
            for name, times in seconds.items()
            if name != baseline
        }  # fmt: skip

    def _ratio(self, baseline: list[float], candidate: list[float]) -> dict[str, Any]:
        ratios = (np.array(baseline) / np.array(candidate)).tolist()
        low, high = median_interval(ratios)
        return {
            "median": round(float(np.median(ratios)), 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "of_total_time": round(sum(baseline) / sum(candidate), 4),
            "pairs": len(ratios),
        }
