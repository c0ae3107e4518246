"""Attention over a paged cache, in every variant; `tests/engine/test_attention.py` tests it as the engine uses it."""

import math

import pytest
import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Rows of sequences of several lengths over shuffled blocks; each sees a stretch of its own."""

    def __init__(self, dtype, head_dim=64, heads=6, kv_heads=2, block_size=16, longest=150):
        self.first = torch.tensor([0, 0, 3, 16, 0, longest // 2, 0, 2])
        self.last = torch.tensor([1, 15, 16, 17, longest - 1, longest, 0, 3])
        self.sequences = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
        blocks = -(-longest // block_size)
        self.tables = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(1)).view(3, blocks)
        shape = (kv_heads, 3 * blocks, block_size, head_dim)
        self.keys, self.values = (gaussian(*shape, seed=s).to(dtype) for s in (2, 3))
        self.q = (2 * gaussian(8, heads, head_dim, seed=4)).to(dtype)

    def run(self, kernels, rows=slice(None)):
        arguments = (
            self.q[rows],
            self.keys,
            self.values,
            self.tables,
            self.sequences[rows],
            self.first[rows],
            self.last[rows],
        )
        return kernels.attention(*arguments)

    def exact(self):
        keys, values = (
            x[:, self.tables.flatten()].unflatten(1, self.tables.shape).double()
            for x in (self.keys, self.values)
        )
        out = torch.zeros(8, *self.q.shape[1:], dtype=torch.float64)
        group = self.q.shape[1] // len(keys)
        for row in range(8):
            line, seen = self.sequences[row], slice(self.first[row], self.last[row])
            for head in range(self.q.shape[1]):
                k, v = (x[head // group, line].flatten(0, 1)[seen] for x in (keys, values))
                if len(k):
                    scores = k @ self.q[row, head].double() / math.sqrt(k.shape[1])
                    out[row, head] = scores.softmax(0) @ v
        return out.flatten(1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"head_dim": 16, "heads": 4, "kv_heads": 4}, {"head_dim": 80}, {"head_dim": 128, "block_size": 64}],
    ids=str,
)
def test_it_agrees_with_float64(kernels, dtype, shape):
    case = Case(dtype, **shape)
    assert (case.run(kernels).double() - case.exact()).abs().max() < TOLERANCE[dtype]


def test_float32_sums_lose_little(kernels):
    """A trainer compares log-probabilities to 1e-5; one chain over the dimensions errs more than twice as much."""
    case = Case(torch.float32, head_dim=128)
    case.q *= 4
    assert (case.run(kernels).double() - case.exact()).square().mean().sqrt() < 3.2e-7


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_a_row_depends_on_nothing_beside_it(kernels, dtype, threads):
    case = Case(dtype, longest=400)
    together = case.run(kernels)
    for row in range(8):
        assert torch.equal(case.run(kernels, slice(row, row + 1)), together[row : row + 1])
    wider = Case(dtype, longest=400)
    wider.tables = torch.nn.functional.pad(wider.tables, (0, 7))
    assert torch.equal(wider.run(kernels), together)
    torch.set_num_threads(3 - threads)
    assert torch.equal(case.run(kernels), together)


@pytest.mark.parametrize(("heads", "longest"), [(4, 70), (20, 700)], ids=["short", "long"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_rows_of_one_sequence_may_be_computed_together(kernels, threads, dtype, heads, longest):
    """More of them than share a tile, which is smaller where contexts are long and heads many."""
    case = Case(dtype, heads=heads, longest=longest, head_dim=16)
    case.q = gaussian(29, heads, 16, seed=5).to(dtype)
    case.sequences = torch.tensor([0] * 21 + [2] * 8)
    case.last = longest - torch.arange(29).flip(0)
    case.first = torch.tensor([0, 3, 40, longest // 2]).repeat(8)[:29]
    case.first[10] = case.last[10]  # sees nothing
    together = case.run(kernels)
    assert together.isfinite().all() and not together[10].any()
    for row in range(29):
        assert torch.equal(case.run(kernels, slice(row, row + 1)), together[row : row + 1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_where_no_row_sees_anything_all_are_zero(kernels, dtype):
    case = Case(dtype)
    case.last = case.first
    assert not case.run(kernels).any()


def test_entries_that_a_row_does_not_see_are_not_read(kernels):
    case = Case(torch.float32)
    before = case.run(kernels, slice(4, 6))
    for entry in (case.last[5].item(), case.first[5].item() - 1):
        block, offset = case.tables[2, entry // 16], entry % 16
        case.keys[:, block, offset], case.values[:, block, offset] = math.nan, math.nan
    after = case.run(kernels, slice(4, 6))
    assert torch.equal(after[1], before[1])
    assert after[0].isnan().all()  # it sees the second of them


def test_large_scores_and_what_is_not_finite(kernels):
    case = Case(torch.float32)
    case.q *= 1e3
    assert case.run(kernels).isfinite().all()
    case.q[5, 0, 0] = math.inf
    found = case.run(kernels)
    assert not found[5, :64].isfinite().any()
    found[5, :64] = 0
    assert found.isfinite().all()


def test_entries_are_stored_where_they_belong(kernels):
    k, v = gaussian(5, 7, 16)[:, 2:5], gaussian(5, 3, 16, seed=1)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:15]
    keys, values = torch.zeros(3, 20, 1, 16), torch.zeros(3, 20, 1, 16)
    kernels.store_entries(k, v, rows, keys, values)
    assert torch.equal(keys.view(60, 16)[rows], k.reshape(15, 16)) and torch.equal(
        values.view(60, 16)[rows], v.reshape(15, 16)
    )
    assert keys.count_nonzero() == values.count_nonzero() == 15 * 16
