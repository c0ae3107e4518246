"""Norms, rotation and the gated activation: torch's operations to the last bit or next to it, row by row."""

import pytest
import torch

from rollout_spec.models import elementwise
from rollout_spec.models.rope import rotate

DTYPES = [torch.float32, torch.bfloat16]
STEP = {torch.float32: 3e-6, torch.bfloat16: 2**-7}  # a rounding step or two, relative


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agree(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    step = STEP[found.dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    assert (found != expected).float().mean() < (0.02 if found.dtype == torch.bfloat16 else 1)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("size", [7, 64, 100, 1024])
def test_rms_norm(kernels, dtype, size):
    x, weight = 3 * gaussian(40, size, dtype=dtype), 1 + gaussian(size, seed=1, dtype=dtype)
    expected = torch.rms_norm(x, (size,), None, 1e-6) * weight
    agree(kernels.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("size", [10, 64, 128])
@pytest.mark.parametrize("heads", [1, 4, 16, 37])
@pytest.mark.parametrize("normed", [False, True])
def test_norm_and_rotation(kernels, dtype, size, heads, normed):
    x, weight = gaussian(30, heads + 2, size, dtype=dtype), 1 + gaussian(heads, size, seed=1, dtype=dtype)
    cosine, sine = (gaussian(30, 1, size, seed=s, dtype=dtype) for s in (2, 3))
    qk = torch.rms_norm(x[:, :heads], (size,), None, 1e-6) * weight if normed else x[:, :heads]
    expected, rest = rotate(qk, cosine, sine), x[:, heads:].clone()
    kernels.norm_rotate(x, heads, weight if normed else None, cosine, sine, 1e-6)
    agree(x[:, :heads], expected)
    assert torch.equal(x[:, heads:], rest)


@pytest.mark.parametrize("size", [5, 330, 704])
def test_gated_silu(kernels, dtype, size):
    gate_up = 6 * gaussian(50, 2 * size, dtype=dtype)
    gate_up[0, :4] = torch.tensor([0.0, 100.0, -100.0, 1e-6])
    agree(kernels.gated_silu(gate_up), elementwise._gated_silu(gate_up))


def test_rows_do_not_depend_on_each_other(kernels, dtype, threads):
    x, weight = gaussian(600, 330, dtype=dtype), gaussian(330, seed=1, dtype=dtype)
    gate_up = gaussian(600, 660, seed=2, dtype=dtype)
    qkv = gaussian(600, 5, 66, seed=3, dtype=dtype)
    norms, cosine, sine = (gaussian(*shape, dtype=dtype) for shape in ((4, 66), (600, 1, 66), (600, 1, 66)))

    def everything(rows):
        own = qkv[rows].clone()
        kernels.norm_rotate(own, 4, norms, cosine[rows], sine[rows], 1e-6)
        return kernels.rms_norm(x[rows], weight, 1e-6), kernels.gated_silu(gate_up[rows]), own

    together = everything(slice(600))
    for count in (1, 2, 3, 31, 200, 599):
        for whole, part in zip(together, everything(slice(600 - count, 600))):
            assert torch.equal(part, whole[600 - count :])


def test_nan_stays_in_its_row(kernels, dtype):
    x = gaussian(5, 64, dtype=dtype)
    x[2, 3] = torch.nan
    assert kernels.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6).isnan().any(1).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert kernels.gated_silu(x).isnan().sum() == 1
