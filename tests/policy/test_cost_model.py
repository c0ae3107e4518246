"""Fits recover what made the timings, never predict nonsense, and hold on a published sweep they have not seen."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.policy.cost_model import OVERALL, TARGET, CostModel, PassCost, fit, held_out_error
from rollout_spec.policy.devices import DEVICES, NF4, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.records import PassTiming

TRUTH = PassCost(
    launch=1e-3,
    per_sequence=2e-5,
    weights=8e-3,
    per_row=6e-5,
    per_kv_token=3e-8,
    per_kv_row=2e-9,
    per_context=6e-7,
)
GRID = [
    (batch, batch * (k + 1), batch * context)
    for batch in (1, 4, 16, 48, 96)
    for k in (0, 3, 7, 15)
    for context in (256, 2048, 8192)
]
UNSEEN = [
    (batch, batch * (k + 1), batch * context)
    for batch in (2, 24, 128)
    for k in (0, 2, 10)
    for context in (700, 5000, 12000)
]


def timed(cost: PassCost, where, noise: float = 0.0, seed: int = 0, repeats: int = 1) -> list[PassTiming]:
    rng = np.random.default_rng(seed)
    return [
        PassTiming(TARGET, *point, cost.seconds(*point) * math.exp(noise * rng.standard_normal()))
        for point in where
        for _ in range(repeats)
    ]


def relative_errors(model: CostModel, cost: PassCost, where) -> np.ndarray:
    return np.array([abs(model.target(*point) / cost.seconds(*point) - 1) for point in where])


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("launch", 1.0),
        ("collectives", 1.0),
        ("per_sequence", 4.0),
        ("weights", 1.0),
        ("per_row", 20.0),
        ("per_kv_token", 1000.0),
        ("per_kv_row", 5000.0),
        ("per_context", 250.0),
        ("experts", 1 - 0.75**20),
    ],
)
def test_what_each_term_counts(term, expected):
    nothing = PassCost(0.0, 0.0, 0.0, 0.0, 0.0, expert_share=0.25)
    assert replace(nothing, **{term: 1.0}).seconds(4, 20, 1000) == pytest.approx(expected)


def test_reading_and_arithmetic_overlap():
    cost = PassCost(0.0, 0.0, weights=1.0, per_row=0.01, per_kv_token=0.0)
    assert cost.seconds(1, 1, 0) == pytest.approx(1.0, rel=1e-3)
    assert cost.seconds(1, 100, 0) == pytest.approx(2 ** (1 / 1.5))
    assert cost.seconds(1, 100_000, 0) == pytest.approx(1000.0, rel=1e-3)


def test_only_passes_with_several_rows_per_sequence_walk_their_context():
    cost = replace(TRUTH, per_row=0.0, per_kv_row=0.0)
    stream, walk = 4096 * TRUTH.per_kv_token, 4096 * TRUTH.per_context
    assert cost.seconds(1, 2, 4096) - cost.seconds(1, 1, 4096) == pytest.approx(
        (stream**1.5 + walk**1.5) ** (1 / 1.5) - stream
    )


def test_arrays_give_what_numbers_give():
    batch, rows, kv = np.array(GRID).T
    cost = replace(TRUTH, experts=5e-3, expert_share=0.1)
    model = CostModel({TARGET: cost, "nf4": TRUTH})
    np.testing.assert_allclose(model.target(batch, rows, kv), [model.target(*point) for point in GRID])
    np.testing.assert_allclose(
        model.draft("nf4", batch, kv), [model.draft("nf4", b, n) for b, _, n in GRID], rtol=1e-12
    )
    lengths = np.arange(8)
    np.testing.assert_allclose(
        model.target(4, 4 + 4 * lengths, 1000), [model.target(4, 4 + 4 * k, 1000) for k in range(8)]
    )
    assert isinstance(model.target(4, 8, 1000), float)


# --- recovering what made the timings --------------------------------------------------------------------------------


def test_clean_timings_give_the_cost_back():
    model = fit(timed(TRUTH, GRID))
    assert relative_errors(model, TRUTH, UNSEEN).max() < 0.02  # up to twice the batch and context timed
    found = model.passes[TARGET]
    for term in ("per_row", "per_kv_token", "per_context"):
        assert getattr(found, term) == pytest.approx(getattr(TRUTH, term), rel=0.05)
    assert found.launch + found.weights == pytest.approx(TRUTH.launch + TRUTH.weights, rel=0.02)


terms = st.floats(0.0, 1.0)


@settings(max_examples=25)
@given(st.tuples(*[terms] * 7), st.integers(0, 1000))
def test_noisy_timings_of_any_cost_are_predicted_where_nothing_was_timed(parts, seed):
    ceilings = (5e-3, 5e-5, 1e-2, 1e-4, 5e-8, 5e-9, 1e-6)
    cost = PassCost(*(part * top for part, top in zip(parts, ceilings)))
    cost = replace(cost, launch=cost.launch + 1e-4)
    model = fit(timed(cost, GRID, noise=0.03, seed=seed, repeats=3))
    errors = relative_errors(model, cost, UNSEEN)
    assert np.median(errors) < 0.03 and errors.max() < 0.15


def test_outliers_among_repeats_and_whole_configurations_do_not_matter():
    timings = timed(TRUTH, GRID, noise=0.01, repeats=3)
    spoilt = [replace(x, seconds=x.seconds * 20) if i % 3 == 0 else x for i, x in enumerate(timings)]
    spoilt[:6] = [replace(x, seconds=x.seconds * 5) for x in spoilt[:6]]
    assert np.median(relative_errors(fit(spoilt), TRUTH, UNSEEN)) < 0.02


def test_repeats_count_once():
    timings = timed(TRUTH, GRID, noise=0.05)
    again = timings + [timings[7]] * 500
    assert fit(again) == fit(timings)


def test_experts_are_found_when_their_share_is_known():
    moe = replace(TRUTH, weights=2e-3, experts=2e-2, expert_share=8 / 128)
    timings = timed(moe, GRID, noise=0.01)
    model = fit(timings, expert_share=8 / 128)
    assert model.passes[TARGET].experts == pytest.approx(2e-2, rel=0.1)
    assert relative_errors(model, moe, UNSEEN).max() < 0.05
    assert held_out_error(timings, expert_share=8 / 128)[TARGET].median < 0.02
    assert fit(timings).passes[TARGET].experts == 0.0


def test_each_kind_has_its_own_cost():
    half = replace(TRUTH, weights=4e-3)
    drafts = [replace(x, kind="nf4") for x in timed(half, [p for p in GRID if p[0] == p[1]])]
    model = fit(timed(TRUTH, GRID) + drafts)
    assert model.draft("nf4", 16, 32768) == pytest.approx(half.seconds(16, 16, 32768), rel=0.01)
    assert model.target(16, 16, 32768) == pytest.approx(TRUTH.seconds(16, 16, 32768), rel=0.01)


# --- few timings -----------------------------------------------------------------------------------------------------


def test_one_timing_is_a_constant():
    model = fit([PassTiming(TARGET, 2, 2, 0, 0.01)])
    assert model.target(2, 2, 0) == pytest.approx(0.01, rel=0.02)
    assert model.target(2, 2, 10**6) == pytest.approx(0.01, rel=0.02)


def test_what_was_not_varied_is_not_charged():
    plain = [(batch, batch, 0) for batch in (1, 2, 4, 8, 16, 32)]
    found = fit(timed(TRUTH, plain)).passes[TARGET]
    assert found.per_kv_token == found.per_kv_row == found.per_context == found.experts == 0.0
    alike = fit(timed(replace(TRUTH, per_kv_token=0.0, per_kv_row=0.0, per_context=0.0), GRID)).passes[TARGET]
    assert alike.per_kv_token == alike.per_kv_row == alike.per_context == 0.0


# First steps of a 300M policy in vLLM: the context grew with the steps, whatever the batch.
FIRST_STEPS = [(1, 1, 62, 0.0365), (1, 5, 62, 0.0407), (3, 3, 164, 0.0406), (3, 15, 164, 0.0689), (4, 4, 119, 0.0381),
               (4, 20, 119, 0.0728), (8, 8, 95, 0.0406), (8, 40, 95, 0.0984)]  # fmt: skip
FIRST_DRAFTS = [(1, 1, 62, 0.0181), (3, 3, 164, 0.026), (4, 4, 119, 0.0211), (8, 8, 95, 0.0271)]


def test_a_context_that_was_not_varied_costs_what_its_bytes_cost():
    timings = [PassTiming(TARGET, *x) for x in FIRST_STEPS] + [PassTiming("nf4", *x) for x in FIRST_DRAFTS]
    share = 1 / 24_000
    costs = fit(timings, kv_share=share)
    target, drafter = costs.passes[TARGET], costs.passes["nf4"]
    assert (
        target.per_kv_token == drafter.per_kv_token == pytest.approx(share * (target.launch + target.weights))
    )
    assert not (target.per_kv_row or target.per_context or drafter.per_kv_row or drafter.per_context)
    for batch, rows, kv_tokens, _ in FIRST_STEPS:
        more = costs.target(batch, rows, 10 * kv_tokens) - costs.target(batch, rows, kv_tokens)
        assert more == pytest.approx(9 * kv_tokens * target.per_kv_token)
    errors = [abs(costs.target(*step[:3]) / step[3] - 1) for step in FIRST_STEPS]
    assert np.median(errors) < 0.1 and max(errors) < 0.2  # the steps with three sequences were slow
    # Left to itself the fit takes one slow step for the price of its context.
    assert fit(timings).target(8, 8, 950) > 1.5 * 0.0406
    with pytest.raises(ValueError, match=r"kv_share=0\.1: there is no timing of the target"):
        fit(timings[-1:], kv_share=0.1)


@pytest.mark.parametrize("seed", range(10))
def test_six_timings_extrapolate_without_blowing_up(seed):
    few = [(1, 1, 512), (1, 4, 512), (4, 4, 4096), (4, 16, 4096), (16, 16, 32768), (16, 64, 32768)]
    model = fit(timed(TRUTH, few, noise=0.03, seed=seed))
    for point in ((64, 64, 64 * 2048), (64, 256, 64 * 2048), (1, 8, 8192)):
        ratio = model.target(*point) / TRUTH.seconds(*point)
        assert 0.4 < ratio < 2.5, point


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 64),
            st.integers(0, 15),
            st.integers(0, 8192),
            st.floats(1e-6, 10.0, exclude_min=True),
        ),
        min_size=1,
        max_size=8,
    ),
    st.tuples(st.integers(1, 300), st.integers(0, 20), st.integers(0, 40_000)),
)
def test_whatever_was_timed_predictions_are_positive_and_monotone(points, where):
    model = fit([PassTiming(TARGET, b, b * (k + 1), b * s, t) for b, k, s, t in points])
    batch, k, context = where

    def seconds(batch, k, context):
        return model.target(batch, batch * (k + 1), batch * context)

    here = seconds(batch, k, context)
    slack = 1 - 1e-12
    assert 0 < here < math.inf
    assert seconds(batch + 1, k, context) >= here * slack
    assert seconds(batch, k + 1, context) >= here * slack
    assert seconds(batch, k, context + 100) >= here * slack
    assert model.target(batch, batch * (k + 1) + 1, batch * context) >= here * slack
    assert model.target(batch, batch * (k + 1), batch * context + 1) >= here * slack


@pytest.mark.parametrize("seconds", [0.0, -1e-3, math.nan, math.inf])
def test_impossible_times_are_named(seconds):
    with pytest.raises(ValueError, match=r"kind='nf4'.*finite time above 0 s; leave this timing out"):
        fit([PassTiming(TARGET, 1, 1, 10, 0.01), PassTiming("nf4", 1, 1, 10, seconds)])


@pytest.mark.parametrize("where", [(0, 1, 10), (4, 3, 10), (1, 1, -1)])
def test_impossible_configurations_are_named(where):
    with pytest.raises(ValueError, match="rows at least batch"):
        fit([PassTiming(TARGET, *where, 0.01)])


def test_no_timings_is_an_error():
    with pytest.raises(ValueError, match="time at least one pass"):
        fit([])
    with pytest.raises(ValueError, match="time at least one pass"):
        held_out_error([])


# --- held-out error --------------------------------------------------------------------------------------------------


def test_held_out_error_does_not_leak_between_repeats():
    """Times that follow no law cannot be predicted, however often each configuration was repeated."""
    rng = np.random.default_rng(0)
    lawless = [PassTiming(TARGET, *point, float(rng.choice([0.01, 0.1]))) for point in GRID]
    found = held_out_error(lawless * 10)[TARGET]
    assert found.configurations == len(GRID)
    assert found.p90 > 0.5


def test_held_out_error_is_the_noise_when_the_formula_is_true():
    timings = timed(TRUTH, GRID, noise=0.03) + [replace(x, kind="nf4") for x in timed(TRUTH, GRID[:4])]
    found = held_out_error(timings)
    assert set(found) == {TARGET, "nf4", OVERALL}
    assert 0.01 < found[TARGET].median < 0.03 and found[TARGET].p90 < 0.08
    assert found[OVERALL].configurations == len(GRID) + 4
    assert held_out_error(timings) == found
    assert held_out_error(timings, seed=1) != found


def test_held_out_error_needs_something_to_hold_out():
    one = [PassTiming(TARGET, 1, 1, 10, 0.01)]
    with pytest.raises(ValueError, match="'target' was timed in one configuration only"):
        held_out_error(one * 20)
    with pytest.raises(ValueError, match="folds=1"):
        held_out_error(timed(TRUTH, GRID), folds=1)


# --- to and from files -----------------------------------------------------------------------------------------------


def test_dictionaries_lose_nothing():
    model = fit([*timed(TRUTH, GRID, noise=0.1), PassTiming("nf4", 1, 1, 10, 0.1 + 0.2)])
    assert CostModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_head": 1.0}, "per_head"),
        ({"launch": -1.0}, "launch"),
        ({"launch": math.nan}, "launch"),
    ],
)
def test_dictionaries_with_strange_terms_are_refused(change, message):
    data = CostModel({TARGET: TRUTH}).to_dict()
    data["passes"][TARGET].update(change)
    with pytest.raises(ValueError, match=message):
        CostModel.from_dict(data)


def test_dictionaries_with_missing_or_unknown_keys_are_refused():
    data = CostModel({TARGET: TRUTH}).to_dict()
    with pytest.raises(ValueError, match="version"):
        CostModel.from_dict({**data, "version": 1})
    del data["passes"][TARGET]["weights"]
    with pytest.raises(ValueError, match="weights"):
        CostModel.from_dict(data)


# --- against a published sweep ---------------------------------------------------------------------------------------

KINDS = {"target_decode": TARGET, "target_verify": TARGET, "drafter_decode": NF4}


@pytest.fixture(scope="module")
def sweep() -> list[PassTiming]:
    """Qwen2.5-7B and its 4-bit drafter on one A100; what was read into the file stands in `data/README.md`."""
    timings = []
    path = Path(__file__).parent / "data" / "sweep_a100_qwen2.5-7b.csv"
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            batch, context, mode = int(line["batch"]), int(line["seq"]), line["mode"]
            if batch and mode in KINDS:
                rows = batch * (int(line["gamma"]) + 1) if mode == "target_verify" else batch
                seconds = float(line["median_ms"]) / 1e3
                timings.append(PassTiming(KINDS[mode], batch, rows, batch * context, seconds))
    return timings


def test_unseen_passes_of_the_published_sweep_are_predicted(sweep):
    found = held_out_error(sweep)
    assert found[TARGET].configurations > 200
    assert found[TARGET].median < 0.03 and found[TARGET].p90 < 0.10
    assert found[NF4].median < 0.045 and found[NF4].p90 < 0.12


def test_a_fit_to_the_published_sweep_stays_physical(sweep):
    cost = fit(sweep).passes[TARGET]
    a100 = DEVICES["A100-80GB"]
    assert 0.5 < QWEN2_5_7B.weight_bytes / a100.bandwidth / cost.weights < 1.0
    assert 0.5 < 2 * QWEN2_5_7B.active_parameters / a100.flops / cost.per_row < 1.0


def test_a_fifth_of_the_published_sweep_predicts_the_rest(sweep):
    chosen = set(np.random.default_rng(0).permutation(len(sweep))[::5].tolist())
    few = fit([x for i, x in enumerate(sweep) if i in chosen])
    rest = [x for i, x in enumerate(sweep) if i not in chosen]
    errors = [abs(few.passes[x.kind].seconds(x.batch, x.rows, x.kv_tokens) / x.seconds - 1) for x in rest]
    assert np.median(errors) < 0.05


def test_datasheets_come_near_the_published_sweep(sweep):
    model = from_datasheet(DEVICES["A100-80GB"], QWEN2_5_7B)
    errors: dict[str, list[float]] = {"plain": [], "verify": [], "draft": []}
    for x in sweep:
        kind = "draft" if x.kind == NF4 else "verify" if x.rows > x.batch else "plain"
        predicted = model.passes[x.kind].seconds(x.batch, x.rows, x.kv_tokens)
        errors[kind].append(abs(predicted / x.seconds - 1))
    medians = {kind: float(np.median(of)) for kind, of in errors.items()}
    assert medians["plain"] < 0.05 and medians["verify"] < 0.10 and medians["draft"] < 0.10, medians
