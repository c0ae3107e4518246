"""The simulator against sums by hand, the geometric law, and figures published for a real system."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rollout_spec import cli
from rollout_spec.observe.report import Report
from rollout_spec.policy import calibration
from rollout_spec.policy.baselines import EfficientRollout, Fixed, Off, RandomLengths, expected_emitted
from rollout_spec.policy.calibration import Calibration
from rollout_spec.policy.cost_model import CostModel, PassCost, fit
from rollout_spec.policy.devices import DEVICES, NF4, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.oracle import Oracle, pooled
from rollout_spec.policy.records import HISTORY, PassTiming, Plan, Reason, StepState
from rollout_spec.policy.simulator import makespan, plan_seconds, simulate
from rollout_spec.policy.workloads import (
    SYNTHETIC,
    Acceptance,
    History,
    Workload,
    acceptance_of,
    efficientrollout_qwen7b,
    from_lengths,
    from_trace,
    uniform_noise,
)

TARGET = PassCost(launch=0.002, per_sequence=1e-4, weights=0.008, per_row=1e-4, per_kv_token=1e-7)
DRAFT = PassCost(launch=0.001, per_sequence=0.0, weights=0.002, per_row=1e-4, per_kv_token=1e-7)
COSTS = CostModel({"target": TARGET, NF4: DRAFT})
H100 = from_datasheet(DEVICES["H100-SXM"], QWEN2_5_7B)


# --- time


def test_the_plain_makespan_is_the_sum_by_hand() -> None:
    trace = simulate(from_lengths("w", [3, 1], prompt=10), Off(), COSTS, host_seconds=0.5)
    by_hand = COSTS.target(2, 2, 20) + COSTS.target(1, 1, 11) + COSTS.target(1, 1, 12) + 3 * 0.5
    assert makespan(trace) == pytest.approx(by_hand)
    assert [step.batch for step in trace.steps] == [2, 1, 1]
    assert [request.finished for request in trace.requests] == pytest.approx(
        [by_hand, COSTS.target(2, 2, 20) + 0.5]
    )


def test_a_sure_drafter_makes_the_rounds_one_can_count() -> None:
    trace = simulate(from_lengths("w", [9, 4], prompt=10, alpha=1.0), Fixed(3), COSTS)
    first = sum(COSTS.draft(NF4, 2, 20 + 2 * j) for j in range(3)) + COSTS.target(2, 8, 20)
    second = sum(COSTS.draft(NF4, 1, 14 + j) for j in range(3)) + COSTS.target(1, 4, 14)
    assert [step.emitted for step in trace.steps] == [8, 4, 1]
    assert trace.steps[2].time == pytest.approx(first + second)


def test_ragged_drafts_cost_what_every_step_of_theirs_costs() -> None:
    lengths, K, history = np.array([10, 20, 30]), np.array([4, 0, 2]), np.array([1, 0, 2])
    draft, target = plan_seconds(COSTS, lengths, NF4, K, history)
    assert draft == pytest.approx(sum(COSTS.draft(NF4, 1, 10 + j) for j in range(3)))
    assert target == pytest.approx(COSTS.target(3, 3 + 6, 60))
    alone = plan_seconds(COSTS, lengths, None, history, history)
    assert alone[0] == 0.0 and alone[1] == pytest.approx(COSTS.target(3, 3 + 3, 60))


def test_many_plans_are_priced_like_each_of_them() -> None:
    rng = np.random.default_rng(0)
    lengths, K_CB = rng.integers(10, 99, 5), rng.integers(0, 6, (20, 5))
    history_CB = np.minimum(K_CB, rng.integers(0, 3, (20, 5)))
    together = np.stack(plan_seconds(COSTS, lengths, NF4, K_CB, history_CB))
    one_by_one = [plan_seconds(COSTS, lengths, NF4, K, h) for K, h in zip(K_CB, history_CB)]
    np.testing.assert_allclose(together.T, one_by_one)


def test_slots_and_arrivals_limit_the_batch() -> None:
    workload = from_lengths("w", [5] * 6, arrivals=np.array([0.0, 0.0, 0.0, 0.0, 1e3, 1e3]), slots=3)
    trace = simulate(workload, Off(), COSTS)
    assert [step.batch for step in trace.steps] == [3] * 5 + [1] * 5 + [2] * 5
    assert [request.started for request in trace.requests[4:]] == [1e3, 1e3]


def test_slots_are_distinct_and_used_again() -> None:
    class Watch(Off):
        def plan(self, state: StepState) -> Plan:
            assert len(set(state.slots.tolist())) == len(state.slots) <= 4
            seen.update(state.slots.tolist())
            return super().plan(state)

    seen: set[int] = set()
    simulate(from_lengths("w", np.arange(1, 30), slots=4), Watch(), COSTS)
    assert seen == {0, 1, 2, 3}


def test_noise_is_paired_with_the_pass_and_leaves_the_mean() -> None:
    workload = from_lengths("w", [2000])
    plain, noisy = (makespan(simulate(workload, Off(), COSTS, noise=noise)) for noise in (0.0, 0.1))
    assert noisy == pytest.approx(plain * np.exp(0.1**2 / 2), rel=0.01) and noisy != plain


def test_a_plan_that_breaks_the_contract_is_refused() -> None:
    class Broken(Off):
        def __init__(self, plan: Plan) -> None:
            self.broken = plan

        def plan(self, state: StepState) -> Plan:
            return self.broken

    workload = from_lengths("w", [8], limit=8)
    one, zero = np.array([1]), np.array([0])
    for plan, message in (
        (Plan(np.array([8]), zero, NF4, Reason.FIXED), "draft_lengths"),
        (Plan(one, one, None, Reason.FIXED), "from_history"),
        (Plan(one, zero, "eagle", Reason.FIXED), "drafter='eagle'"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(workload, Broken(plan), COSTS)


# --- luck


def test_accepted_counts_follow_the_geometric_law() -> None:
    alpha, K = 0.7, 4
    trace = simulate(from_lengths("w", [4000] * 20, alpha=alpha), Fixed(K), COSTS, seed=5)
    steps = [step for step in trace.steps if step.drafted == 20 * K and step.emitted == 20 + step.accepted]
    mean = np.mean([step.accepted / 20 for step in steps])
    assert mean + 1 == pytest.approx(expected_emitted(alpha, K), rel=0.01)
    alone = simulate(from_lengths("w", [40_000], alpha=alpha, limit=50_000), Fixed(K), COSTS)
    counts = np.bincount([step.accepted for step in alone.steps], minlength=K + 1) / len(alone.steps)
    law = [*((1 - alpha) * alpha ** np.arange(K)), alpha**K]
    np.testing.assert_allclose(counts, law, atol=0.012)


def test_every_policy_meets_the_same_luck_at_the_same_position() -> None:
    """Where a draft token at an output position is right once, it is right whoever drafts it, whenever."""
    workload = from_lengths("w", [60, 200], alpha=0.6)
    luck = uniform_noise(9, np.array([0, 1]), np.tile(np.arange(200), (2, 1)), NF4) < 0.6
    for policy in (Fixed(3), Fixed(7), RandomLengths(2)):
        position = np.zeros(2, int)
        plans, real = [], policy.plan

        def plan(state: StepState, plans=plans, real=real) -> Plan:
            plans.append((state, real(state)))
            return plans[-1][1]

        policy.plan = plan  # type: ignore[method-assign]
        trace = simulate(workload, policy, COSTS, seed=9)
        for (state, made), step in zip(plans, trace.steps):
            total = 0
            for request, K in zip(state.slots.tolist(), made.draft_lengths.tolist()):
                left = int(workload.outputs[request]) - position[request]
                right = luck[request, position[request] : position[request] + min(K, left)]
                accepted = int(np.cumprod(right).sum())
                position[request] += min(accepted + 1, left)
                total += accepted
            assert step.accepted == total
        assert position.tolist() == [60, 200]


def test_noise_is_uniform_and_uncorrelated() -> None:
    u = uniform_noise(0, np.arange(200), np.tile(np.arange(500), (200, 1)), "x")
    assert u.mean() == pytest.approx(0.5, abs=0.003) and u.min() >= 0 and u.max() < 1
    for other in (
        u[:, 1:],
        u[1:, :],
        uniform_noise(1, np.arange(200), np.tile(np.arange(500), (200, 1)), "x"),
    ):
        rows, columns = other.shape
        assert abs(np.corrcoef(u[:rows, :columns].ravel(), other.ravel())[0, 1]) < 0.012


def test_acceptance_varies_with_depth_position_and_time() -> None:
    acceptance = Acceptance(
        np.array([0.8, 1.0]), by_depth=(1.0, 0.5), by_output=((10, 0.1),), by_time=((5.0, 0.5),)
    )
    positions = np.array([[8, 9, 10], [0, 1, 2]])
    np.testing.assert_allclose(
        acceptance.at(np.array([0, 1]), positions, 0.0), [[0.8, 0.4, 0.04], [1.0, 0.5, 0.5]]
    )
    np.testing.assert_allclose(acceptance.at(np.array([1]), positions[1:], 5.0), [[0.5, 0.25, 0.25]])


def test_history_proposes_whole_matches_and_costs_nothing() -> None:
    history = History(Acceptance(np.array([1.0])), coverage=np.array([1.0]), block=10)
    workload = replace(from_lengths("w", [40]), history=history)
    trace = simulate(workload, Fixed(50, drafter=HISTORY), COSTS)
    assert [step.drafted for step in trace.steps] == [10, 9, 9, 9]
    assert all(step.draft_seconds == 0.0 and step.mode == HISTORY for step in trace.steps)
    never = replace(history, coverage=np.array([0.0]))
    assert len(simulate(replace(workload, history=never), Fixed(5, drafter=HISTORY), COSTS).steps) == 40


# --- traces and workloads


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_token_of_every_request_is_emitted_under_any_policy(name: str) -> None:
    workload = SYNTHETIC[name](24)
    trace = simulate(workload, RandomLengths(0), COSTS)
    assert sum(step.emitted for step in trace.steps) == workload.outputs.sum()
    assert sum(step.drafted for step in trace.steps) == sum(request.drafted for request in trace.requests)
    assert sum(step.accepted for step in trace.steps) == sum(request.accepted for request in trace.requests)
    assert [request.output_tokens for request in trace.requests] == workload.outputs.tolist()
    assert max(step.batch for step in trace.steps) <= workload.slots
    assert max(request.finished for request in trace.requests) == pytest.approx(makespan(trace))
    ends = [step.time + step.draft_seconds + step.target_seconds for step in trace.steps]
    assert all(start >= end - 1e-9 for start, end in zip([s.time for s in trace.steps[1:]], ends))


def test_a_replayed_trace_has_its_lengths_its_slots_and_its_acceptance() -> None:
    recorded = simulate(from_lengths("w", [300] * 40, alpha=0.8, slots=16), Fixed(2), COSTS)
    workload = from_trace(recorded)
    assert workload.outputs.tolist() == [300] * 40 and workload.slots == 16
    assert simulate(workload, Off(), COSTS).steps[0].batch == 16
    assert list(workload.drafters) == [NF4]
    assert from_trace(recorded, alpha=0.5).drafters[NF4].rates.tolist() == [0.5] * 40
    again = simulate(workload, Fixed(2), COSTS, seed=1)
    assert makespan(again) == pytest.approx(makespan(recorded), rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": np.array([0])}, "outputs must be in 1..limit=8192"),
        ({"outputs": np.array([9000])}, "outputs must be in 1..limit=8192"),
        ({"arrivals": np.array([])}, "one of each per request"),
        ({"drafters": {NF4: Acceptance(np.ones(2))}}, "rates: give one per request"),
    ],
)
def test_an_impossible_workload_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(from_lengths("w", [5]), **changes)


@pytest.mark.parametrize("K", [1, 6])
def test_acceptance_is_told_from_the_share_of_drafts_that_was_accepted(K: int) -> None:
    drafts = np.random.default_rng(0).random((20_000, K)) < 0.9
    share = np.cumprod(drafts, axis=1).mean()
    assert acceptance_of(share, K) == pytest.approx(0.9, abs=0.005)


# --- the oracle


def test_what_waits_is_poured_over_the_shortest() -> None:
    nothing = np.zeros(0, np.int64)
    assert pooled(np.array([5, 1, 9]), nothing).tolist() == [5, 1, 9]
    assert pooled(np.array([5, 1, 90]), np.array([2, 3])).tolist() == [5.5, 5.5, 90]
    assert pooled(np.array([5, 1, 7]), np.array([2, 3])).tolist() == [5.5, 5.5, 5.5]


def test_the_oracle_hurries_the_straggler_and_leaves_the_others() -> None:
    flat = replace(TARGET, per_sequence=0.0, per_row=1e-3)
    plans: list[Plan] = []
    workload = from_lengths("w", [50] * 15 + [500], alpha=0.9)
    oracle = Oracle(workload, CostModel({"target": flat, NF4: DRAFT}))
    real = oracle.plan
    oracle.plan = lambda state: plans.append(real(state)) or plans[-1]  # type: ignore[method-assign, func-returns-value]
    simulate(workload, oracle, oracle.costs)
    first = plans[0].draft_lengths
    assert first[-1] > first[:-1].max()


def test_the_oracle_chooses_the_better_drafter_and_mixes_history() -> None:
    costs = CostModel({"target": TARGET, "good": DRAFT, "bad": DRAFT})
    workload = from_lengths("w", [400] * 4, alpha={"bad": 0.3, "good": 0.9})
    modes = {step.mode for step in simulate(workload, Oracle(workload, costs), costs).steps}
    assert "good" in modes and "bad" not in modes
    history = History(Acceptance(np.full(4, 0.9)), np.full(4, 0.5))
    workload = replace(workload, history=history)
    modes = {step.mode for step in simulate(workload, Oracle(workload, costs), costs).steps}
    assert {"history+good", HISTORY} & modes


# without long_tail_32k, which is long_tail four times as long
@pytest.mark.parametrize("name", sorted(set(SYNTHETIC) - {"long_tail_32k"}))
def test_the_oracle_is_never_slower_than_off_or_any_fixed_draft_length(name: str) -> None:
    """In expectation: the oracle does not know the luck, which moves a straggler's time by 0.7 % for a given K.

    Over 8 seeds of long_tail and one_straggler it comes to 1.0003 and 0.9993 of the best fixed K.
    """
    samples = {"many_medium": 160, "collapsing_acceptance": 16}.get(name, 24)
    policies = {"off": lambda w: Off(), "oracle": lambda w: Oracle(w, H100)}
    policies |= {f"fixed:{K}": lambda w, K=K: Fixed(K) for K in (1, 3, 5, 8)}
    means = dict.fromkeys(policies, 0.0)
    for seed, (kind, build) in itertools.product(range(2), policies.items()):
        workload = SYNTHETIC[name](samples, seed)
        means[kind] += makespan(simulate(workload, build(workload), H100, seed=seed)) / 2
    assert means["oracle"] <= 1.01 * min(means.values()), means


# --- against published figures


@pytest.fixture(scope="module")
def a100() -> CostModel:
    """Fitted to EfficientRollout's published sweep of Qwen2.5-7B: forward passes only, no host time."""
    kinds = {"target_decode": "target", "target_verify": "target", "drafter_decode": NF4}
    timings = []
    with (Path(__file__).parent / "data" / "sweep_a100_qwen2.5-7b.csv").open() as file:
        for row in csv.DictReader(file):
            batch, K = int(row["batch"]), int(row["gamma"])
            if row["mode"] in kinds and batch:
                rows = batch * (K + 1) if row["mode"] == "target_verify" else batch
                kv_tokens = batch * int(row["seq"])
                seconds = float(row["median_ms"]) / 1e3
                timings.append(PassTiming(kinds[row["mode"]], batch, rows, kv_tokens, seconds))
    return fit(timings)


