"""Every kernel at every number of rows from 1 to 600, on the shapes of the shipped and expanded policies."""

import pytest
import torch

from rollout_spec.drafters.quantizers.kernel import KernelQuantizedLinear

ROWS = 600
SHAPES = {  # qkv, o, gate_up, down, and a slice of lm_head
    "shipped": [(512, 256), (256, 256), (1408, 256), (256, 704), (100, 256)],
    "100m": [(1280, 640), (640, 640), (3584, 640), (640, 1792), (3200, 640)],
    "300m": [(1536, 1024), (1024, 1024), (5120, 1024), (1024, 2560), (3200, 1024)],
}
KINDS = ["bf16", "int8", "int4", "nf4"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def different_rows(kernels, kind, shape, counts):
    """Numbers of rows for which some row's result is not what it is among all 600."""
    weight, x = gaussian(*shape), gaussian(ROWS, shape[1], seed=1)
    if kind == "bf16":
        packed = kernels.pack_bf16(weight)

        def run(x):
            return kernels.bf16_linear(x, packed, shape[0], None)

    else:
        run = KernelQuantizedLinear(weight, None, kind=kind, kernels=kernels)
    together, found = run(x), []
    for rows in counts:
        start = (7 * rows) % (ROWS - rows + 1)
        if not torch.equal(run(x[start : start + rows]), together[start : start + rows]):
            found.append(rows)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_numbers_of_rows(kernels, kind, threads):
    if kernels.variant.startswith("emulated"):
        pytest.skip("very slow; smaller shapes are tested elsewhere")
    for shape in SHAPES["300m"]:
        assert not different_rows(kernels, kind, shape, [*range(1, 14), 16, 24, 31, 32, 33, 65, 128, 257])


def test_the_test_can_fail(monkeypatch):
    """The same check on a product whose order of sums follows the number of rows."""

    class Stock:
        def pack_bf16(self, weight):
            return weight.float()

        def bf16_linear(self, x, packed, out_features, bias):
            halves = x.float().split(8 if len(x) > 4 else 16, dim=1)
            parts = packed.split(8 if len(x) > 4 else 16, dim=1)
            return sum(a @ b.T for a, b in zip(halves, parts))

    assert different_rows(Stock(), "bf16", (64, 64), range(1, 9))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows(kernels, kind, size, threads):
    if kernels.variant.startswith("emulated"):
        pytest.skip("very slow; smaller shapes are tested elsewhere")
    for shape in SHAPES[size]:
        assert not different_rows(kernels, kind, shape, range(1, ROWS + 1)), shape
