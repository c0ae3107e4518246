"""The policy's inner loops, against what they compute written another way."""

import subprocess
import sys

import numpy as np
import pytest

from rollout_spec.policy import compiled
from rollout_spec.policy.compiled import (
    catching_up,
    corrections,
    deepest,
    ending_last,
    further,
    gain_alone,
    outlasting,
    powers,
    put_behind,
    seconds,
    survival,
    uncorrected,
)
from rollout_spec.policy.cost_model import PassCost

MIXTURE = PassCost(1e-3, 2e-4, 1e-2, 6e-4, 5e-8, 1e-9, 1e-6, 4e-3, 0.1, 2e-4)
TARGET = PassCost(1e-3, 2e-4, 1e-2, 6e-4, 5e-8)
STEP = PassCost(5e-4, 1e-4, 3e-3, 2e-4, 5e-8)
UNCORRECTED = np.ones(20)
BATCH, LONGEST = 9, 6


def prices(cost, factors=UNCORRECTED):
    found = uncorrected(cost.terms)
    corrections(found)[:] = factors
    return found


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_pass_costs_what_the_model_says_corrected_by_its_rows():
    factors = np.geomspace(0.5, 2.0, 20)
    for batch, rows, context in [(1, 1, 0), (4, 4, 900), (4, 20, 900), (64, 127, 64000), (64, 128, 64000)]:
        wanted = MIXTURE.seconds(batch, rows, context) * factors[rows.bit_length()]
        assert seconds(prices(MIXTURE, factors), batch, rows, context) == pytest.approx(wanted, rel=1e-12)
    most = MIXTURE.seconds(1, 1 << 30, 0) * factors[-1]
    assert seconds(prices(MIXTURE, factors), 1, 1 << 30, 0) == pytest.approx(most, rel=1e-12)


def test_survival_is_the_product_of_what_each_token_survives(rng):
    request = np.stack((np.full(20, 30.0), rng.uniform(0, 30, 20)), 1)
    slots, rejection, expected = rng.permutation(20)[:BATCH], rng.uniform(0, 0.9, LONGEST), 0.3
    rejected = (30 - request[slots, 1] + 16 * expected) / (30 + 16)
    hazard = np.clip(1 - rejected[:, None] / expected * rejection, 0, 0.999)
    np.testing.assert_allclose(survival(request, slots, rejection, expected, 16.0), hazard.cumprod(1))


def test_what_stands_behind_history_is_reached_if_all_of_that_is_accepted(rng):
    confidence, before = rng.uniform(0, 1, BATCH), rng.integers(0, 5, BATCH)
    alive = powers(confidence, np.full(BATCH, LONGEST), LONGEST)
    np.testing.assert_allclose(alive, confidence[:, None] ** np.arange(1, LONGEST + 1))
    limited = powers(confidence, before, LONGEST)
    np.testing.assert_array_equal(limited, alive * (np.arange(LONGEST) < before[:, None]))
    certain = put_behind(alive, confidence, before)
    np.testing.assert_allclose(alive, confidence[:, None] ** (before[:, None] + np.arange(1, LONGEST + 1)))
    np.testing.assert_allclose(
        certain, [(c ** np.arange(1, n + 1)).sum() for c, n in zip(confidence, before, strict=True)]
    )


