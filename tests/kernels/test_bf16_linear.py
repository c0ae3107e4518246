"""The bf16 product: right against float64, and to the bit independent of rows, neighbours and threads."""

import pytest
import torch

SHAPES = [(131, 77), (320, 1024), (1000, 65), (70, 704), (100, 3072)]
TINY = [(16, 2), (1, 1), (17, 33), (3, 640)]  # too few outputs for a mean error to mean anything
MODEL_SHAPES = [(1536, 1024), (1024, 2560), (640, 1792), (512, 256), (100, 256)]
ROWS = 600


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_float64(kernels, shape):
    weight, bias, x = gaussian(*shape), gaussian(shape[0], seed=1), gaussian(32, shape[1], seed=2)
    packed = kernels.pack_bf16(weight)
    assert torch.equal(kernels.unpack_bf16(packed, shape), weight)
    exact = x.double() @ weight.double().T
    for rows in range(1, 33):
        assert relative_error(kernels.bf16_linear(x[:rows], packed, shape[0], None), exact[:rows]) <= 2e-3
        with_bias = kernels.bf16_linear(x[:rows], packed, shape[0], bias)
        assert relative_error(with_bias, exact[:rows] + bias.double()) <= 2e-3


@pytest.mark.parametrize("shape", [*TINY, *SHAPES])
def test_every_element_is_the_sum_rounded_once(kernels, shape):
    weight, x = gaussian(*shape), gaussian(9, shape[1], seed=2)
    exact = x.double() @ weight.double().T
    error = (kernels.bf16_linear(x, kernels.pack_bf16(weight), shape[0], None).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6 * shape[1] ** 0.5).all()


def test_the_order_of_sums_is_the_columns(kernels):
    """Stated in the source, and what makes rows independent: a chain of multiply-adds in float32."""
    if kernels.variant != "avx2":
        pytest.skip("the products of bf16 instructions have an order of their own")
    weight, x = gaussian(20, 301), gaussian(3, 301, seed=1)
    total = torch.zeros(3, 20, dtype=torch.float64)
    for k in range(301):  # the product of two bf16 is exact in float32; the sum is rounded to it
        total = (total + x[:, k : k + 1].double() * weight[:, k].double()).float().double()
    assert torch.equal(kernels.bf16_linear(x, kernels.pack_bf16(weight), 20, None), total.bfloat16())


def different_rows(kernels, shape, counts):
    """Numbers of rows for which some row's result is not what it is among all 600."""
    packed, x = kernels.pack_bf16(gaussian(*shape)), gaussian(ROWS, shape[1], seed=1)
    together = kernels.bf16_linear(x, packed, shape[0], None)
    found = []
    for rows in counts:
        start = (7 * rows) % (ROWS - rows + 1)
        part = kernels.bf16_linear(x[start : start + rows], packed, shape[0], None)
        if not torch.equal(part, together[start : start + rows]):
            found.append(rows)
    return found


def test_a_row_does_not_depend_on_its_neighbours(kernels, threads):
    few = [*range(1, 34), 47, 64, 100, 255, 333, 511, 599]
    for shape in [(131, 77), (100, 256), (48, 704)]:
        assert not different_rows(kernels, shape, few)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(kernels, bad):
    weight, x = gaussian(40, 50), gaussian(9, 50, seed=1)
    x[3, 7], weight[20, 9] = bad, bad
    y = kernels.bf16_linear(x, kernels.pack_bf16(weight), 40, None)
    assert not y[3].isfinite().any() and not y[:, 20].isfinite().any()
    y[3], y[:, 20] = 0, 0
    assert y.isfinite().all()


def test_threads_and_layout_of_the_input_do_not_matter(kernels):
    weight, x = gaussian(700, 300), gaussian(50, 600, seed=1)[:, ::2]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(kernels.bf16_linear(x, kernels.pack_bf16(weight), 700, None))
    torch.set_num_threads(2)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(
        kernels.bf16_linear(x.contiguous(), kernels.pack_bf16(weight.clone()), 700, None), results[0]
    )


def test_no_rows_give_no_rows(kernels):
    assert kernels.bf16_linear(gaussian(0, 8), kernels.pack_bf16(gaussian(5, 8)), 5, None).shape == (0, 5)
