"""Quantized linears: accuracy, determinism, padding, layout, availability, choice."""

import math
from dataclasses import replace

import pytest
import torch

from rollout_spec.contracts import InvalidRequest
from rollout_spec.drafters import quantize
from rollout_spec.drafters.quantize import (
    QUANTIZERS,
    Timing,
    available_quantizers,
    choose,
    expected_tau,
    get_quantizer,
    time_quantizers,
)
from rollout_spec.drafters.quantizers import base, int8, kernel, nf4
from rollout_spec.drafters.quantizers.base import relative_error
from rollout_spec.drafters.quantizers.int4 import Int4Linear
from rollout_spec.drafters.quantizers.int8 import Int8Linear
from rollout_spec.drafters.quantizers.nf4 import Nf4Linear
from rollout_spec.models import linear

ERROR = {4: 0.11, 8: 0.015 if int8.activation_levels() == 127 else 0.03, 16: 0.006}
SHAPES = [(512, 256), (96, 704), (50, 100), (1000, 65), (1, 640), (33, 1), (320, 1024)]
ROWS = [*range(1, 34), 300]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(name: str, own: bool = False):
    """The kind, on this project's kernel or on the stock one."""
    base._probe.cache_clear()
    reason = QUANTIZERS[name].unavailable("cpu", torch.bfloat16)
    if reason is not None:
        assert not own, reason
        pytest.skip(f"{name} {reason}")
    return QUANTIZERS[name]


@pytest.fixture
def stock(monkeypatch):
    """A machine without a compiler."""
    monkeypatch.setattr(kernel, "kernels", lambda: None)
    monkeypatch.setattr(linear, "kernels", lambda: None)


@pytest.fixture(params=[(name, own) for name in sorted(QUANTIZERS) for own in (True, False)], ids=str)
def kind(request, monkeypatch):
    name, own = request.param
    if not own:
        request.getfixturevalue("stock")
    return quantizer(name, own)


def bits_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (t.shape, t.dtype, t.contiguous().view(torch.uint8).tolist()) for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_close_to_float32_and_to_the_dequantized_product(kind, shape, dtype):
    weight, x = gaussian(*shape).to(dtype), gaussian(200, shape[1], seed=1).to(dtype)
    layer = kind.quantize(weight)
    y = layer(x)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((200, shape[0]), dtype, True)
    exact = x.float() @ weight.float().t()
    assert relative_error(y, exact) < ERROR[kind.bits]
    dequantized = layer.dequantized()
    assert dequantized.shape == shape
    assert dequantized.dtype == torch.float32
    assert relative_error(y, x.float() @ dequantized.t()) < (0.03 if int8.activation_levels() < 127 else 0.02)
    assert relative_error(dequantized, weight.float()) < ERROR[kind.bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(kind, dtype):
    weight = gaussian(200, 320).to(dtype)
    layer = kind.quantize(weight)
    x = gaussian(max(ROWS), 320, seed=1).to(dtype)
    exact = x.float() @ weight.float().t()
    for rows in ROWS:
        y = layer(x[:rows])
        assert y.shape == (rows, 200)
        assert relative_error(y, exact[:rows]) < ERROR[kind.bits] * 1.1, rows
    assert layer(x[:0]).shape == (0, 200)


def test_rows_do_not_disturb_each_other(kind):
    layer = kind.quantize(gaussian(200, 320))
    x = gaussian(8, 320, seed=1)
    outlier = x.clone()
    outlier[3] *= 1e4
    kept = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(layer(outlier)[kept], layer(x)[kept], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantization_is_deterministic_and_leaves_its_inputs_alone(kind, dtype):
    weight, bias = gaussian(130, 192).to(dtype), gaussian(130, seed=1).to(dtype)
    before = weight.clone(), bias.clone()
    first, second = kind.quantize(weight, bias), kind.quantize(weight.clone(), bias.clone())
    assert bits_of(first.tensors()) == bits_of(second.tensors())
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])
    x = gaussian(5, 192, seed=2).to(dtype)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), first(x))
    other = weight.clone()
    other[7, 5] += 3
    assert bits_of(first.tensors()) != bits_of(kind.quantize(other, bias).tensors())


