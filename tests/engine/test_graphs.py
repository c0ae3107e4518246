"""The graph pool: what it returns is what the program returns without it, whatever it pads.

On a CPU plain calls stand in for graphs; with a GPU, everything runs on captured ones, too.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from rollout_spec.drafters.base import DraftRound
from rollout_spec.policy.graph_plan import (
    DECODE,
    DRAFT,
    VERIFY,
    GraphCost,
    GraphPlan,
    Kind,
    ModelShape,
    plan_graphs,
    strategies,
)
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.verify import verify_coupled
from rollout_spec.torch_backend.graphs import (
    BLOCK_INPUTS,
    Field,
    GraphPool,
    Program,
    StaticBuffer,
    block_fields,
    block_inputs,
    block_of,
    target_program,
)
from rollout_spec.torch_backend.slots import Slots

SHAPE = ModelShape(2, 64, 96, 4, 2, 16, 64, itemsize=4)
COST = GraphCost(SHAPE, SHAPE, context=256)
BUCKETS = {Kind(DECODE, 1): (2, 8), Kind(DRAFT, 3): (2, 4), Kind(VERIFY, 4): (2, 4), Kind(VERIFY, 6): (1,)}
PLAN = GraphPlan(BUCKETS, COST, 10**9, 0.0)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    return torch.device(request.param)


SUMS = {"x": Field((3,), torch.float32, per_row=True, pad=-1.0), "y": Field((), torch.int64, pad=7)}


class Sums:
    """A program on numbers: x [B, S, <= 3] and y [B] to x's sums over the last dim, weighted, and y + 1."""

    def __init__(self, eager_because=None):
        self.eager_because, self.shapes = eager_because, []

    def build(self, kind):
        def compute(inputs):
            x, y = inputs["x"], inputs["y"]
            self.shapes.append(tuple(x.shape))
            return (x.clamp_min(0).sum(-1) * 2, y + 1)

        because = self.eager_because if kind.mode == DRAFT else None
        return Program(("x", "y"), compute, (True, False), because)

    @staticmethod
    def inputs(batch, width, device, columns=3):
        generator = torch.Generator().manual_seed(batch * 100 + width)
        x = torch.rand(batch, width, columns, generator=generator)
        return {"x": x.to(device), "y": torch.arange(batch, device=device)}


@pytest.fixture
def pool_of(device):
    def make(program, plan=PLAN, capture=True):
        pool = GraphPool(plan, SUMS, program.build, device)
        if capture:
            pool.capture()
        return pool

    return make


def test_every_size_gives_what_the_program_gives(pool_of, device):
    program = Sums()
    pool = pool_of(program)
    for mode, width, batch in [
        (m, w, b) for m in (DECODE, DRAFT, VERIFY) for w in range(1, 8) for b in range(1, 11)
    ]:
        inputs = Sums.inputs(batch, width, device, columns=1 + batch % 3)
        sums, following = pool.run(mode, batch, width, inputs)
        assert torch.equal(sums, inputs["x"].sum(-1) * 2) and torch.equal(following, inputs["y"] + 1)
    expected = Counter(
        "graph" if PLAN.graph(mode, batch, width) else "no graph of this size"
        for mode in (DECODE, DRAFT, VERIFY) for width in range(1, 8) for batch in range(1, 11)
    )  # fmt: skip
    assert pool.counts == expected and min(expected.values()) > 20


def test_only_planned_shapes_are_computed(pool_of):
    program = Sums()
    pool = pool_of(program)
    planned = {(size, kind.width, 3) for kind, sizes in BUCKETS.items() for size in sizes}
    assert set(program.shapes) == planned
    program.shapes.clear()
    pool.run(VERIFY, 3, 2, Sums.inputs(3, 2, pool.device))
    assert set(program.shapes) <= {(4, 4, 3)}


