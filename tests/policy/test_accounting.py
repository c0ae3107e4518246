"""The time saved is what randomized probes say it is, whatever the policy predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rollout_spec.policy.accounting import Summary, switches, time_saved
from rollout_spec.policy.records import Reason, Trace, TraceRequest, TraceStep

NOISE = 0.15  # sigma of the log of a pass's time
SPIKE = 3.0  # how many times longer a rare pass takes


def plain_seconds(batch: int, context: float) -> float:
    return 0.01 + 2e-4 * batch + 2e-8 * batch * context


def drain(
    seed: int,
    passes: int = 1500,
    probe_share: float = 0.06,
    cost: float = 2.4,
    drift: float = 1.0,
    spikes: float = 0.0,
) -> tuple[list[TraceStep], float]:
    """A rollout's long tail, from 24 sequences to one, and the time really saved.

    A speculated pass takes `cost` plain ones, the machine is `drift` times slower at the end than at the start, and
    a share `spikes` of the passes takes three times as long.
    """
    rng = np.random.default_rng(seed)
    steps, clock, saved = [], 0.0, 0.0
    for index in range(passes):
        batch = max(1, round(24 * math.exp(-6 * index / passes)))
        context = 500 + 3 * index
        plain = plain_seconds(batch, context) * (1 + (drift - 1) * index / passes)
        noise = rng.lognormal(-(NOISE**2) / 2, NOISE) * (SPIKE if rng.random() < spikes else 1.0)
        longest = 3 if batch > 8 else 6
        if rng.random() < probe_share:
            emitted, seconds, mode, reason = batch, plain * noise, "plain", Reason.PROBE
        else:
            accepted = int(rng.binomial(longest * batch, 0.6))
            emitted, seconds, mode, reason = batch + accepted, plain * cost * noise, "int4", Reason.PAYS
            saved += plain * (1 + spikes * (SPIKE - 1)) * emitted / batch - seconds
        drafted = longest * batch * (mode != "plain")
        row = (index, clock, batch, batch * context, mode, drafted, emitted - batch, emitted)
        steps.append(TraceStep(*row, longest, 0.0, seconds, reason.value, 1.5))
        clock += seconds
    return steps, saved


@pytest.mark.parametrize(
    ("passes", "probe_share", "drift", "spikes"),
    [(1500, 0.06, 1.0, 0.01), (1500, 0.06, 2.0, 0.01), (3000, 0.01, 1.0, 0.0)],
    ids=["steady", "slowing", "few-probes"],
)
def test_the_interval_covers_the_truth_and_the_estimate_is_unbiased(
    passes: int, probe_share: float, drift: float, spikes: float
) -> None:
    errors, covered = [], 0
    for seed in range(200):
        steps, truth = drain(seed, passes, probe_share, drift=drift, spikes=spikes)
        found = time_saved(steps)
        assert found.seconds_saved is not None
        if found.covered == 1.0:
            covered += found.seconds_saved.low <= truth <= found.seconds_saved.high
            errors.append(found.seconds_saved.value - truth)
    assert len(errors) > 150
    assert 0.90 <= covered / len(errors) <= 0.99
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(len(errors))


def test_drafts_that_are_longer_where_plain_passes_are_slower_bias_nothing() -> None:
    """Inside one stratum, batches 5 to 8, time and tokens of a pass rise together."""
    steps, truth = [], 0.0
    for index in range(400):
        batch, context = 5 + index % 4, 100 + index
        plain, longest = 0.001 * batch + 1e-6 * batch * context, batch - 4
        if index % 9 == 0:
            steps.append(replace(step(batch, plain, True), kv_tokens=batch * context))
        else:
            emitted, seconds = batch * (longest + 1), 2 * plain
            truth += plain * (longest + 1) - seconds
            steps.append(replace(step(batch, seconds, False, emitted), kv_tokens=batch * context))
    saved = time_saved(steps).seconds_saved
    assert saved is not None and saved.value == pytest.approx(truth, rel=1e-9)


def test_predicted_gains_that_lie_change_nothing() -> None:
    """A policy that claims 10x while speculation loses gets told so."""
    steps, truth = drain(3, cost=6.0)
    liar = [replace(step, gain=10.0) for step in steps]
    found = time_saved(liar)
    assert found == time_saved([replace(step, gain=math.nan) for step in steps])
    assert found.seconds_saved is not None and found.speedup is not None
    assert truth < 0 and found.seconds_saved.high < 0 and found.speedup.high < 1
    assert found.seconds_saved.low <= truth <= found.seconds_saved.high
    assert found.text.startswith("Speculation lost ")


def test_plain_passes_that_the_policy_chose_are_no_probes() -> None:
    """Passes that were plain because speculation did not pay say nothing about those where it did."""
    steps, _ = drain(1)
    chosen = TraceStep(0, 0.0, 1, 500, "plain", 0, 0, 1, 0, 0.0, 99.0, Reason.NOT_WORTH.value, 1.0)
    assert time_saved([chosen] * 50 + steps) == time_saved(steps)


def step(batch: int, seconds: float, probe: bool, emitted: int | None = None) -> TraceStep:
    emitted = batch if probe else 3 * batch if emitted is None else emitted
    mode, reason = ("plain", "probe") if probe else ("int4", "pays")
    return TraceStep(0, 0.0, batch, 100 * batch, mode, 2, 1, emitted, 2, 0.0, seconds, reason, 1.2)


def test_by_hand() -> None:
    """Ten passes of 2 s that emit three tokens a sequence, where a plain pass takes 1 s: 10 of 30 s saved."""
    steps = [step(4, 2.0, False)] * 10 + [step(4, 0.9, True), step(4, 1.1, True)]
    found = time_saved(steps)
    assert found.seconds_saved is not None and found.speedup is not None
    assert found.seconds_saved.value == pytest.approx(10.0) and found.speedup.value == pytest.approx(1.5)
    assert (found.probes, found.speculated, found.covered) == (2, 10, 1.0)
    half = 12.706 * 30 * 0.1  # t with one degree of freedom, standard error of the mean 0.1
    assert found.seconds_saved.high == pytest.approx(10.0 + half)
    assert "neither saved nor lost" in found.text


def test_a_batch_with_too_few_probes_is_pooled_with_its_neighbour_or_left_out() -> None:
    many = [step(4, 2.0, False)] * 10 + [step(4, 1.0, True)] * 2
    pooled = time_saved([*many, *[step(8, 2.0, False)] * 10, step(8, 1.0, True)])
    assert pooled.covered == 1.0
    far = time_saved([*many, *[step(64, 2.0, False)] * 10, step(64, 1.0, True)])
    assert far.covered == 0.5
    assert "50.0% of their time has no probes like it" in far.text
    assert pooled.seconds_saved is not None and pooled.seconds_saved.value == pytest.approx(20.0)
    assert far.seconds_saved is not None and far.seconds_saved.value == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([], "no pass speculated"),
        ([step(4, 1.0, True)] * 9, "no pass speculated"),
        ([step(4, 2.0, False)] * 9 + [step(4, 1.0, True)], "1 randomized plain passes among 9"),
        ([step(1, 2.0, False)] * 9 + [step(64, 1.0, True)] * 9, "too few of like batch"),
    ],
)
def test_what_cannot_be_stated_is_not_stated(steps: list[TraceStep], why: str) -> None:
    found = time_saved(steps)
    assert found.seconds_saved is None and found.speedup is None and found.covered == 0.0
    assert why in found.text and found.text.startswith("The time saved cannot be stated: ")


def test_a_switch_is_neither_a_probe_nor_a_try_nor_a_match_in_history() -> None:
    rows = [
        ("plain", "not-worth"),
        ("int4", "explore"),
        ("plain", "not-worth"),
        ("int4", "pays"),
        ("history+int4", "still-pays"),
        ("plain", "probe"),
        ("int4", "still-pays"),
        ("plain", "bad-cost"),
    ]
    steps = [
        replace(step(1, 1.0, False), time=float(i), mode=mode, reason=why)
        for i, (mode, why) in enumerate(rows)
    ]
    assert [(s.time, s.before, s.after, s.reason) for s in switches(steps)] == [
        (3.0, "plain", "int4", "pays"),
        (7.0, "int4", "plain", "bad-cost"),
    ]


def test_the_summary_counts_what_happened() -> None:
    steps = (step(2, 1.0, True), replace(step(2, 2.0, False), time=1.0, drafted=4, accepted=3, emitted=5))
    request = TraceRequest("a/0", 3, 7, 0.5, 4.0, 4, 3)
    summary = Summary.of(Trace({}, (replace(steps[0], drafted=0, accepted=0), steps[1]), (request,)))
    assert (summary.makespan, summary.passes, summary.tokens, summary.requests) == (4.0, 2, 7, 1)
    assert (summary.tokens_per_second, summary.acceptance, summary.tau) == (1.75, 0.75, 2.5)
    assert summary.seconds_by_mode == {"plain": 1.0, "int4": 2.0}


def test_an_empty_trace_has_a_summary() -> None:
    summary = Summary.of(Trace({}, ()))
    assert (summary.makespan, summary.tokens_per_second, summary.acceptance, summary.tau) == (
        0,
        0,
        None,
        None,
    )
