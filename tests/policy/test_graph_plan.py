"""Graph plans: the bytes they predict, the padding they leave, and what a step replays."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_spec.policy.graph_plan import (
    DECODE,
    DRAFT,
    VERIFY,
    Graph,
    GraphCost,
    GraphPlan,
    Kind,
    ModelShape,
    demand_of,
    plan_graphs,
    strategies,
    vllm_capture_sizes,
)
from rollout_spec.policy.records import Trace, TraceStep

QWEN_7B = ModelShape(28, 3584, 18944, 28, 4, 128, 152064)
EAGLE_7B = ModelShape(1, 3584, 18944, 28, 4, 128, 152064)
TINY = GraphCost(ModelShape(2, 8, 16, 2, 1, 4, 64), ModelShape(1, 8, 16, 2, 1, 4, 64), node_bytes=1000)

# What SGLang captures with speculative decoding (server_args.py), the engine that TLT builds upon.
SGLANG = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8)]
# Our reading of TLT's four strategies: 8, 16, 32 or 64 tokens verified per sequence; our drafts being chains, that is
# K = 7 .. 63 steps of a one-layer drafter. TLT speculates below 33 sequences.
WIDTHS, THRESHOLD = (8, 16, 32, 64), 32


def expected_waste(plan_or_buckets, demand, cost, max_batch):
    """Padding rows per pass, pass by pass; None of a kind's sizes fits: eager."""
    total, waste = sum(demand.values()), 0.0
    for (batch, width), passes in demand.items():
        needs = [(Kind(DECODE, 1), 1.0 if width == 1 else 0.05)]
        for mode, rows in ((DRAFT, width - 1), (VERIFY, width)):
            wide = sorted(k for k in plan_or_buckets if k.mode == mode and width > 1 and k.width >= rows)
            needs += [(kind, 1.0) for kind in wide[:1]]
        for kind, part in needs:
            fitting = [size for size in plan_or_buckets[kind] if size >= batch]
            rows = (min(fitting) - batch) * kind.width if fitting else cost.kernels(kind) * cost.node_rows
            waste += passes / total * part * rows
    return waste


def tail_demand(max_batch=256):
    """A rollout's long tail, B seen 1 / B of the time; below the threshold the wider the fewer, and some exploring."""
    demand = {}
    for batch in range(1, max_batch + 1):
        best = 8 if batch > 16 else 16 if batch > 8 else 32 if batch > 2 else 64
        for width in WIDTHS if batch <= THRESHOLD else ():
            demand[batch, width] = (0.85 if width == best else 0.05) / batch
        if batch > THRESHOLD:
            demand[batch, 1] = 1 / batch
    return demand


def test_bytes_of_a_7b_graph():
    cost = GraphCost(QWEN_7B, QWEN_7B)
    row = (
        2 * 3584 + 152064 * 2 + 152064 * 4 * 3
    )  # hidden, bf16 logits, three of float32: wider than any layer
    assert max(2 * (3584 + 2 * 18944 + 18944), 2 * (3584 + 36 * 128 + 32 * 128 + 28 * 128)) < row
    verify, draft = Graph(Kind(VERIFY, 8), 16), Graph(Kind(DRAFT, 7), 16)
    assert cost.scratch(verify) == 128 * row
    assert cost.scratch(draft) == 16 * row  # its steps reuse one another's
    assert cost.kernels(verify.kind) == 28 * 24 + 48
    assert cost.kernels(draft.kind) == 7 * (28 * 24 + 48)
    graphs = [verify, draft, Graph(Kind(VERIFY, 4), 16), Graph(Kind(DECODE, 1), 256)]
    kernels = (1 + 7 + 1 + 1) * 720
    outputs = (128 + 16 * 7 + 256) * 40
    inputs = 256 * 8 * 7 + 256 * 128
    assert cost.nbytes(graphs) == 256 * row + kernels * 8192 + outputs + inputs
    assert cost.nbytes([]) == 0


def test_bytes_where_attention_gathers_and_rejection_sampling_keeps_the_drafts_logits():
    shape = ModelShape(28, 3584, 18944, 28, 4, 128, 1024)
    plain = GraphCost(shape, shape)
    gathers = GraphCost(shape, shape, context=2048)
    graph = Graph(Kind(VERIFY, 8), 16)
    keys_values = 2 * 16 * 2048 * 4 * 128 * 2
    mask = 128 * 2048 * 4 * (1 + 7)  # itself, and once for every query head of a group
    assert gathers.scratch(graph) - plain.scratch(graph) == keys_values + mask
    rejects = GraphCost(shape, shape, logit_outputs=frozenset({DRAFT}))
    draft = Graph(Kind(DRAFT, 7), 16)
    q = 16 * 7 * 1024 * 4
    assert rejects.nbytes([draft]) - plain.nbytes([draft]) == 3 * q  # a list, its concatenation, the output
    assert rejects.nbytes([graph]) == plain.nbytes([graph])


