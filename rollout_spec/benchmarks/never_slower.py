"""The measurements behind `rollout-spec bench never-slower`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.benchmarks.calibrated import calibrated
from rollout_spec.benchmarks.degrade import perturb
from rollout_spec.benchmarks.turns import Work, in_turns
from rollout_spec.contracts import SamplingParams
from rollout_spec.drafters.history import History
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems
from rollout_spec.models.checkpoint import read_checkpoint
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import Matches, StepOutcome, StepState

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = 64  # of every answer: all end together, which is where tokens ahead of the others are worth least
_PROMPT = 20  # characters: answers to such prompts are longer than that, so that all text is the policy's own
_CLOSE = 0.01  # triples are added until the bound is as close to the median,
_MOST = 3  # up to so many times `pairs`
_USELESS = 4.0  # relative noise on the drafter's weights that leaves nothing of it


class NeverSlower:
    """Automatic mode against plain decoding in engines of one kind, so at equal memory, at every batch size.

    Three engines take turns at the same prompts: one decides, two decode plainly. It is compared with their mean, and
    their ratio says what the machine's noise is. Engines change places from triple to triple, and so does who
    begins. Every triple has prompts of its own, so that history finds nothing but the answer at hand.

    Attributes:
        drafter: Kind of the self-drafter.
        ratios: By situation and batch: median and interval of plain time / automatic time, the same of the first
            plain time / the second, the number of triples, and the ratio of the triple before them. In that one a size of
            batch is met for the first time and much is learnt; it counts in none of the others.
    """

    def __init__(
        self, path: Path, pairs: int, seed: int, console: Console, batches: Sequence[int] = BATCHES
    ) -> None:
        self.path, self.pairs, self.seed, self.console, self.batches = path, pairs, seed, console, batches
        self.ratios: dict[str, dict[str, Any]] = {}
        self.engines = [
            RolloutEngine.from_pretrained(
                path,
                seed=seed,
                max_model_len=512,
                max_num_seqs=max(batches),
                kv_cache_tokens=max(batches) * 192,
                speculation={
                    "drafter": usual_quantizer("cpu", torch.bfloat16),
                    "draft_length": 4,
                    "canary": False,
                    "canary_min_acceptance": 0.0,
                },
            )
            for _ in range(3)
        ]
        self.drafter = self.engines[0].stats().drafter
        self.calibration = calibrated(self.engines[0], console)
        self._history = History()
        self._prompts = _long_prompts(seed)
        self._first = cycle(range(len(self.engines)))

    def useful(self) -> None:
        """With the drafter as it is, learning on from run to run, as in use."""
        self._sweep("useful drafter")

    def useless(self) -> None:
        """With a drafter that is never right; the policy starts out expecting it to be useful, and learns in the first triple."""
        for engine in self.engines:
            perturb(engine, _USELESS, self.seed)
        self._sweep("useless drafter")
        for engine in self.engines:
            perturb(engine, 0.0)

    def updated(self) -> None:
        """Right after a weight update: each run is the first under its version (the update itself is not timed)."""
        self._sweep("right after an update", updates=True)

    def _sweep(self, situation: str, updates: bool = False) -> None:
        automatic = AutomaticPolicy(self.calibration.cost_model, seed=self.seed)
        for batch in self.batches:
            with self.console.status(f"{situation}, B={batch}"):
                triples = [self._triple(automatic, batch, updates)]
                while not _enough(_speedups(triples[1:]), self.pairs):
                    self.engines.append(self.engines.pop(0))
                    triples.append(self._triple(automatic, batch, updates))
            first, _, second = np.array(triples).T
            name = f"{situation}, B={batch}"
            before, *ratios = _speedups(triples)
            row = _ratios(ratios)
            self.ratios[name] = row | {
                "before": round(before, 4),
                "plain_over_plain": _ratios((first / second)[1:].tolist()),
                "triples": len(triples) - 1,
                "tokens": _TOKENS,
                "plain_seconds": round(float(np.median(first[1:])), 4),
            }
            self.console.print(
                f"{name}: {row['median_ratio']:.3f} ({row['lower_95']:.3f}-{row['upper_95']:.3f})",
                highlight=False,
            )

    def _triple(self, automatic: AutomaticPolicy, batch: int, updates: bool) -> tuple[float, float, float]:
        """Seconds of plain decoding, of automatic mode and of plain decoding, on the next prompts."""
        prompts = list(islice(self._prompts, batch))
        params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
        works = []
        for engine, policy in zip(self.engines, (Off(), automatic, Off()), strict=True):
            engine.backend.policy = policy  # the one that hears of the update
            engine.backend.history = self._history if policy is automatic else None
            if updates:
                engine.update_weights(read_checkpoint(self.path))
            works.append(Work(engine, policy, partial(engine.generate, prompts, params)))
        first = next(self._first)  # whoever begins has its first pass a little sooner
        took = [seconds for seconds, _ in in_turns(works[first:] + works[:first])]
        plain, speculated, again = took[len(took) - first :] + took[: len(took) - first]
        return plain, speculated, again


def _long_prompts(seed: int) -> Iterator[str]:
    """Prompts of at least `_PROMPT` characters, all different."""
    seen: set[str] = set()
    for part in count(seed << 16):
        for prompt in load_problems().prompts(4096, part, "test"):
            if len(prompt) >= _PROMPT and prompt not in seen:
                seen.add(prompt)
                yield prompt


def _speedups(triples: Sequence[tuple[float, float, float]]) -> list[float]:
    """Of each triple, mean plain time over automatic time."""
    return [(first + second) / 2 / speculated for first, speculated, second in triples]


def _ratios(values: Sequence[float]) -> dict[str, float]:
    """Median and interval; `lower_95` is the one-sided bound."""
    low, high = median_interval(values, level=0.90)
    median = float(np.median(values))
    return {"median_ratio": round(median, 4), "lower_95": round(low, 4), "upper_95": round(high, 4)}


def _enough(speedups: Sequence[float], pairs: int) -> bool:
    """Whether the bound is within `_CLOSE`, or half of what is gained, of the median, wherever that is; or too many."""
    if len(speedups) < pairs:
        return False
    median, low = float(np.median(speedups)), median_interval(speedups, level=0.90)[0]
    return len(speedups) >= _MOST * pairs or median - low <= max(_CLOSE, (median - 1) / 2)


def decision_microseconds(changing: bool = False) -> dict[str, float]:
    """Mean time of one decision of the automatic policy, with a drafter and history on offer, by batch size.

    The slowest hundredth, in which the machine did something else, is left out. Most passes go on as the policy decided
    when it last looked. With `changing` all sequences are new in every pass, so that it looks each time.
    """
    costs = CostModel(
        {"target": PassCost(1e-3, 2e-4, 18e-3, 7e-4, 5e-8), "nf4": PassCost(1e-3, 2e-4, 6e-3, 6e-4, 5e-8)}
    )
    rng, found = np.random.default_rng(0), {}
    for batch in BATCHES:
        policy = AutomaticPolicy(costs)
        policy.lengths.observe(rng.integers(5, 400, 300))
        seconds = []
        for step in range(400):
            matches = Matches(rng.integers(0, 12, batch), rng.random(batch))
            slots, outputs = np.arange(batch), np.arange(batch) + step
            state = StepState(
                slots, 50 + outputs, outputs, np.full(batch, 500), ("nf4",), matches, stoppable=True
            )
            start = time.perf_counter()
            plan = policy.plan(state)
            seconds.append(time.perf_counter() - start)
            accepted = np.minimum(plan.draft_lengths, rng.integers(0, 6, batch))
            done = np.zeros(batch, bool)
            policy.observe(state, plan, StepOutcome(accepted, accepted + 1, done, 0.01, 0.03))
            if changing:
                policy.forget(slots)
        found[f"B={batch}"] = round(1e6 * float(np.mean(sorted(seconds)[:-4])), 1)
    return found