def test_layer_does_not_alias_the_weight(kind):
    weight, bias, x = gaussian(64, 128), gaussian(64, seed=1), gaussian(3, 128, seed=2)
    layer = kind.quantize(weight, bias)
    y = layer(x)
    weight.zero_()
    bias.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_once(kind, dtype):
    weight, bias, x = (
        gaussian(70, 128).to(dtype),
        gaussian(70, seed=1).to(dtype),
        gaussian(4, 128, seed=2).to(dtype),
    )
    layer = kind.quantize(weight, bias)
    plain = kind.quantize(weight)(x)
    for _ in range(2):
        assert torch.equal(layer(x), plain.clone().add_(bias))
    assert "bias" in layer.tensors()


def test_non_contiguous_weights_and_inputs(kind):
    weight, x = gaussian(192, 130).t(), gaussian(192, 10, seed=1).t()
    layer = kind.quantize(weight)
    assert bits_of(layer.tensors()) == bits_of(kind.quantize(weight.contiguous()).tensors())
    for view in (x, gaussian(10, 400, seed=2)[:, 100:292], gaussian(20, 192, seed=3)[::2]):
        assert torch.equal(layer(view), layer(view.contiguous()))


def test_parameters_that_require_grad(kind):
    layer = kind.quantize(torch.nn.Parameter(gaussian(64, 128)), torch.nn.Parameter(gaussian(64)))
    assert not any(t.requires_grad for t in layer.tensors().values())
    assert not layer(gaussian(2, 128)).requires_grad


def test_zero_rows_and_zero_inputs_give_zero(kind):
    weight = gaussian(64, 128)
    weight[5] = 0
    layer = kind.quantize(weight)
    assert layer(torch.zeros(2, 128)).abs().max() == 0
    assert layer(gaussian(2, 128))[:, 5].abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_weight_reaches_its_own_output_only(kind, bad):
    weight = gaussian(96, 128)
    weight[40, 3] = bad
    y = kind.quantize(weight)(gaussian(4, 128, seed=1))
    assert not y[:, 40].isfinite().any()
    y[:, 40] = 0
    assert y.isfinite().all()


def test_a_non_finite_input_stays_in_its_row(kind):
    x = gaussian(4, 128, seed=1)
    x[2, 5] = math.nan
    y = kind.quantize(gaussian(96, 128))(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_payload_is_as_small_as_its_bits_say(kind):
    layer = kind.quantize(gaussian(512, 512).bfloat16(), gaussian(512).bfloat16())
    assert layer.nbytes == sum(t.nbytes for t in layer.tensors().values())
    assert layer.nbytes < 512 * 512 * kind.bits / 8 * 1.15 + 2048


@pytest.mark.parametrize("name", ["nf4", "int4", "int8"])
def test_blocks_of_rows_do_not_change_the_result(name, monkeypatch, stock):
    weight = gaussian(330, 256)
    whole = quantizer(name).quantize(weight)
    monkeypatch.setattr(base, "CPU_BLOCK_ELEMENTS", 1)
    assert bits_of(whole.tensors()) == bits_of(quantizer(name).quantize(weight).tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (640, 704), (6144, 128)])
def test_nf4_bytes_equal_those_of_bitsandbytes(shape, dtype, stock):
    layer = quantizer("nf4")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape).to(dtype)
    weight[1, :3] = torch.tensor([0.0, -0.0, 1e-30])
    weight[2, :16] = torch.tensor(nf4.LEVELS) * 7
    middle = torch.tensor(nf4.LEVELS).unfold(0, 2, 1).mean(1)
    weight[3, :15], weight[3, 15] = middle, 1.0
    layer = layer.quantize(weight)
    packed, state = functional._convert_weight_packed_for_cpu(
        *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    )
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.absmax, state.absmax)


