"""AMX: the bits of the vectors where sums are whole numbers, and of its written-out operations where they are not."""

import pytest
import torch

from rollout_spec.kernels import library
from rollout_spec.kernels.build import VARIANTS, Unavailable, build, cpu_flags, may_use_tile_registers
from rollout_spec.kernels.library import Kernels

SHAPES = [(131, 77), (320, 1024), (70, 704), (17, 33)]
ROWS = [1, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 130]
HAVE_AMX = VARIANTS["amx"][0] <= cpu_flags() and may_use_tile_registers()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def of(variant):
    return Kernels(build(variant), variant)


@pytest.fixture(params=["emulated-amx", *["amx"] * HAVE_AMX])
def registers(request):
    return of(request.param)


@pytest.fixture
def vectors(registers):
    return of("emulated" if registers.variant == "emulated-amx" else "avx512")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_products_have_the_bits_of_the_vectors(registers, vectors, kind, shape, dtype):
    weight, x = gaussian(*shape).to(dtype), gaussian(max(ROWS), shape[1], seed=1).to(dtype)
    packed, plain = registers.quantize(kind, weight), vectors.quantize(kind, weight)
    for rows in ROWS:
        got = registers.quantized_linear(kind, x[:rows], *packed, shape[0])
        assert torch.equal(got, vectors.quantized_linear(kind, x[:rows], *plain, shape[0])), rows


@pytest.mark.skipif(not HAVE_AMX, reason="this CPU lacks AMX")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_sums_is_the_one_written_out(shape):
    """So what is tested without AMX is what runs with it."""
    amx, emulated = of("amx"), of("emulated-amx")
    weight, bias, x = gaussian(*shape), gaussian(shape[0], seed=1), gaussian(max(ROWS), shape[1], seed=2)
    for rows in ROWS:
        got, want = (k.bf16_linear(x[:rows], k.pack_bf16(weight), shape[0], bias) for k in (amx, emulated))
        assert torch.equal(got, want), rows


def test_the_order_of_sums_is_columns_by_two_chains_of_sixteen(registers):
    """Of 32 columns the even and the odd ones are summed apart, then together, then added to what came before."""
    weight, x = gaussian(20, 96), gaussian(3, 96, seed=1)
    total = torch.zeros(3, 20)
    for first in range(0, 96, 32):
        even, odd = torch.zeros(3, 20), torch.zeros(3, 20)
        for k in range(first, first + 32, 2):
            even += x[:, k : k + 1].float() * weight[:, k].float()
            odd += x[:, k + 1 : k + 2].float() * weight[:, k + 1].float()
        total += even + odd
    assert torch.equal(registers.bf16_linear(x, registers.pack_bf16(weight), 20, None), total.bfloat16())


def test_columns_that_only_fill_a_register_are_zeros(registers):
    """Also where memory held something else before: a weight's zero times what is not finite is not zero."""
    weight, x = gaussian(64, 33), gaussian(17, 33, seed=1)
    packed, exact = registers.pack_bf16(weight), x.double() @ weight.double().T
    for _ in range(4):
        registers.bf16_linear(torch.full((17, 64), float("nan")).bfloat16(), packed, 64, None)
        got = registers.bf16_linear(x, packed, 64, None)
        assert (got.double() - exact).norm() <= 2e-3 * exact.norm()


def test_a_system_that_refuses_the_registers_is_named(monkeypatch):
    monkeypatch.setattr(library, "may_use_tile_registers", lambda: False)
    with pytest.raises(Unavailable, match=r"does not let this process use AMX's registers.*KERNELS=avx512"):
        Kernels(build("emulated"), "amx")
