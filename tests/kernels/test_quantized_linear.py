"""Quantized products: right against float64 and against the stored weights, rows independent to the bit."""

from itertools import product

import pytest
import torch

from rollout_spec.drafters.quantizers.kernel import NF4_LEVELS, KernelQuantizedLinear
from rollout_spec.drafters.quantizers.nf4 import LEVELS

KINDS = ["int8", "int4", "nf4"]
ERROR = {"int8": 1.5e-2, "int4": 0.11, "nf4": 0.11}
SHAPES = [(131, 77), (320, 1024), (1000, 65), (70, 704), (100, 3072)]
ROWS = 600


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(params=KINDS)
def make(request, kernels):
    def make(weight, bias=None):
        return KernelQuantizedLinear(weight, bias, kind=request.param, kernels=kernels)

    make.kind = request.param
    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_float64(make, shape, dtype):
    weight, x = gaussian(*shape).to(dtype), gaussian(32, shape[1], seed=1).to(dtype)
    layer = make(weight)
    exact, stored = x.double() @ weight.double().T, x.double() @ layer.dequantized().double().T
    for rows in range(1, 33):
        y = layer(x[:rows])
        assert (y.dtype, y.shape) == (dtype, (rows, shape[0]))
        assert relative_error(y, exact[:rows]) <= ERROR[make.kind]
        assert relative_error(y, stored[:rows]) <= 1.2e-2  # the rounding of x


@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_cost_what_quantizing_to_them_costs(make, shape):
    """The best that 16 levels per group of 64 can do, computed in float64: the kernel is within 5 % of it."""
    if make.kind == "int8":
        pytest.skip("a statement about 4 bits")
    weight, x = gaussian(*shape), gaussian(200, shape[1], seed=1)
    padded = torch.nn.functional.pad(weight, (0, -shape[1] % 64)).double().unflatten(1, (-1, 64))
    if make.kind == "int4":
        low, high = padded.aminmax(dim=2, keepdim=True)
        step = (high - low).clamp_min(1e-30) / 15
        ideal = ((padded - low) / step).round() * step + low
    else:
        largest = padded.abs().amax(2, keepdim=True).clamp_min(1e-30)
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        ideal = levels[((padded / largest)[..., None] - levels).abs().argmin(-1)] * largest
    ideal = ideal.flatten(1)[:, : shape[1]]
    exact = x.double() @ weight.double().T
    unavoidable = relative_error(x.double() @ ideal.T, exact)
    assert relative_error(make(weight)(x), exact) <= 1.05 * unavoidable


def test_integers_and_their_products_are_exact(make):
    """Weights and inputs that need no rounding: the product has none either."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (37, 192), generator=generator).float()
    weight[:, ::64] = torch.tensor([127.0, -127.0, 127.0])  # every group spans the range
    if make.kind == "int4":
        weight = torch.randint(-8, 8, (37, 192), generator=generator).float()
        weight[:, ::64], weight[:, 1::64] = -8, 7
    if make.kind == "nf4":
        levels = torch.tensor(NF4_LEVELS).float() - 32
        weight = levels[torch.randint(16, (37, 192), generator=generator)]
        weight[:, ::64] = 32
    x = torch.randint(-127, 128, (11, 192), generator=generator).float()
    x[:, 5] = 127
    layer = make(weight)
    assert torch.equal(layer.dequantized(), weight)
    assert torch.equal(layer(x), x @ weight.T)


def test_the_largest_sums_do_not_overflow(make):
    """Every product at its largest magnitude and of one sign, in the widest group sums."""
    for sign, rows in product((1, -1), (3, 16)):
        weight, x = torch.full((16, 4096), 127.0), torch.full((rows, 4096), 127.0 * sign)
        weight[:, ::64] = 126 if make.kind == "int4" else 127  # int4 needs a range
        y, exact = make(weight)(x), x.double() @ weight.double().T
        assert relative_error(y, exact) < 5e-3


def different_rows(layer, counts):
    x = gaussian(ROWS, layer.in_features, seed=1).bfloat16()
    together, found = layer(x), []
    for rows in counts:
        start = (7 * rows) % (ROWS - rows + 1)
        if not torch.equal(layer(x[start : start + rows]), together[start : start + rows]):
            found.append(rows)
    return found


def test_a_row_does_not_depend_on_its_neighbours(make, threads):
    few = [*range(1, 34), 47, 64, 100, 255, 333, 511, 599]
    for shape in [(131, 77), (100, 256), (48, 704)]:
        assert not different_rows(make(gaussian(*shape)), few)


def test_threads_do_not_matter(make):
    weight, x = gaussian(700, 300), gaussian(50, 300, seed=1)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        layer = make(weight)
        results.append((layer(x), layer.packed))
    torch.set_num_threads(2)
    for y, packed in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(packed, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(make, bad):
    weight, x = gaussian(40, 130), gaussian(9, 130, seed=1)
    x[3, 7], weight[20, 9] = bad, bad
    y = make(weight)(x)
    assert not y[3].isfinite().any() and not y[:, 20].isfinite().any()
    y[3], y[:, 20] = 0, 0
    assert y.isfinite().all()