@pytest.mark.parametrize("share", ["flat", "tail", "gaps"])
def test_the_best_sizes_of_one_kind(share):
    """Against every subset of sizes, of every count."""
    most = 9
    demand = {
        (batch, 1): {"flat": 1.0, "tail": 1 / batch, "gaps": float(batch in (2, 3, 7))}[share]
        for batch in range(1, most + 1)
    }
    demand = {key: passes for key, passes in demand.items() if passes}
    one = TINY.kernels(Kind(DECODE, 1)) * TINY.node_bytes
    base = TINY.nbytes([Graph(Kind(DECODE, 1), most)])
    for count in range(1, most + 1):
        plan = plan_graphs([], most, demand, TINY, base + (count - 1) * one)
        best = min(
            expected_waste({Kind(DECODE, 1): (*sizes, most)}, demand, TINY, most)
            for n in range(count)
            for sizes in combinations(range(1, most), n)
        )
        assert plan.waste == pytest.approx(best)
        assert plan.waste == pytest.approx(expected_waste(plan.buckets, demand, TINY, most))


def test_whole_plans_against_every_plan():
    """At most one graph's bytes short of the best of all plans."""
    most, kinds = 4, sorted(strategies([2]))
    demand = {(b, w): p for (b, w), p in zip(product(range(1, most + 1), (1, 3)), (1, 9, 2, 5, 3, 3, 4, 1))}
    subsets = [sizes for n in range(most + 1) for sizes in combinations(range(1, most + 1), n)]
    every = []
    for chosen in product(subsets, repeat=len(kinds)):
        buckets = dict(zip(kinds, chosen))
        if most in buckets[Kind(DECODE, 1)]:
            nbytes = TINY.nbytes(Graph(kind, size) for kind, sizes in buckets.items() for size in sizes)
            every.append((nbytes, expected_waste(buckets, demand, TINY, most)))
    largest = max(TINY.kernels(kind) for kind in kinds) * TINY.node_bytes
    low = min(nbytes for nbytes, _ in every)
    exact = 0
    budgets = range(low, max(nbytes for nbytes, _ in every) + largest, largest // 7)
    for budget in budgets:
        plan = plan_graphs(kinds, most, demand, TINY, budget)
        best = min(waste for nbytes, waste in every if nbytes <= budget)
        assert plan.waste == pytest.approx(expected_waste(plan.buckets, demand, TINY, most))
        assert plan.waste >= best - 1e-9
        exact += plan.waste <= best + 1e-9
        if budget - largest >= low:
            assert plan.waste <= min(waste for nbytes, waste in every if nbytes <= budget - largest) + 1e-9
    assert exact > len(budgets) / 2


demands = st.dictionaries(
    st.tuples(st.integers(1, 24), st.integers(1, 9)), st.floats(0.01, 100), min_size=1, max_size=30
)


@given(demand=demands, draft_lengths=st.sets(st.integers(1, 8), max_size=3), budgets=st.data())
def test_under_budget_and_never_worse_with_more(demand, draft_lengths, budgets):
    kinds = strategies(draft_lengths)
    smallest = TINY.nbytes([Graph(Kind(DECODE, 1), 24)])
    before = float("inf")
    for budget in sorted(
        budgets.draw(st.lists(st.integers(smallest, 60 * smallest), min_size=1, max_size=5))
    ):
        plan = plan_graphs(kinds, 24, demand, TINY, budget)
        assert plan.nbytes == TINY.nbytes(plan.graphs) <= budget
        assert plan.waste <= before + 1e-9
        assert plan.waste == pytest.approx(expected_waste(plan.buckets, demand, TINY, 24))
        assert plan.buckets[Kind(DECODE, 1)][-1] == 24
        assert plan == plan_graphs(sorted(kinds), 24, demand, TINY, budget)
        before = plan.waste


def test_a_budget_too_small_says_what_is_needed():
    smallest = TINY.nbytes([Graph(Kind(DECODE, 1), 24)])
    with pytest.raises(ValueError, match=rf"plainly takes {smallest} bytes; raise the budget"):
        plan_graphs(strategies([3]), 24, {(1, 1): 1.0}, TINY, smallest - 1)
    assert plan_graphs(strategies([3]), 24, {(1, 4): 1.0}, TINY, smallest).nbytes == smallest
    with pytest.raises(ValueError, match="demand for 25 sequences"):
        plan_graphs([], 24, {(25, 1): 1.0}, TINY, smallest)


def test_every_step_finds_the_smallest_graph_that_holds_it():
    demand = {(batch, width): 1 / batch for batch in range(1, 17) for width in (1, 4, 6)}
    plan = plan_graphs(strategies([3, 5]), 20, demand, TINY, 3_000_000)
    assert all(plan.buckets.values())
    eager = 0
    for mode, batch, width in product((DECODE, DRAFT, VERIFY), range(1, 25), range(1, 9)):
        fitting = [
            g for g in plan.graphs if g.kind.mode == mode and g.batch >= batch and g.kind.width >= width
        ]
        found = plan.graph(mode, batch, width)
        eager += found is None
        if not fitting:
            assert found is None
        elif mode == DRAFT:
            assert (found.kind.width, found.batch) == min((g.kind.width, g.batch) for g in fitting)
        else:
            assert found.rows == min(g.rows for g in fitting)
    assert eager and plan.graph(DECODE, 20, 1) == Graph(Kind(DECODE, 1), 20) and not plan.graph(DECODE, 21, 1)
    assert plan.graph(VERIFY, 1, 7) is None and plan.graph(VERIFY, 2, 5).kind.width == 6


def test_graphs_come_largest_first():
    plan = plan_graphs(strategies([3, 5]), 20, {(4, 4): 1.0, (9, 6): 1.0, (20, 1): 1.0}, TINY, 10**7)
    sizes = [TINY.scratch(graph) for graph in plan.graphs]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == sum(map(len, plan.buckets.values()))


@pytest.mark.parametrize("drafter", [EAGLE_7B, QWEN_7B], ids=["one layer", "self"])
def test_a_third_of_the_memory_of_capturing_everything(drafter):
    cost, kinds, demand = GraphCost(QWEN_7B, drafter), strategies(w - 1 for w in WIDTHS), tail_demand()

    def everything(sizes, most=256):
        return {kind: [b for b in sizes if kind.mode == DECODE or b <= most] for kind in kinds}

    for naive in (everything(SGLANG), everything(range(1, 257)), everything(SGLANG, THRESHOLD)):
        taken = cost.nbytes(Graph(kind, size) for kind, sizes in naive.items() for size in sizes)
        budget = int(taken / 2.5)
        plan = plan_graphs(kinds, 256, demand, cost, budget)
        assert plan.nbytes <= budget
        # A pass over one row reads all weights, which takes as long as computing about 180.
        assert plan.waste < 15 + expected_waste(naive, demand, cost, 256)
        nothing = GraphPlan(dict.fromkeys(kinds, ()), cost, 0, 0.0)
        assert plan.waste < expected_waste(nothing.buckets, demand, cost, 256) / 20


def test_no_larger_than_what_tlt_reports():
    """10.69 GB for four strategies, against 30.39 naively."""
    cost = GraphCost(QWEN_7B, EAGLE_7B)
    plan = plan_graphs(strategies(w - 1 for w in WIDTHS), 256, tail_demand(), cost, 10_690_000_000)
    assert plan.nbytes <= 10_690_000_000 and plan.waste < 9
    assert all(plan.graph(VERIFY, 1, width) and plan.graph(DRAFT, 1, width - 1) for width in WIDTHS)


def test_capture_sizes_for_vllm_keep_the_shapes_of_verification():
    plan = plan_graphs(strategies([6]), 6, {(b, 7): 1.0 for b in range(1, 7)}, TINY, 10**7)
    sizes = vllm_capture_sizes(plan)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 7 * 6
    assert {7 * batch for batch in range(1, 7)} | {6} <= set(sizes)


def test_demand_of_a_recorded_rollout():
    def step(batch, longest):
        return TraceStep(0, 0.0, batch, 9, "plain", 0, 0, batch, longest, 0.0, 0.0, "off", 1.0)

    assert demand_of(Trace({}, (step(3, 0), step(3, 0), step(2, 5)))) == {(3, 1): 2, (2, 6): 1}


def test_the_table_names_every_kind_and_the_sum():
    plan = plan_graphs(strategies([3]), 8, {(8, 1): 1.0}, TINY, 10**6)
    lines = plan.table().splitlines()
    assert lines[0].split() == ["mode", "width", "graphs", "kernels", "nodes", "scratch", "batch", "sizes"]
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["decode", "1", "1"],
        ["draft", "3", "0"],
        ["verify", "4", "0"],
    ]
    assert lines[2].endswith("none (eager)") and lines[-1].endswith("MiB, 1 graphs")
