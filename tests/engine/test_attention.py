"""Attention over the paged cache: right within rounding, and to the bit independent of what it is computed with."""

import math
from dataclasses import replace

import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.policy.baselines import RandomLengths
from rollout_spec.torch_backend.attention import PagedAttention, Rows, padded_blocks
from rollout_spec.torch_backend.kv_cache import KVCache

from .conftest import DRAFTER

DTYPES = [torch.float32, torch.bfloat16]
# Largest error against float64 attention over the same (rounded) inputs, of outputs of size about 1. Scores reach
# about 10 and are rounded to the dtype, by 2^-24 or 2^-9 of their size: weights are off by 6e-7 or 2e-2 of theirs.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 6e-2}
SHAPES = [
    (group, head_dim, block) for group in (1, 2, 4, 8) for head_dim in (16, 64, 128) for block in (16, 64)
]


class Sequences:
    """Sequences of given lengths in one cache, in shuffled blocks, with their queries, keys and values."""

    def __init__(self, lengths, group=2, head_dim=16, block_size=16, dtype=torch.float32, kv_heads=2, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        counts = [-(-length // block_size) for length in lengths]
        self.cache = KVCache(1, sum(counts) + 3, kv_heads, block_size, head_dim, dtype, torch.device("cpu"))
        order = torch.randperm(sum(counts) + 3, generator=generator)
        self.blocks = order[: sum(counts)].split(counts)
        self.q = [normal(length, kv_heads * group, head_dim) * 2 for length in lengths]
        self.k = [normal(length, kv_heads, head_dim) for length in lengths]
        self.v = [normal(length, kv_heads, head_dim) for length in lengths]
        for row in range(len(lengths)):
            self.store(row, self.k[row], self.v[row], torch.arange(lengths[row]))

    def kv_rows(self, row, positions):
        size = self.cache.block_size
        return self.cache.rows(self.blocks[row][positions // size], positions % size)

    def store(self, row, k, v, positions):
        self.cache.store(0, self.kv_rows(row, positions), k, v)

    def rows(self, queries, extra_blocks=0):
        """Rows that are `queries`, one list of positions (all of one length) per (sequence, positions)."""
        count = padded_blocks(max(max(p) // self.cache.block_size + 1 for _, p in queries)) + extra_blocks
        tables = torch.full((len(queries), count), self.cache.scratch_block)
        for line, (row, positions) in enumerate(queries):
            own = self.blocks[row][: max(positions) // self.cache.block_size + 1]
            tables[line, : len(own)] = own
        positions = torch.tensor([p for _, p in queries])
        kv_rows = torch.cat([self.kv_rows(row, torch.tensor(p)) for row, p in queries])
        return Rows(kv_rows, tables, positions)

    def attend(self, queries, extra_blocks=0, drafting=False):
        """Outputs `[rows, heads * head_dim]`, row after row of `queries`."""
        q, k, v = (torch.cat([x[row][p] for row, p in queries]) for x in (self.q, self.k, self.v))
        return PagedAttention(self.cache, self.rows(queries, extra_blocks), drafting=drafting)(0, q, k, v)

    def reference(self, row, positions):
        """Float64 attention, written down naively."""
        q, k, v = (x[row].double() for x in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        outputs = []
        for position in positions:
            heads = []
            for head in range(q.shape[1]):
                keys, values = (x[: position + 1, head // group] for x in (k, v))
                weights = (keys @ q[position, head] / math.sqrt(q.shape[2])).softmax(0)
                heads.append(weights @ values)
            outputs.append(torch.cat(heads))
        return torch.stack(outputs)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine without this project's kernels."""
    monkeypatch.setattr(KVCache, "kernels", lambda self: None)


@pytest.fixture(params=["kernel", "fixed order", "stock"])
def drafting(request):
    """Every way to attend on a CPU; drafters on stock kernels take the function that CUDA takes for every model."""
    if request.param != "kernel":
        request.getfixturevalue("no_kernels")
    return request.param == "stock"


@pytest.fixture(params=["kernel", "fixed order"])
def exact(request):
    """The ways that keep rows apart to the bit."""
    if request.param != "kernel":
        request.getfixturevalue("no_kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("group", "head_dim", "block_size"), SHAPES)
def test_it_is_attention(group, head_dim, block_size, dtype, drafting):
    sequences = Sequences([1, 40, 130], group, head_dim, block_size, dtype)
    for queries in ([(2, [128, 129]), (1, [3, 4]), (1, [38, 39])], [(0, [0])], [(1, list(range(40)))]):
        found = sequences.attend(queries, drafting=drafting)
        assert found.dtype == dtype and found.shape == (
            len(queries) * len(queries[0][1]),
            2 * group * head_dim,
        )
        expected = torch.cat([sequences.reference(row, positions) for row, positions in queries])
        assert (found.double() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("group", "head_dim", "block_size"), SHAPES)
def test_a_row_does_not_depend_on_what_is_computed_with_it(group, head_dim, block_size, dtype, exact):
    """Not on the rows beside it (chunks, drafts), the sequences beside it, or how far the table is padded."""
    lengths = [5, 100, 64]
    sequences = Sequences(lengths, group, head_dim, block_size, dtype)
    probed = [sorted({0, 3, n // 3, n - 5, n - 4, n - 3, n - 2, n - 1}) for n in lengths]
    alone = [{p: sequences.attend([(row, [p])]) for p in probed[row]} for row in range(3)]
    for row, length in enumerate(lengths):
        for chunk in (2, 3, 33, length):
            for start in range(0, length, chunk):
                positions = list(range(start, min(start + chunk, length)))
                if not alone[row].keys() & set(positions):
                    continue
                found = sequences.attend([(row, positions)])
                for place, position in enumerate(positions):
                    if position in alone[row]:
                        assert torch.equal(found[place : place + 1], alone[row][position]), (
                            f"chunks of {chunk}"
                        )
        width = padded_blocks(-(-length // block_size))
        for extra in {padded_blocks(width + 1), padded_blocks(3 * width)}:
            found = sequences.attend([(row, [length - 1])], extra - width)
            assert torch.equal(found, alone[row][length - 1]), "padding"
    for width in (1, 2, 5):
        batch = [(row, list(range(n - width, n))) for row, n in enumerate(lengths)] * 2
        together = sequences.attend(batch).view(len(batch), width, -1)
        for line, (row, positions) in enumerate(batch):
            expected = torch.cat([alone[row][p] for p in positions])
            assert torch.equal(together[line], expected), f"{width} rows each"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_two_threads_give_the_bits_of_one(dtype, exact):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sequences = Sequences([300, 257, 19], 4, 64, 16, dtype)
        found.append(sequences.attend([(0, list(range(300)))]))
        found.append(sequences.attend([(0, [299]), (1, [256]), (2, [18])]))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_the_test_can_fail(no_kernels):
    """Stock attention, which promises nothing, does depend on the padding or the batch for some of these rows."""
    differing = 0
    for head_dim in (16, 64, 128):
        sequences = Sequences([5, 70, 150, 64], 2, head_dim, 16)
        for row, last in enumerate((4, 69, 149, 63)):
            alone = sequences.attend([(row, [last])], drafting=True)
            for extra in (1, 2, 5, 8):
                differing += not torch.equal(alone, sequences.attend([(row, [last])], extra, drafting=True))
            together = sequences.attend([(row, list(range(last + 1)))], drafting=True)
            differing += not torch.equal(alone, together[-1:])
    assert differing > 0


@pytest.mark.parametrize("count", [1, 3, 7])
def test_ragged_rows_and_padding_rows(count, drafting):
    """`scatter` places rows in the grid; rows past its end come back as zeros."""
    sequences = Sequences([20, 33])
    queries = [(0, [17, 18, 19]), (1, [30, 31, 32])]
    even = sequences.attend(queries, drafting=drafting)
    grid = sequences.rows(queries)
    place = torch.tensor([0, 1, 2, 3, 4, 5])[
        torch.randperm(6, generator=torch.Generator().manual_seed(count))
    ][:count]
    q, k, v = (torch.cat([x[0][17:], x[1][30:]]) for x in (sequences.q, sequences.k, sequences.v))
    pad = 2
    scratch = sequences.cache.rows(torch.full((pad,), sequences.cache.scratch_block), torch.arange(pad))
    kv_rows = torch.cat([grid.kv_rows.view(6, -1)[place].flatten(), scratch])
    scatter = torch.cat([place, torch.full((pad,), 6)])
    rows = Rows(kv_rows, grid.tables, grid.positions, scatter)
    fed = [torch.cat([x[place], torch.full_like(x[:pad], 3.0)]) for x in (q, k, v)]
    found = PagedAttention(sequences.cache, rows, drafting=drafting)(0, *fed)
    assert torch.equal(found[: len(place)], even[place]) and not found[len(place) :].any()
    unscattered = Rows(torch.cat([grid.kv_rows, scratch]), grid.tables, grid.positions)
    fed = [torch.cat([x, torch.full_like(x[:pad], 3.0)]) for x in (q, k, v)]
    found = PagedAttention(sequences.cache, unscattered, drafting=drafting)(0, *fed)
    assert torch.equal(found[:6], even) and not found[6:].any()


def test_a_sequence_may_see_less_than_its_beginning(drafting):
    """From `first` on, whatever lies before."""
    sequences = Sequences([60, 40], dtype=torch.float32)
    queries = [(0, [20, 59]), (1, [38, 39])]
    q, k, v = (torch.cat([x[row][p] for row, p in queries]) for x in (sequences.q, sequences.k, sequences.v))
    rows = replace(sequences.rows(queries), first=torch.tensor([17, 38]))
    found = PagedAttention(sequences.cache, rows, drafting=drafting)(0, q, k, v)
    for row, first in ((0, 17), (1, 38)):
        for x in (sequences.q, sequences.k, sequences.v):
            x[row] = x[row][first:]
    expected = torch.cat([sequences.reference(0, [3, 42]), sequences.reference(1, [0, 1])])
    assert (found.double() - expected).abs().max() < TOLERANCE[torch.float32]


def test_table_widths():
    widths = [padded_blocks(count) for count in range(1, 200)]
    assert all(width >= count for count, width in enumerate(widths, 1)) and widths == sorted(widths)
    assert set(widths) <= {2**i for i in range(10)} | {3 * 2**i for i in range(8)}
    assert all(width <= 1.5 * count + 1 for count, width in enumerate(widths, 1))


# --- what a drafter writes --------------------------------------------------------------------------------

JUNK = [math.nan, math.inf, -math.inf, 3e38, 1e20]
PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True)


def corrupt(engine, junk):
    """Every query, key and value that the drafter computes from now on is junk, of both signs."""

    def make(matmul):
        def bad(x):
            out = torch.full_like(matmul(x), junk)
            out[..., ::3] *= -1
            return out

        return bad

    for slot, linear in engine.backend.weights.drafter.linears.items():
        if slot.endswith("qkv"):
            linear.matmul = make(linear.matmul)


def corrupt_at_commit(engine, monkeypatch, junk):
    drafter = engine.backend.weights.drafter
    commit = drafter.commit

    def commit_junk(target, version):
        commit(target, version)
        corrupt(engine, junk)

    monkeypatch.setattr(drafter, "commit", commit_junk)


def raise_after_writing(engine, monkeypatch):
    drafter = engine.backend.weights.drafter
    propose = drafter.propose

    def fail(round):
        propose(round)
        raise ArithmeticError("the guest tripped")

    monkeypatch.setattr(drafter, "propose", fail)


def same_outputs(engine, plain, prompts):
    found, expected = (e.generate(prompts, PARAMS, request_ids=list("abcdef")) for e in (engine, plain))
    assert all(math.isfinite(logprob) for completion in found for logprob in completion.logprobs)
    if engine.backend.coupled:
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.logprobs for c in found] == [c.logprobs for c in expected]
    cache = engine.backend.cache
    assert torch.isfinite(cache.keys).all() and torch.isfinite(cache.values).all()


@pytest.fixture(scope="module")
def plain(make_engine):
    return make_engine(speculation="none", version=1)


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize("raises", [False, True], ids=["junk", "junk, then raises"])
@pytest.mark.parametrize("junk", JUNK)
def test_what_a_drafter_writes_into_the_cache_reaches_no_output(
    make_engine, plain, prompts, monkeypatch, junk, raises, verifier
):
    """A masked entry is still read (0 * NaN is NaN), so nothing of a drafter may outlive the pass it drafted for."""
    engine = make_engine(
        speculation={"drafter": DRAFTER, "verifier": verifier, "canary": False}, max_num_seqs=4, version=1
    )
    engine.backend.policy = RandomLengths(1, longest=6, off=0)
    corrupt(engine, junk)
    if raises:
        raise_after_writing(engine, monkeypatch)
    same_outputs(engine, plain, prompts)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_what_the_canary_writes_reaches_no_output(
    make_engine, model, plain, prompts, monkeypatch, junk, length
):
    """The canary runs the drafter over whole contexts, short ones with padding rows, which go to the sink block."""
    engine = make_engine(speculation=DRAFTER, max_num_seqs=4)
    corrupt_at_commit(engine, monkeypatch, junk)
    engine.generate([[3] * length] * 4, SamplingParams(max_tokens=1))
    engine.update_weights(model.named_parameters())
    cache = engine.backend.cache
    assert torch.isfinite(cache.keys[:, :, : cache.sink_block]).all() and engine.backend.guard.contexts
    same_outputs(engine, plain, prompts)
