"""What a rollout took and what speculation really saved of it, by randomized probes instead of predictions.

A policy decodes a small random share of the passes that it wanted to speculate plainly (`Reason.PROBE`). Since
chance alone chose them, their time is what plain decoding would have taken at such passes, however wrong the
policy's own predictions are and however the machine's speed drifts. With strata s of like batch,

    saved = sum over s of  W_s * r_s - A_s        r_s = mean over the probes of s of  seconds / f
                                                  W_s = sum over the speculated passes of s of  emitted / batch * f

emitted / batch is how many plain passes a pass stands for (its tokens count as if spread evenly over its batch),
f is the shape of a plain pass's time in batch and context, so that unlike passes of a stratum compare, and A_s is
the time taken. W and A are facts of this rollout; only r is an estimate, hence var = sum of W_s² var_s / n_s, and a
t interval with Satterthwaite's degrees of freedom (Cochran, Sampling Techniques, 1977, section 5.4). It is too
narrow where rare, very slow passes matter that few probes have met.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rollout_spec.policy.records import HISTORY, PLAIN, Reason, Trace, TraceStep

LEAST_PROBES = 2  # in a stratum, for a mean with a variance
PROBES_PER_TERM = 5  # for fitting how a pass's time goes with batch and context
ONE_OFF = (
    Reason.PROBE,
    Reason.REFERENCE,
    Reason.EXPLORE,
)  # passes that are tried once: no switch of the policy
# Student's t, 97.5 %, by degrees of freedom; linear in 1 / df between them.
T_DF = np.array([1, 2, 3, 4, 5, 6, 8, 10, 15, 30, 60, np.inf])
T_975 = np.array([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.306, 2.228, 2.131, 2.042, 2.000, 1.960])


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TimeSaved:
    """Time saved by the speculated passes of a rollout, against plain decoding of the same tokens.

    Attributes:
        seconds_saved: Below 0 if speculation lost time; None if it cannot be stated.
        speedup: Time of plain decoding over the time taken, of the covered passes; None likewise.
        probes: Randomized plain passes, those used and those not.
        speculated: Speculated passes, covered or not.
        covered: Share of the speculated passes' time for which there are probes like it, in [0, 1]. The rest is
            left out of both figures.
        why_not: Why nothing can be stated, else empty.
    """

    seconds_saved: Estimate | None
    speedup: Estimate | None
    probes: int
    speculated: int
    covered: float
    why_not: str = ""

    @property
    def text(self) -> str:
        """One sentence for a reader."""
        saved, speedup = self.seconds_saved, self.speedup
        if saved is None or speedup is None:
            return f"The time saved cannot be stated: {self.why_not}."
        if saved.low > 0:
            verdict = f"Speculation saved {seconds_text(saved.value)} s ({seconds_text(saved.low)} to {seconds_text(saved.high)} s)"
        elif saved.high < 0:
            verdict = f"Speculation lost {seconds_text(-saved.value)} s ({seconds_text(-saved.high)} to {seconds_text(-saved.low)} s)"
        else:
            verdict = f"Speculation neither saved nor lost time for sure ({seconds_text(saved.low)} to {seconds_text(saved.high)} s saved)"
        left_out = f"; {1 - self.covered:.1%} of their time has no probes like it and is left out"
        return (
            f"{verdict}: its passes were {speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f}) as fast as "
            f"plain decoding, by {self.probes:,} randomized plain passes against {self.speculated:,} speculated ones "
            f"(95 % intervals{left_out if self.covered < 0.9995 else ''})."
        )


def time_saved(steps: Sequence[TraceStep]) -> TimeSaved:
    """Time really saved by speculation, from the probes among `steps`; `gain` is not looked at."""
    batch = np.array([step.batch for step in steps], np.float64)
    context = np.array([step.kv_tokens for step in steps], np.float64) / batch
    seconds = np.array([step.draft_seconds + step.target_seconds for step in steps], np.float64)
    passes = np.array([step.emitted for step in steps], np.float64) / batch
    speculated = np.array([step.mode != PLAIN for step in steps], bool)
    probed = np.array([step.reason == Reason.PROBE for step in steps], bool) & ~speculated & (passes > 0)
    counts = int(probed.sum()), int(speculated.sum())
    if not speculated.any():
        return TimeSaved(None, None, *counts, 0.0, "no pass speculated")

    shape = _shape(batch, batch * context, seconds, probed)
    stratum = _strata(batch, speculated | probed, probed)
    plain = taken = variance = spread = 0.0
    for which in np.unique(stratum[stratum >= 0]):
        here = stratum == which
        ratios = seconds[here & probed] / (passes * shape)[here & probed]
        work = (passes * shape)[here & speculated].sum()
        plain += work * ratios.mean()
        taken += seconds[here & speculated].sum()
        part = work**2 * ratios.var(ddof=1) / len(ratios)
        variance += part
        spread += part**2 / (len(ratios) - 1)
    if taken == 0:
        few = (
            f"{counts[0]} randomized plain passes among {counts[1]:,} speculated ones, too few of like batch"
        )
        return TimeSaved(None, None, *counts, 0.0, f"{few}; record longer or raise the share of probes")
    half = _t_975(variance**2 / spread if spread else np.inf) * variance**0.5
    saved = Estimate(*(float(plain - taken + sign * half) for sign in (0, -1, 1)))
    speedup = Estimate(*(float((plain + sign * half) / taken) for sign in (0, -1, 1)))
    left_out = seconds[speculated & (stratum < 0)].sum() / seconds[speculated].sum()
    return TimeSaved(saved, speedup, *counts, float(1 - left_out))


def seconds_text(seconds: float) -> str:
    """Three digits, never an exponent for a long time."""
    return f"{seconds:,.0f}" if abs(seconds) >= 100 else f"{seconds:.3g}"


def _t_975(freedom: float) -> float:
    return float(np.interp(-1 / max(freedom, 1.0), -1 / T_DF, T_975))


def _shape(batch: np.ndarray, kv_tokens: np.ndarray, seconds: np.ndarray, probed: np.ndarray) -> np.ndarray:
    """How a plain pass's time goes with batch and context, a + b batch + c kv_tokens fitted to the probes; 1 without
    enough of them. Its level does not matter: every stratum has its own."""
    terms = np.stack([np.ones_like(batch), batch, kv_tokens], 1)
    if probed.sum() < PROBES_PER_TERM * terms.shape[1]:
        return terms[:, 0]
    kept = [0, 1, 2]
    while True:
        weighted = terms[probed][:, kept] / seconds[probed, None]
        factors = np.linalg.lstsq(weighted, np.ones(len(weighted)), rcond=None)[0]
        if (factors >= 0).all():
            return terms[:, kept] @ factors
        kept.pop(int(factors.argmin()))


def _strata(batch: np.ndarray, wanted: np.ndarray, probed: np.ndarray) -> np.ndarray:
    """Stratum of every wanted pass, int64; -1 where there are too few probes like it.

    Batches go by powers of two (1, 2, 3-4, 5-8 ...). One with too few probes is pooled with a neighbour, once.
    """
    bucket = np.ceil(np.log2(batch)).astype(np.int64)
    count = {int(b): int((probed & (bucket == b)).sum()) for b in np.unique(bucket[wanted])}
    pool = {b: {b} for b in count}
    for b in count:
        near = [n for n in (b - 1, b + 1) if n in pool and len(pool[n]) == 1]
        near = [n for n in near if count[b] + count[n] >= LEAST_PROBES]
        if count[b] < LEAST_PROBES and len(pool[b]) == 1 and near:
            pool[b] = pool[min(near, key=lambda n: count[n])]
            pool[b].add(b)
    stratum = np.full(len(batch), -1)
    for b, members in pool.items():
        if sum(count[member] for member in members) >= LEAST_PROBES:
            stratum[wanted & (bucket == b)] = min(members)
    return stratum


@dataclass(frozen=True)
class Switch:
    """The policy turned to another way of decoding, for more than one try.

    Attributes:
        time: Seconds since the trace began.
        before, after: `plain`, or who drafts. History beside or instead of a drafter that is on is no switch.
        reason: Of the first pass of the new mode.
    """

    time: float
    before: str
    after: str
    reason: str


def switches(steps: Sequence[TraceStep]) -> list[Switch]:
    """Every switch, in order. Probes and explorations are no switches."""
    found: list[Switch] = []
    before: str | None = None
    for step in steps:
        if step.reason in ONE_OFF:
            continue
        after = step.mode.removeprefix(f"{HISTORY}+")
        if after == HISTORY and before not in (None, PLAIN):
            after = before  # whether a text matches changes from pass to pass
        if before is not None and after != before:
            found.append(Switch(step.time, before, after, step.reason))
        before = after
    return found


@dataclass(frozen=True)
class Summary:
    """A rollout in figures.

    Attributes:
        makespan: Seconds from the first to the last thing recorded.
        passes, tokens: Decode passes, and tokens they emitted.
        tokens_per_second: Over the makespan.
        acceptance: Accepted over drafted; None if nothing was drafted.
        tau: Tokens per sequence of a speculated pass; None without one.
        seconds_by_mode: Time spent in each mode.
        switches: How often the policy switched, by reason.
        requests: Samples that finished.
        saved: Time really saved.
    """

    makespan: float
    passes: int
    tokens: int
    tokens_per_second: float
    acceptance: float | None
    tau: float | None
    seconds_by_mode: Mapping[str, float]
    switches: Mapping[str, int]
    requests: int
    saved: TimeSaved

    @classmethod
    def of(cls, trace: Trace) -> Summary:
        """The figures of a trace; all 0 or None if it is empty."""
        steps = trace.steps
        starts = [step.time for step in steps[:1]] + [request.started for request in trace.requests]
        ends = [step.time + step.draft_seconds + step.target_seconds for step in steps[-1:]]
        ends += [request.finished for request in trace.requests]
        makespan = max(ends, default=0.0) - min(starts, default=0.0)
        tokens = sum(step.emitted for step in steps)
        drafted = sum(step.drafted for step in steps)
        sequences = sum(step.batch for step in steps if step.mode != PLAIN)
        emitted = sum(step.emitted for step in steps if step.mode != PLAIN)
        seconds: defaultdict[str, float] = defaultdict(float)
        for step in steps:
            seconds[step.mode] += step.draft_seconds + step.target_seconds
        return cls(
            makespan=makespan,
            passes=len(steps),
            tokens=tokens,
            tokens_per_second=tokens / makespan if makespan > 0 else 0.0,
            acceptance=sum(step.accepted for step in steps) / drafted if drafted else None,
            tau=emitted / sequences if sequences else None,
            seconds_by_mode=dict(seconds),
            switches=dict(Counter(switch.reason for switch in switches(steps)).most_common()),
            requests=len(trace.requests),
            saved=time_saved(steps),
        )