def three_rows(workload: Workload, costs: CostModel, believed: CostModel) -> list[float]:
    """Makespans: plain, always on with their default K = 7, and the full system over ten rollouts."""
    system, full = EfficientRollout(believed), []
    for seed in range(10):
        full.append(makespan(simulate(workload, system, costs, seed=seed)))
        system.after_update()
    rows = [makespan(simulate(workload, policy, costs)) for policy in (Off(), Fixed(7))]
    return [*rows, float(np.mean(full))]


def test_the_published_rollout_is_derived_by_construction(a100: CostModel) -> None:
    workload = efficientrollout_qwen7b(a100)
    trace = simulate(workload, Off(), a100)
    done = np.sort([request.finished for request in trace.requests])
    np.testing.assert_allclose(done[[63, 64]].mean(), 13.0, rtol=0.02)
    np.testing.assert_allclose(done[[114, 115]].mean(), 22.0, rtol=0.02)
    np.testing.assert_allclose(done[126], 30.0, rtol=0.02)
    np.testing.assert_allclose(done[127], 88.0, rtol=0.01)
    assert workload.outputs.mean() == pytest.approx(640, rel=0.01)
    assert workload.outputs.max() == pytest.approx(8192, rel=0.03)  # not put in: their cap


def test_published_makespans_from_forward_passes_alone(a100: CostModel) -> None:
    """82.4 s plain, 75.6 s always on, 66.3 s in full (means of a training run; the lengths come from one rollout).

    The time before the first pass (6.8 s) is calibrated on the plain row, by the mean response. Always on comes
    out too fast, by 15 %: the sweep holds no host time, and theirs is per draft token.
    """
    plain, always_on, full = three_rows(efficientrollout_qwen7b(a100), a100, a100)
    assert [plain, always_on, full] == pytest.approx([82.4, 75.6, 66.3], rel=0.15)
    assert always_on < 75.6