def test_nf4_codes_on_and_around_every_boundary():
    levels = torch.tensor(nf4.LEVELS)
    boundaries = (levels[:-1] + levels[1:]) / 2
    below, above = (torch.nextafter(boundaries, torch.full_like(boundaries, end)) for end in (-2.0, 2.0))
    values = torch.cat([boundaries, below, above, levels, torch.linspace(-1, 1, 10_001)])
    assert torch.equal(nf4._codes(values).long(), torch.bucketize(values, boundaries))


def test_int4_rounds_to_the_nearest_of_sixteen_levels(stock):
    weight = gaussian(64, 128)
    layer = quantizer("int4").quantize(weight)
    assert isinstance(layer, Int4Linear)
    step = layer.affine[..., 0].t().float().repeat_interleave(64, 1)
    assert ((layer.dequantized() - weight).abs() <= 0.55 * step + 0.01).all()


@pytest.mark.parametrize("layer_type", [Int8Linear, Nf4Linear])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_layers_for_cuda_run_on_cpu_too(layer_type, rows):
    quantizer("nf4" if layer_type is Nf4Linear else "int8")
    weight, bias, x = gaussian(50, 100), gaussian(50, seed=1), gaussian(rows, 100, seed=2)
    with torch.no_grad():
        layer = layer_type(weight, bias)
        y = layer(x)
    assert relative_error(y - bias, x @ weight.t()) < (0.015 if layer_type is Int8Linear else 0.11)
    assert relative_error(y - bias, x @ layer.dequantized().t()) < 0.015


def test_int8_without_vnni_uses_fewer_activation_levels(monkeypatch, stock):
    layer = quantizer("int8").quantize(gaussian(64, 256))
    monkeypatch.setattr(int8, "activation_levels", lambda: 63)
    x = gaussian(4, 256, seed=1)
    assert relative_error(layer(x), x @ layer.dequantized().t()) < 0.03


def test_int8_falls_back_when_pytorch_drops_quantized_tensors(monkeypatch, stock):
    monkeypatch.setattr(int8, "_fbgemm", lambda: False)
    assert isinstance(QUANTIZERS["int8"].quantize(gaussian(32, 64)), Int8Linear)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "fbgemm" in QUANTIZERS["int8"].unavailable("cpu", torch.float32)


def test_quantization_leaves_global_settings_alone(kind):
    def settings():
        return torch.backends.quantized.engine, torch.get_num_threads(), torch.is_grad_enabled()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = settings()
        kind.quantize(gaussian(16, 16))
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            kind.quantize(gaussian(16))
        assert settings() == before
    finally:
        torch.set_num_threads(threads)


def test_dense_is_the_plain_linear():
    weight, x = gaussian(70, 96), gaussian(3, 96, seed=1)
    layer = QUANTIZERS["dense"].quantize(weight)
    assert torch.equal(layer.dequantized(), weight)
    torch.testing.assert_close(layer(x), x @ weight.t())


def test_every_kind_states_a_reason_where_it_cannot_run():
    for name, kind in QUANTIZERS.items():
        assert "float64" in kind.unavailable("cpu", torch.float64), name
        assert "meta" in kind.unavailable("meta", torch.float32), name
        assert "empty" in kind.unavailable("cpu", torch.float32, 0, 64), name
        if not torch.cuda.is_available():
            assert "CUDA" in kind.unavailable("cuda", torch.float32), name


def test_missing_bitsandbytes_is_reported(monkeypatch, stock):
    def fails():
        raise ImportError("no such module")

    monkeypatch.setattr(nf4, "_bitsandbytes", fails)
    assert "pip install bitsandbytes" in QUANTIZERS["nf4"].unavailable("cpu", torch.float32)