@pytest.mark.parametrize("drafter", [None, STEP])
@pytest.mark.parametrize("ragged", [False, True])
def test_of_what_is_on_offer_the_depth_of_the_largest_gain_is_taken(rng, drafter, ragged):
    """Every depth, priced one by one. Gains rise and then fall with the depth here."""
    for _ in range(50):
        weights = rng.dirichlet(np.full(BATCH, 0.5))
        limit = rng.integers(0, LONGEST + 1, BATCH)
        limit[0] = LONGEST
        given = powers(rng.uniform(0, 1, BATCH), limit, LONGEST)
        before = rng.integers(0, 3, BATCH)
        certain = before * rng.uniform(0, 1, BATCH)
        context, history, ahead, plain = 5000, int(before.sum()), 2e-3, 0.02
        step = None if drafter is None else prices(drafter)
        alive = given.copy()
        lengths, depth, gain, duration = deepest(
            alive, before, certain, before + limit, weights, prices(TARGET), step, context, ahead, plain, 1.3, ragged
        )  # fmt: skip
        offered = (alive > 0).sum(1)
        np.testing.assert_array_equal(lengths, before + np.minimum(offered, depth))
        if step is not None:
            ahead += catching_up(step, BATCH, history)
        assert (offered <= limit).all()
        np.testing.assert_array_equal(alive, given * (np.arange(LONGEST) < offered[:, None]))
        if not ragged:
            np.testing.assert_array_equal(offered, limit)
        found = []
        for longest in range(1, offered.max() + 1):
            lengths = np.minimum(offered, longest)
            taken = ahead + seconds(prices(TARGET), BATCH, BATCH + history + int(lengths.sum()), context)
            for j in range(0 if step is None else longest):
                active = int((offered > j).sum())
                taken += seconds(step, active, active, context * active // BATCH)
            drafted = sum(w * a[:k].sum() for w, a, k in zip(weights, given, lengths, strict=True))
            emitted = 1 + weights @ certain + drafted
            found.append((emitted * plain / taken, taken))
        assert (gain, duration) == pytest.approx(max(found), rel=1e-9)
        assert (gain, duration) == pytest.approx(found[depth - 1], rel=1e-9)


def test_a_token_is_on_offer_if_it_is_worth_its_price(rng):
    weights, alive = np.array([0.9, 0.1]), powers(np.full(2, 0.7), np.full(2, LONGEST), LONGEST)
    row = (seconds(prices(TARGET), 2, 8, 100) - seconds(prices(TARGET), 2, 4, 100)) / 4
    wanted = (alive * weights[:, None] > row * 1.3 / 0.002).sum(1)
    limit = np.full(2, LONGEST)
    none = np.zeros(2, np.int64)
    deepest(alive, none, np.zeros(2), limit, weights, prices(TARGET), None, 100, 0.0, 0.002, 1.3, True)
    offered = (alive > 0).sum(1)
    np.testing.assert_array_equal(offered, wanted)
    assert LONGEST > offered[0] > offered[1]


def test_a_first_step_behind_history_reads_that_too():
    wanted = STEP.seconds(4, 4 + 30, 0) - STEP.seconds(4, 4, 0)
    assert wanted > 30 * 0.1 * STEP.per_row
    assert catching_up(prices(STEP), 4, 30) == pytest.approx(wanted)


def test_a_single_sequence_gains_what_its_best_draft_length_does():
    plain, context = TARGET.seconds(1, 1, 300), 300
    gains = [
        sum(0.9**j for j in range(k + 1)) * plain
        / (k * STEP.seconds(1, 1, context) + TARGET.seconds(1, k + 1, context))
        for k in range(LONGEST + 1)
    ]  # fmt: skip
    found = gain_alone(0.9, LONGEST, prices(TARGET), plain, prices(STEP), context)
    assert found == pytest.approx(max(gains)) and found > gains[1] > 1
    assert gain_alone(0.1, LONGEST, prices(TARGET), plain, prices(STEP), context) == 1.0


def test_drafts_grow_behind_history_as_far_as_there_is_room():
    lengths, before, room = np.array([5, 2, 4, 3]), np.array([1, 2, 0, 0]), np.array([16, 16, 6, 3])
    confidence, alive = np.array([0.5, 0.5, 0.9, 0.9]), powers(np.full(4, 0.7), np.full(4, LONGEST), LONGEST)
    pass_of = prices(TARGET)
    longer, own, reached, first, near, far = further(lengths, before, room, alive, None, 2, pass_of, 800)
    np.testing.assert_array_equal(own, [8, 0, 6, 3])
    np.testing.assert_array_equal(longer, before + own)
    np.testing.assert_array_equal(reached, np.ones(4))
    np.testing.assert_array_equal(first, [0.7, 0.0, 0.7, 0.7])
    least, planned, most = (4 + x.sum() for x in (before, lengths, longer))
    for found, fewer, more in ((near, least, planned), (far, planned, most)):
        slope = (TARGET.seconds(4, more, 800) - TARGET.seconds(4, fewer, 800)) / (more - fewer)
        assert found == pytest.approx(slope)
    assert far > near > 0
    put_behind(alive, confidence, before)
    _, _, reached, first, _, _ = further(lengths, before, room, alive, confidence, 2, pass_of, 800)
    np.testing.assert_allclose(reached, [0.5, 0.25, 1.0, 1.0])
    np.testing.assert_allclose(first, [0.7, 0.0, 0.7, 0.7])


def test_outlasting_counts_what_ran_longer(rng):
    finished, outputs = np.sort(rng.integers(1, 500, 300)).astype(float), rng.integers(0, 400, BATCH)
    allowed, tokens = rng.integers(1, 300, BATCH), np.array([0.0, 3.0, 50.0, 220.0])
    found = outlasting(finished, outputs, allowed, tokens, 0.5, 40.0, 1.0)
    for i in range(BATCH):
        scale, width = max(outputs[i], 40.0), 0.5 * allowed[i]
        for j, x in enumerate(tokens):
            ran_longer = (finished > outputs[i] + x).sum() + scale / (scale + x)
            limit = np.clip((allowed[i] + width - x) / (2 * width), 0, 1)
            assert found[i, j] == pytest.approx(limit * ran_longer / ((finished > outputs[i]).sum() + 1))


def test_the_one_that_runs_on_ends_last():
    alive = np.array([[1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.5, 0.0], [1.0, 0.9, 0.8, 0.0, 0.0]])
    last = ending_last(alive)
    done = 1 - 0.5 * (alive[:, :-1] + alive[:, 1:])
    wanted = [((alive[i, :-1] - alive[i, 1:]) * np.delete(done, i, 0).prod(0)).sum() for i in range(3)]
    np.testing.assert_allclose(last, np.array(wanted) / sum(wanted), atol=1e-9)
    assert last[1] > 0.7 > 0.3 > last[2] > last[0]


def test_loops_are_compiled_where_no_code_can_be_kept(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.compiled(len) == (len, {"error_model": "numpy"})


def test_a_policy_compiles_nothing_more_while_it_decides():
    """Compiling takes a second or so, which must not fall into a pass."""
    script = """
import numpy as np
from rollout_spec.policy import compiled
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.simulator import simulate
from rollout_spec.policy.workloads import SYNTHETIC

def signatures():
    return {n: len(f.signatures) for n, f in vars(compiled).items() if hasattr(f, "signatures")}

costs = CostModel({"target": PassCost(0, 1e-4, 1e-2, 1e-4, 0), "nf4": PassCost(0, 1e-4, 3e-3, 1e-4, 0)})
policy = AutomaticPolicy(costs)
compiled_by_then = signatures()
modes = set()
for workload in ("long_tail", "repeating"):
    trace = simulate(SYNTHETIC[workload](12), policy, costs)
    modes |= {step.mode for step in trace.steps}
assert {"plain", "nf4", "history"} <= modes, modes
assert signatures() == compiled_by_then, {n: (k, compiled_by_then[n]) for n, k in signatures().items()}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