def test_published_makespans_with_host_time_per_draft_token(a100: CostModel) -> None:
    """2 ms per draft token, calibrated on the always-on row, predict the third: they synchronise once for each."""
    draft = a100.passes[NF4]
    costs = CostModel({**a100.passes, NF4: replace(draft, launch=draft.launch + 2e-3)})
    rows = three_rows(efficientrollout_qwen7b(a100, last=82.4), costs, a100)
    assert rows == pytest.approx([82.4, 75.6, 66.3], rel=0.12)


# --- the command


@pytest.mark.parametrize("policy", ["auto", "off", "fixed:3", "efficientrollout", "tlt", "oracle"])
def test_the_command_runs_every_policy(policy: str, tmp_path: Path) -> None:
    arguments = [
        "simulate",
        "uniform",
        "--policy",
        policy,
        "--batch",
        "16",
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    assert "over plain" in result.output and policy in result.output
    report = Report.read(tmp_path / "r.json")
    assert report.results["slots"] == 16
    row = report.results[policy]
    plain = report.results["plain"]
    assert row["speedup"] == pytest.approx(plain["makespan_s"] / row["makespan_s"])
    assert row["speedup"] > (1.1 if policy in ("oracle", "fixed:3", "tlt") else 0.99)


def test_the_command_replays_a_trace_with_a_calibration_file(tmp_path: Path) -> None:
    from rollout_spec.observe.trace import write_trace

    write_trace(simulate(from_lengths("w", [50] * 6), Fixed(2), COSTS), tmp_path / "trace.json")
    renamed = CostModel({"target": TARGET, "int8": DRAFT})
    rng = np.random.default_rng(0)
    timings = [
        PassTiming(
            kind, b, b * (k + 1), 100 * b, cost.seconds(b, b * (k + 1), 100 * b) * rng.uniform(0.99, 1.01)
        )
        for kind, cost in renamed.passes.items()
        for b in (1, 4, 16)
        for k in (0, 3, 7)
    ]
    calibration.write(Calibration.of({"machine": "invented"}, timings, brief=False), tmp_path / "costs.json")
    arguments = ["simulate", str(tmp_path / "trace.json"), "--cost", str(tmp_path / "costs.json")]
    result = CliRunner().invoke(cli.main, [*arguments, "--policy", "fixed:2"])
    assert result.exit_code == 0, result.output
    assert "fixed:2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "WORKLOAD='nothing': no such file"),
        (["uniform", "--policy", "fixed:0"], "--policy='fixed:0'"),
        (["uniform", "--policy", "best"], "use one of auto, off, fixed:K"),
        (["uniform", "--cost", "h900"], "--cost='h900': give a100, h100, h200, h20"),
    ],
)
def test_the_command_says_what_it_cannot_do(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, ["simulate", *arguments])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_the_help_names_every_synthetic_workload() -> None:
    text = CliRunner().invoke(cli.main, ["simulate", "--help"]).output
    assert all(name in text for name in SYNTHETIC)
