"""The proof: every claim of exactness tried on one engine, and the level that was shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.engine import RolloutEngine
from rollout_spec.observe.report import Check, ExactnessLevel
from rollout_spec.policy.baselines import Fixed, RandomLengths
from rollout_spec.policy.records import SpeculationPolicy
from rollout_spec.proofs.distribution import (
    DRAFT_LENGTH,
    TOKENS,
    Distribution,
    contexts,
    distorted,
    distribution,
)
from rollout_spec.proofs.reforward import Parity, parity
from rollout_spec.proofs.runs import CUTS, OFF, Requests, total, ways_to_speculate
from rollout_spec.proofs.trajectories import Comparison, compare
from rollout_spec.proofs.versions import update_in_flight, wrongly_versioned

LEAST_PVALUE = 1e-4
LEAST_FREEDOM = 10  # degrees of freedom below which a test of the distribution has no power
NEAR_TIE = 4.0  # a near-tie: a margin of at most this many times the largest logprob difference seen
FP32_ERROR = 1e-5
LOW_PRECISION_ERROR = 0.5, 0.02  # worst and mean, where a device is not row-invariant


@dataclass(frozen=True)
class Settings:
    """How much to compare.

    Attributes:
        prompts: Token ids each.
        seeds: Samples per prompt, each with a seed of its own.
        max_tokens: Longest completion.
        samples: Short completions per test of the distribution.
        draft_length: `K` of the runs with speculation.
        seed: Of what is random about the proof itself.
    """

    prompts: Sequence[list[int]]
    seeds: int = 4
    max_tokens: int = 128
    samples: int = 2000
    draft_length: int = 4
    seed: int = 0


@dataclass
class Verdict:
    """What was found. `level` is the highest that was shown; None if not even E0."""

    checks: list[Check] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    level: ExactnessLevel | None = None

    def check(self, name: str, value: str, target: str, passed: bool) -> bool:
        self.checks.append(Check(name, value, target, bool(passed)))
        return bool(passed)


class Proof:
    """All checks on one idle engine; it may end at a later policy version than it began.

    Requests carry cuts (top-p) only where the device is row-invariant: a cut is a step, which a difference in
    the last bits can cross without any near-tie.

    Args:
        engine: The engine; its drafter must not be `none`.
        settings: How much to compare.
        weights: Reads the policy's weights once more.
        progress: Told what is being done.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        settings: Settings,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.engine, self.settings, self._weights, self._progress = engine, settings, weights, progress
        self.invariant = engine.backend.row_invariant
        self.requests = Requests.build(settings.prompts, settings.seeds, settings.max_tokens, self.invariant)
        self.verdict = Verdict()
        self._near_tie = 0.0

    def run(self) -> Verdict:
        """Try everything; a check that fails does not end the proof."""
        self._progress("decoding plainly")
        version = self.engine.backend.weights.version
        plain = self.requests.run(self.engine, OFF)
        speculated = {}
        for name, policy in ways_to_speculate(self.settings.draft_length, self.settings.seed).items():
            self._progress(f"speculating: {name}")
            speculated[name] = self.requests.run(self.engine, policy)
        fixed = Fixed(self.settings.draft_length)
        self._progress("speculating: rejection verifier")
        rejected = self.requests.run(self.engine, fixed, coupled=False)

        used = self._drafter_is_used({**speculated, "rejection": rejected})
        exact = self._logprobs(speculated["on"], rejected)
        same = self._greedy(fixed)
        for name, completions in speculated.items():
            same &= self._compared(f"trajectory, {name}", plain, completions, self.requests.params)
        lossless = self._distribution(plain)
        self._versions([*plain, *(c for run in speculated.values() for c in run)], version)
        self._update(plain)
        self._level(used and lossless, same and exact)
        return self.verdict

    def _drafter_is_used(self, runs: dict[str, list[Completion]]) -> bool:
        engine, shown = self.engine, {}
        used = engine.stats().drafter is not None
        for name, completions in runs.items():
            spec = total(completions)
            used &= spec.drafted > 0 and spec.accepted > 0 and spec.verify_steps > 0
            shown[name] = asdict(spec) | {"acceptance": spec.accepted / max(spec.drafted, 1)}
        reports = [report.message for report in engine.stats().reports]
        self.verdict.results["speculation"] = {"runs": shown, "drafter_reports": reports}
        on = total(runs["on"])
        drafter = engine.backend.weights.drafter
        name = "none" if drafter is None else drafter.name
        found = f"{name}: {on.accepted:,} of {on.drafted:,} accepted"
        return self.verdict.check("drafter in use", found, "accepted in every run", used and not reports)

    def _logprobs(self, coupled: list[Completion], rejected: list[Completion]) -> bool:
        """Logprobs of both verifiers, and the coupled tokens, against plain passes."""
        passed = True
        for name, completions in (("coupled", coupled), ("rejection", rejected)):
            self._progress(f"recomputing: {name}")
            found = parity(self.engine, completions, self.requests.params, replay=name == "coupled")
            self._near_tie = max(self._near_tie, NEAR_TIE * found.worst)
            self.verdict.results[f"logprobs, {name}"] = _finite(asdict(found))
            good, target = self._parity_target(found)
            value = f"{found.tokens:,} tokens, off by {found.worst:.2g}"
            passed &= self.verdict.check(f"logprobs, {name}", value, target, good)
            if name == "coupled":
                passed &= self._replayed(found)
        return passed

    def _parity_target(self, found: Parity) -> tuple[bool, str]:
        worst, mean = LOW_PRECISION_ERROR
        if self.invariant:
            return found.worst == 0 and found.processed <= FP32_ERROR, "plain pass, bitwise"
        if self.engine.backend.dtype == torch.float32:
            good = max(found.worst, found.processed) <= FP32_ERROR
            return good, f"plain pass, <= {FP32_ERROR:.0e}"
        good = max(found.worst, found.processed) <= worst and found.mean <= mean
        return good, f"plain pass, <= {worst:g}, mean {mean:g}"

    def _replayed(self, found: Parity) -> bool:
        value = f"{found.replayed:,} tokens, {len(found.margins)} differ{_margins(found.margins)}"
        return self.verdict.check(
            "noise, recomputed", value, self._same("the winner of the race"), self._ties(found.margins)
        )

    def _greedy(self, policy: Fixed) -> bool:
        self._progress("greedy")
        params = SamplingParams(temperature=0, max_tokens=self.settings.max_tokens)
        greedy = Requests(list(self.settings.prompts), [params] * len(self.settings.prompts))
        return self._compared(
            "greedy", greedy.run(self.engine, OFF), greedy.run(self.engine, policy), greedy.params
        )

    def _compared(
        self, name: str, plain: list[Completion], other: list[Completion], params: Sequence[SamplingParams]
    ) -> bool:
        found: Comparison = compare(self.engine, plain, other, params)
        self.verdict.results[name] = _finite(asdict(found)) | {
            "diverging": found.diverging,
            "divergences_per_token": found.diverging / max(found.tokens, 1),
            "near_tie": self._near_tie,
        }
        value = (
            f"{found.tokens:,} tokens, {found.diverging} of {found.sequences} part{_margins(found.margins)}"
        )
        return self.verdict.check(name, value, self._same("= speculation off"), self._ties(found.margins))

    def _same(self, what: str) -> str:
        return what if self.invariant else f"{what} or tie <= {self._near_tie:.1g}"

    def _ties(self, margins: tuple[float, ...]) -> bool:
        """Whether the device's numerics explain every difference."""
        return not margins if self.invariant else all(margin <= self._near_tie for margin in margins)

    def _distribution(self, plain: list[Completion]) -> bool:
        best = contexts(self.engine, plain[: len(self.settings.prompts)], 2)
        cuts: dict[str, Any] = CUTS if self.invariant else {"temperature": CUTS["temperature"]}
        fixed, any_length = Fixed(DRAFT_LENGTH), RandomLengths(0, longest=DRAFT_LENGTH, off=0.0)
        ways: tuple[
            tuple[
                list[int], dict[str, Any], Callable[[], AbstractContextManager[None]], SpeculationPolicy, str
            ],
            ...,
        ] = (
            (best[0], {}, nullcontext, fixed, "own drafter"),
            (best[0], {}, partial(distorted, self.engine), fixed, "distorted drafter"),
            (best[-1], cuts, partial(distorted, self.engine), any_length, "distorted drafter, cuts"),
        )
        passed = True
        for name in ("coupled", "rejection"):
            found = Distribution()
            for context, options, drafter, policy, how in ways:
                self._progress(f"distribution: {name}, {how}")
                params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **options)
                with drafter():
                    found += distribution(
                        self.engine,
                        context,
                        params,
                        self.settings.samples,
                        coupled=name == "coupled",
                        policy=policy,
                    )
            self.verdict.results[f"chi-square, {name}"] = asdict(found) | {"pvalue": found.pvalue}
            value = f"p = {found.pvalue:.2g}, {found.freedom} degrees"
            passed &= self.verdict.check(
                f"chi-square, {name}",
                value,
                f"> {LEAST_PVALUE:g}, {LEAST_FREEDOM} degrees",
                found.pvalue > LEAST_PVALUE and found.freedom >= LEAST_FREEDOM,
            )
        return passed

    def _versions(self, completions: list[Completion], version: int) -> None:
        wrong = wrongly_versioned(completions, version)
        tokens = sum(len(completion.token_ids) for completion in completions)
        value = f"{tokens:,} tokens, {wrong} samples wrong"
        self.verdict.check("versions", value, f"all under version {version}", wrong == 0)

    def _update(self, plain: list[Completion]) -> None:
        """The same weights as a new version, while sequences are in flight."""
        self._progress("updating weights in flight")
        weights = self.engine.backend.weights
        old = weights.version
        found = update_in_flight(
            self.engine, self.requests, plain, self._weights(), self.settings.draft_length
        )
        drafter = -1 if weights.drafter is None else weights.drafter.version
        versions = f"policy {weights.version}, drafter {drafter}"
        followed = found.version == weights.version == drafter == old + 1
        self.verdict.check("weight update", versions, f"both at {old + 1}", followed)
        self.verdict.results["update in flight"] = asdict(found)
        value = f"{found.split} sequences of both"
        faults = {"spans": found.wrong_spans}
        if self.invariant:
            faults |= {"old tokens": found.wrong_before, "new tokens": found.wrong_after}
        value += "".join(f", {count} with wrong {what}" for what, count in faults.items() if count)
        passed = found.split > 0 and not any(faults.values())
        self.verdict.check("update in flight", value, "each its own version", passed)

    def _level(self, lossless: bool, same: bool) -> None:
        """The level shown, and that the engine does not claim a higher one."""
        verdict, engine = self.verdict, self.engine
        if lossless:
            verdict.level = ExactnessLevel.E0
            if same:
                verdict.level = ExactnessLevel.E2 if self.invariant else ExactnessLevel.E1
        claimed = engine.stats().exactness
        shown = "nothing" if verdict.level is None else verdict.level.value
        passed = verdict.level is not None and claimed <= shown
        verdict.check("exactness claimed", claimed, f"what was shown: {shown}", passed)


def _margins(margins: tuple[float, ...]) -> str:
    return f", margin {max(margins):.1g}" if margins else ""


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: margins and errors that are become None."""

    def clean(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value

    return {name: clean(value) for name, value in values.items()}