def test_captured_from_the_largest_to_the_smallest(pool_of):
    report = pool_of(Sums(), capture=False).capture()
    sizes = [COST.scratch(one.graph) for one in report.captured]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 7
    assert report.nbytes > 0 and "7 graphs" in str(report)


def test_more_memory_than_the_budget_is_reported(pool_of, caplog):
    pool = pool_of(Sums(), GraphPlan(BUCKETS, COST, budget_bytes=10, waste=0.0), capture=False)
    assert pool.capture().nbytes > 10
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_cannot_be_captured_runs_eagerly_and_says_why(pool_of, device):
    program = Sums(eager_because="reads a count back")
    pool = pool_of(program, capture=False)
    report = pool.capture()
    assert report.eager == {Kind(DRAFT, 3): "reads a count back"}
    assert not [one for one in report.captured if one.graph.kind.mode == DRAFT]
    inputs = Sums.inputs(2, 3, device)
    assert torch.equal(pool.run(DRAFT, 2, 3, inputs)[0], inputs["x"].sum(-1) * 2)
    pool.run(VERIFY, 1, 1, Sums.inputs(1, 1, device, columns=4))
    pool.release()
    pool.run(DECODE, 1, 1, Sums.inputs(1, 1, device))
    assert pool.counts == {"reads a count back": 1, "x larger than captured": 1, "not captured": 1}
    pool.capture()
    pool.run(DECODE, 1, 1, Sums.inputs(1, 1, device))
    assert pool.counts["graph"] == 1


@pytest.mark.parametrize("broken", ["raises", "differs"])
def test_a_graph_that_is_not_the_pass_is_not_used(pool_of, device, monkeypatch, caplog, broken):
    """The replay of one size does not do what the program does, or it cannot be recorded: this one is eager."""
    pool = pool_of(program := Sums(), capture=False)
    bind = pool._bind

    def bind_badly(graph, program):
        compute = bind(graph, program)
        if (graph.kind.mode, graph.batch) != (DRAFT, 4):
            return compute
        if broken == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: pool._outputs_of(graph, program)[0].fill_(3.25)

    monkeypatch.setattr(pool, "_bind", bind_badly)
    report = pool.capture()
    pool.capture()
    reason = "RuntimeError: operation not permitted" if broken == "raises" else "output 0 of a replay"
    assert report.eager.keys() == {Kind(DRAFT, 3)} and report.eager[Kind(DRAFT, 3)].startswith(reason)
    assert len([record for record in caplog.records if "run eagerly" in record.message]) == 1
    assert pool.fitting(DRAFT, 2, 3) and not pool.fitting(DRAFT, 3, 3) and not pool.fitting(DRAFT, 9, 3)
    inputs = Sums.inputs(4, 3, device)
    assert torch.equal(pool.run(DRAFT, 4, 3, inputs)[0], program.build(Kind(DRAFT, 3)).compute(inputs)[0])
    assert pool.counts == {"not captured": 1}


def test_inputs_that_the_program_does_not_read(pool_of, device):
    inputs = Sums.inputs(1, 1, device)
    with pytest.raises(ValueError, match=r"reads \['x', 'y'\], not \['x'\]"):
        pool_of(Sums()).run(DECODE, 1, 1, {"x": inputs["x"]})


def test_all_shapes_share_one_piece_of_memory(device):
    buffer = StaticBuffer(Field((5,), torch.int64, per_row=True, pad=9), batch=4, rows=6, device=device)
    views = [buffer.view(*shape) for shape in ((2, 3), (6, 1), (1, 6), (1, 1))]
    assert len({view.data_ptr() for view in views}) == 1 and buffer.nbytes == 6 * 5 * 8
    buffer.fill(views[0], torch.ones(1, 2, 4, dtype=torch.int64, device=device))
    assert views[0].sum() == 8 + 9 * (30 - 8) and views[0][0, :2, :4].eq(1).all()


# --- a real decoder --------------------------------------------------------------------------------------


