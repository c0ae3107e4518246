"""A token's logits do not depend on how many rows are computed with it, where chunks end, or on the batch.

`tests/models/test_row_invariance.py` shows it for the decoder without attention; here everything runs, on the
shipped policy. The linears of its expanded copies are tested alone. Every count from 1 to 600 takes minutes and is under
`pytest -m slow`; by default, each dtype and number of threads takes all small counts and another quarter of the rest.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from rollout_spec import RolloutEngine
from rollout_spec.models.linear import make_linear

POLICY = Path(__file__).parents[2] / "examples" / "arithmetic" / "policy"
ROWS = 600
DTYPES = ["float32", "bfloat16"]
EXPANDED = {  # (N, K) of the 100m and 300m copies: qkv, o, gate_up, down, lm_head
    "100m": [(1280, 640), (640, 640), (3584, 640), (640, 1792), (32000, 640)],
    "300m": [(1536, 1024), (1024, 1024), (5120, 1024), (1024, 2560), (32000, 1024)],
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=DTYPES)
def engine(request):
    options = {"dtype": request.param, "max_model_len": 1024, "speculation": {"drafter": "none"}}
    return RolloutEngine.from_pretrained(POLICY, **options)


def rows_that_differ(engine, counts):
    """Rows T-M .. T recomputed over the cached rest, for every M: M is also the place where a chunk begins."""
    runner, pool = engine.backend.runner, engine.backend.pool
    tokens = np.random.default_rng(0).integers(0, engine.backend.spec.vocab_size, ROWS + 40)
    blocks = pool.allocate(-(-len(tokens) // engine.config.block_size))
    whole = runner.score(runner.target, tokens, blocks)
    different = []
    for rows in counts:
        part = runner.score(runner.target, tokens, blocks, len(tokens) - rows)
        if not torch.equal(part, whole[-rows:]):
            different.append(rows)
    pool.free(blocks)
    return different


@torch.inference_mode()
def test_numbers_of_rows_and_chunk_boundaries(engine, threads):
    quarter = 2 * DTYPES.index(engine.config.dtype) + threads - 1
    assert not rows_that_differ(engine, [*range(1, 33), *range(33 + quarter, ROWS + 1, 4)])


@pytest.mark.slow
@torch.inference_mode()
def test_every_number_of_rows_and_every_chunk_boundary(engine, threads):
    assert not rows_that_differ(engine, range(1, ROWS + 1))


@torch.inference_mode()
def test_the_probe_sees_a_kernel_that_is_not_invariant(engine, monkeypatch):
    from rollout_spec.torch_backend.probe import row_invariance

    backend = engine.backend
    assert row_invariance(backend.runner, backend.pool, backend.max_model_len)

    def depends_on_the_batch(self, x):
        return torch.nn.functional.linear(x, self.dense(), self.bias) * (1 + 0.02 * (len(x) > 8))

    kind = type(backend.weights.target.weights.lm_head)
    monkeypatch.setattr(kind, "__call__", depends_on_the_batch)
    assert not row_invariance(backend.runner, backend.pool, backend.max_model_len)


def check_linear(shape, dtype, counts):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(getattr(torch, dtype)) * shape[1] ** -0.5
    linear, x = make_linear(weight), torch.randn(ROWS, shape[1]).to(weight.dtype)
    whole = linear(x)
    return [rows for rows in counts if not torch.equal(linear(x[:rows]), whole[:rows])]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", EXPANDED)
def test_linears_of_the_expanded_policies(size, dtype, threads):
    for shape in EXPANDED[size]:
        head = shape[0] == 32000
        assert not check_linear(
            shape, dtype, (1, 4, 9, 33) if head else [*range(1, 34), *range(34, 600, 47)]
        ), shape


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", EXPANDED)
def test_linears_of_the_expanded_policies_at_every_number_of_rows(size, dtype, threads):
    for shape in EXPANDED[size]:
        assert not check_linear(shape, dtype, range(1, ROWS + 1)), shape