def test_a_trial_does_not_depend_on_the_default_dtype():
    """vLLM loads models with the default dtype set to the model's."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        base._probe.cache_clear()
        assert QUANTIZERS["dense"].unavailable("cpu", torch.bfloat16) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_kernel_that_computes_something_else_is_unavailable(monkeypatch):
    class Wrong(type(QUANTIZERS["dense"])):
        def quantize(self, weight, bias=None):
            return super().quantize(weight * 2, bias)

    class Crashes(Wrong):
        def quantize(self, weight, bias=None):
            raise RuntimeError("no such kernel\nbacktrace")

    assert "off by" in Wrong().unavailable("cpu", torch.float32)
    reason = Crashes().unavailable("cpu", torch.float32)
    assert "no such kernel" in reason
    assert "backtrace" not in reason
    monkeypatch.setitem(quantize.QUANTIZERS, "dense", Crashes())
    with pytest.raises(InvalidRequest, match=r"speculation.drafter='dense'.*no such kernel.*available here"):
        get_quantizer("dense", "cpu", torch.float32)


def test_get_quantizer():
    for name, reason in available_quantizers("cpu", torch.bfloat16).items():
        if reason is None:
            assert get_quantizer(name, "cpu", torch.bfloat16) is QUANTIZERS[name]
    with pytest.raises(InvalidRequest, match="use one of nf4, int4, int8, dense"):
        get_quantizer("int3", "cpu", torch.bfloat16)


def timing(name: str, bits: int, rows: int, microseconds: float) -> Timing:
    return Timing(name, bits, rows, microseconds, 2.0, 0.5, 0.1)


TIMINGS = [
    timing("dense", 16, 1, 100.0),
    timing("dense", 16, 5, 120.0),
    timing("int8", 8, 1, 50.0),
    timing("int8", 8, 5, 60.0),
    timing("nf4", 4, 1, 25.0),
    timing("nf4", 4, 5, 500.0),
]


def test_choose_follows_the_formula_and_uses_draft_rows_for_the_drafter():
    choice = choose(TIMINGS, draft_length=4)
    tau4, tau8 = expected_tau(0.96, 4), expected_tau(0.99, 4)
    assert choice.gains == pytest.approx(
        {"nf4": tau4 * 100 / (4 * 25 + 120), "int8": tau8 * 100 / (4 * 50 + 120)}
    )
    assert choice.name == "nf4"
    assert expected_tau(0.5, 2) == pytest.approx((1 - 0.5**3) / (1 - 0.5))
    assert expected_tau(1.0, 3) == 4
    assert choose(TIMINGS[::-1], 4) == choice


def test_choose_none_when_nothing_pays():
    slow = [t if t.name == "dense" else replace(t, microseconds=99.0) for t in TIMINGS]
    assert choose(slow, 4).name == "none"
    assert choose(TIMINGS[:2], 4).name == "none"
    with pytest.raises(ValueError, match="dense"):
        choose(TIMINGS[2:], 4)


def test_time_quantizers_covers_every_available_kind_and_row_count():
    shapes = [(192, 128), (64, 256)] * 3
    timings = time_quantizers(shapes, "cpu", torch.bfloat16, rows=(1, 5), repeats=2)
    usable = {name for name, reason in available_quantizers("cpu", torch.bfloat16).items() if reason is None}
    assert {(t.name, t.rows) for t in timings} == {(name, r) for name in usable for r in (1, 5)}
    for t in timings:
        assert t.microseconds > 0
        assert t.requantize_seconds_per_GB > 0
        assert t.weight_gigabytes == pytest.approx(2e-9 * 3 * (192 * 128 + 64 * 256))
        assert t.error < ERROR[t.bits]
    assert choose(timings, 4).name in {*usable, "none"}
    with pytest.raises(ValueError, match="shapes is empty"):
        time_quantizers([], "cpu", torch.bfloat16)