class Decoding:
    """Sequences in an engine's cache, all but their last token computed."""

    def __init__(self, engine, lengths):
        backend = engine.backend
        self.runner, self.drafter, cache = backend.runner, backend.weights.drafter, backend.cache
        self.device, self.cache = backend.device, cache
        self.slots = Slots(len(lengths), backend.max_model_len, cache.block_size, cache.scratch_block)
        generator = np.random.default_rng(0)
        for slot, length in enumerate(lengths):
            tokens = generator.integers(0, 61, length)
            blocks = backend.pool.allocate(-(-(length + 8) // cache.block_size))
            self.slots.tokens[slot, :length], self.slots.length[slot] = tokens, length
            self.slots.tables[slot, : len(blocks)] = blocks
            if length > 1:
                self.runner.score(self.runner.target, tokens[:-1], blocks)

    def block(self, draft_lengths):
        lengths = np.asarray(draft_lengths)
        return self.runner.block(self.slots, np.arange(len(lengths)), lengths)

    def keys(self, block):
        base = torch.arange(len(block.last_tokens), device=self.device) * 1_000_003
        return row_keys(base, 1, block.positions + 1)

    def draft_program(self, kind):
        """The whole loop, with sampling: coupled drafts from the raw distribution."""

        def compute(inputs):
            block = block_of(inputs)
            round = self.round(block, inputs["keys"], kind.width)
            proposal = self.drafter.propose(round)
            return torch.cat(proposal.tokens, 1), proposal.healthy.expand(len(block.last_tokens))

        return Program((*BLOCK_INPUTS, "keys"), compute, (True, False))

    def round(self, block, keys, steps):
        def forward(model, tokens, step):
            return self.runner.forward(
                model, block, block.last_tokens[:, None] if tokens is None else tokens, step
            )

        return DraftRound(
            active=(len(block.last_tokens),) * steps,
            coupled=True,
            forward=forward,
            process=lambda logits, step, drafted: logits,
            keys=lambda step: keys[:, step : step + 1],
        )

    def pool(self, plan):
        fields = block_fields(self.cache, self.slots.tables.shape[1]) | {
            "tokens": Field((), torch.int64, per_row=True),
            "keys": Field((), torch.int64, per_row=True),
        }
        build = lambda kind: self.draft_program(kind) if kind.mode == DRAFT else target_program(self.runner)  # noqa: E731
        pool = GraphPool(plan, fields, build, self.device)
        pool.capture()
        return pool


@pytest.fixture
def decoding(make_engine, device):
    engine = make_engine(device=str(device), max_num_seqs=8)
    with torch.inference_mode():
        yield Decoding(engine, [5, 40, 17, 1, 90, 33])


def same(found, expected):
    """On a CPU to the bit: a row depends on nothing that is computed beside it."""
    return (
        torch.equal(found, expected)
        if found.device.type == "cpu"
        else torch.allclose(found, expected, atol=1e-4)
    )


@pytest.mark.parametrize("drafts", [[0, 0, 0], [0] * 6, [3, 1, 0, 2], [3, 3], [5], [4, 0]], ids=str)
def test_the_target_gives_the_logits_it_gives_eagerly(decoding, drafts):
    block = decoding.block(drafts)
    batch, width = block.shape
    tokens = torch.randint(0, 61, (batch, width), device=decoding.device)
    tokens[:, 0] = block.last_tokens
    inside = torch.arange(width, device=decoding.device) <= block.draft_lengths[:, None]
    expected = decoding.runner.forward(decoding.runner.target, block, tokens)
    written = decoding.cache.keys[:, :, :-1].clone(), decoding.cache.values[:, :, :-1].clone()

    pool = decoding.pool(PLAN)
    inputs = {"tokens": tokens, **block_inputs(block)}
    (found,) = pool.run(VERIFY if width > 1 else DECODE, batch, width, inputs)
    assert found.shape == expected.shape and same(found[inside], expected[inside])
    assert pool.counts["graph"] == (drafts != [4, 0])
    for cache, before in zip((decoding.cache.keys, decoding.cache.values), written):
        assert same(cache[:, :, :-1], before), "padding was written into a sequence's blocks"
        assert cache.isfinite().all()


def test_padding_reads_no_other_sequence(decoding):
    """One that has turned to NaN would reach the scratch block, which everybody reads behind a mask."""
    block = decoding.block([1, 3, 2])
    tokens = torch.randint(0, 61, (3, 4), device=decoding.device)
    inputs = {"tokens": tokens, **block_inputs(block)}
    pool = decoding.pool(PLAN)
    expected = pool.run(VERIFY, 3, 4, inputs)[0].clone()
    others = np.setdiff1d(np.arange(decoding.cache.num_blocks), block.tables.cpu())
    assert 0 in others
    for cache in (decoding.cache.keys, decoding.cache.values):
        cache[:, :, others] = torch.nan
    assert torch.equal(pool.run(VERIFY, 3, 4, inputs)[0], expected)
    assert decoding.cache.keys[:, :, -1].isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_whole_draft_loop_proposes_what_it_proposes_eagerly(decoding, batch, steps):
    block = decoding.block([steps] * batch)
    keys = decoding.keys(block)
    eager = decoding.drafter.propose(decoding.round(block, keys, steps))
    pool = decoding.pool(PLAN)
    inputs = {"keys": keys[:, :steps], **block_inputs(block, steps)}
    tokens, healthy = pool.run(DRAFT, batch, steps, inputs)
    assert torch.equal(tokens, torch.cat(eager.tokens, 1)) and healthy.all() and healthy.shape == (batch,)
    assert pool.counts == {"graph": 1}


def test_a_rollout_on_graphs_is_the_rollout_without(decoding):
    """Draft, verify, append, with lengths and batches that change: every pass on a planned pool."""
    demand = {(batch, width): 1.0 for batch in range(1, 7) for width in (1, 3, 4)}
    budget = COST.nbytes(graph for graph in PLAN.graphs) * 2
    plan = plan_graphs(strategies([2, 3]), 6, demand, COST, budget)
    pool, slots, emitted = decoding.pool(plan), decoding.slots, {False: [], True: []}
    start = slots.length.copy()
    for graphs in (False, True):
        slots.length[:] = start
        for step, (live, k) in enumerate([(6, 3), (6, 2), (5, 0), (4, 3), (2, 1), (1, 3)]):
            block = decoding.block([min(k, 1 + row % 3) if k else 0 for row in range(live)])
            keys, width = decoding.keys(block), block.shape[1]
            drafts = None
            if width > 1 and graphs:
                inputs = {"keys": keys[:, : width - 1], **block_inputs(block, width - 1)}
                drafts = pool.run(DRAFT, live, width - 1, inputs)[0]
            elif width > 1:
                round = decoding.round(block, keys, width - 1)
                drafts = torch.cat(decoding.drafter.propose(round).tokens, 1)
            tokens = (
                block.last_tokens[:, None]
                if drafts is None
                else torch.cat((block.last_tokens[:, None], drafts), 1)
            )
            if graphs:
                inputs = {"tokens": tokens, **block_inputs(block)}
                logits = pool.run(VERIFY if width > 1 else DECODE, live, width, inputs)[0]
            else:
                logits = decoding.runner.forward(decoding.runner.target, block, tokens)
            verdict = verify_coupled(logits, drafts, block.draft_lengths, keys)
            for row in range(live):
                count, at = int(verdict.emitted[row]), int(slots.length[row])
                slots.tokens[row, at : at + count] = verdict.tokens[row, :count].cpu().numpy()
                slots.length[row] += count
                emitted[graphs].append((step, row, verdict.tokens[row, :count].tolist()))
    assert emitted[True] == emitted[False]
    assert pool.counts["graph"] > 8 and any(len(tokens) > 1 for *_, tokens in emitted[True])
