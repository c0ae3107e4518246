"""Parts that run whole rollouts with imposed acceptance: makespan of a long tail, and never slower than plain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from figures import Measured, Part, figure_name
from lab import PROMPT, Lab, long_tail
from passes import Passes, Rolled, Turns, buckets, roll
from predictions import LONGEST, TAIL_ALPHA, captured_lengths, costs_of, policies
from timings import Bench

from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.cost_model import CostModel, fit
from rollout_spec.policy.devices import NF4
from rollout_spec.policy.records import PassTiming, SpeculationPolicy

_CALIBRATION_ROUNDS = 3
_PAIRS = 3
_LEAST = 0.98  # speed over plain decoding below which the automatic policy counts as slower


@dataclass
class Rig:
    """A way to run rollouts of one policy, and what its passes cost as measured.

    Attributes:
        passes: Captured graphs, or None for the engine's own steps.
        costs: For the automatic policy.
        fitted: Whether `costs` were measured, or else why not.
    """

    lab: Lab
    passes: Passes | None
    costs: CostModel
    fitted: str

    def roll(self, policy: SpeculationPolicy, outputs: np.ndarray, alpha: float) -> Rolled:
        known = [PROMPT] * len(outputs)
        limits = [PROMPT + tokens for tokens in outputs.tolist()]
        return roll(self.lab, policy, known, limits, alpha, self.passes)


_RIGS: dict[tuple[str, str], Rig] = {}


def rig(bench: Bench, part: Part, size: str, via: str) -> Rig | None:
    """What rollouts of this size need: graphs captured, passes calibrated. Kept while the drafter stays.

    None if the time was over before it was calibrated.
    """
    lab, before = bench.lab(size), bench.lab(size).backend.weights.drafter
    drafter = lab.use(bench.kind(size))
    if drafter is not before or (size, via) not in _RIGS:
        for stale in [key for key in _RIGS if key[0] == size and drafter is not before]:
            del _RIGS[stale]
        built = _build(bench, part, lab, via)
        if built is None:
            return None
        _RIGS[size, via] = built
    return _RIGS[size, via]


def _build(bench: Bench, part: Part, lab: Lab, via: str) -> Rig | None:
    scale, drafter = bench.scale, lab.use(bench.kind(lab.size))
    context = PROMPT + max(scale.longest_output, scale.lone_outputs)
    most, Ks = max(scale.samples, *scale.batches), captured_lengths(scale)
    batches = [*(B for B in (1, 4, 16, 64) if most > B), most]
    passes = Passes.of(lab, buckets(batches, Ks), context) if via == "graphs" else None
    timings: list[PassTiming] = []
    room = (_CALIBRATION_ROUNDS + 1) * sum(k + 1 for k in (0, *Ks)) + 1
    for B, length in part.each(list(product(batches, (PROMPT, max(PROMPT + 1, context - room))))):
        turns = Turns([0, *Ks], _CALIBRATION_ROUNDS)
        roll(lab, turns, [length] * B, [length + room] * B, TAIL_ALPHA, passes)
        timings += turns.timings
    if part.spent:
        part.note(f"{lab.size}, {via}: out of time before its passes were calibrated")
        return None
    try:
        return Rig(lab, passes, fit(timings), f"{len(timings)} measured passes")
    except ImportError as error:
        part.note(f"{lab.size}, {via}: costs are those of the datasheet, not fitted: {error}")
        costs = costs_of(bench.datasheet, lab.shape, drafter.name)
        renamed = {drafter.name if kind == NF4 else kind: cost for kind, cost in costs.passes.items()}
        return Rig(lab, passes, CostModel(renamed), f"datasheet: {error}")


def makespan(bench: Bench, part: Part) -> None:
    """A long tail under three policies: plain decoding, a fixed K, and the automatic policy."""
    outputs = long_tail(bench.scale, bench.seed)
    for via, size in part.each(list(product(("graphs", "engine"), reversed(bench.sizes)))):
        with part.attempt(f"{size}, {via}"):
            found = rig(bench, part, size, via)
            if found is None:
                continue
            rolled: dict[str, list[Rolled]] = {name: [] for name in policies(found.costs, 1)}
            for turn in range(_PAIRS):
                if turn and part.spent:
                    part.note(f"{size}, {via}: out of time after {turn} rounds")
                    break
                fresh = policies(found.costs, max(bench.scale.draft_lengths))
                for name in fresh if turn % 2 == 0 else reversed(fresh):
                    rolled[name].append(found.roll(fresh[name], outputs, TAIL_ALPHA))
            off = [one.seconds for one in rolled["off"]]
            for name, runs in rolled.items():
                part.figure(
                    figure_name("makespan", size, via=via, policy=name), Measured.of([run.seconds for run in runs]), "s",
                    over_off=Measured.of([a / run.seconds for a, run in zip(off, runs, strict=True)]).value,
                    passes=runs[-1].passes, accepted_share=runs[-1].accepted / max(1, runs[-1].drafted),
                    acceptance=f"{TAIL_ALPHA} imposed by overwriting the verdict: timing only",
                    tokens=int(outputs.sum()), costs=found.fitted,
                    draft_lengths=None if found.passes is None else sorted(found.passes.draft_lengths),
                )  # fmt: skip


def never_slower(bench: Bench, part: Part) -> None:
    """The automatic policy against plain decoding at every B, with a good drafter and with a useless one."""
    scale = bench.scale
    for via, size in part.each(list(product(("graphs", "engine"), reversed(bench.sizes)))):
        with part.attempt(f"{size}, {via}"):
            found = rig(bench, part, size, via)
            if found is None:
                continue
            for B, alpha in part.each(list(product(scale.batches, (TAIL_ALPHA, 0.0)))):
                with part.attempt(f"{size}, {via}, B={B}, acceptance {alpha}"):
                    name = figure_name("never_slower", size, via=via, B=B, alpha=alpha)
                    ratio = _against_plain(part, found, name, np.full(B, scale.lone_outputs), alpha)
                    if bench.device.type == "cuda":
                        part.check(name, ratio, f">= {_LEAST}", ratio >= _LEAST)


def _against_plain(part: Part, rig: Rig, name: str, outputs: np.ndarray, alpha: float) -> float:
    """Speed of the automatic policy over plain decoding."""
    automatic = AutomaticPolicy(rig.costs, longest=LONGEST, ragged=False)  # it keeps what it learns
    first = rig.roll(automatic, outputs, alpha)
    ratios, drafted = [], 0
    for turn in range(_PAIRS):
        sides = (Off(), automatic) if turn % 2 == 0 else (automatic, Off())
        seconds = {}
        for policy in sides:
            rolled = rig.roll(policy, outputs, alpha)
            seconds[policy is automatic] = rolled.seconds
            drafted += rolled.drafted
        ratios.append(seconds[False] / seconds[True])
    ratio = Measured.of(ratios)
    part.figure(
        name, ratio, "T_plain / T_automatic", first_seconds=first.seconds, drafted=drafted,
        acceptance=f"{alpha} imposed by overwriting the verdict: timing only", costs=rig.fitted,
    )  # fmt: skip
    return ratio.value
