"""On CPUs a row's result does not depend on the rows computed with it, bit for bit."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from rollout_spec.models import elementwise
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.linear import PackedLinear, PlainLinear, can_pack, make_linear
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import load_weights, weight_shapes

ROWS = 600
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _a_kernel(request):
    """Skips dtypes for which this machine has no row-invariant kernel, of this project's or packed."""
    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    if dtype is not None and not make_linear(torch.zeros(4, 4, dtype=dtype)).row_invariant:
        pytest.skip(f"no row-invariant kernel for {dtype} here")


@pytest.fixture
def packed(dtype):
    if not can_pack("cpu", dtype):
        pytest.skip(f"this torch packs no {dtype} for this CPU")
    return PackedLinear


def shipped_spec():
    """The shape of the models the repository trains and ships."""
    config = Qwen3Config(
        vocab_size=100, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return ModelSpec.from_hf_config(config)


def large_spec():
    """One layer of the 322M benchmark model, and its vocabulary."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    return ModelSpec.from_hf_config(config)


def odd_spec():
    """Sizes that are no multiple of a vector register."""
    config = Qwen3Config(
        vocab_size=77, hidden_size=52, intermediate_size=330, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=10, max_position_embeddings=1024, attention_bias=True,
    )  # fmt: skip
    return ModelSpec.from_hf_config(config)


def random_decoder(spec, dtype):
    torch.manual_seed(0)
    tensors = ((name, torch.randn(shape) * shape[-1] ** -0.5) for name, shape in weight_shapes(spec).items())
    return Decoder(spec, load_weights(spec, tensors, dtype), RotaryTable(spec, "cpu", dtype))


def row_attend(spec):
    """Mixes q, k and v of a row exactly (products and sums of elements), so that it is row-invariant itself."""

    def attend(layer, q, k, v):
        grouped = q.view(q.shape[0], spec.num_kv_heads, -1, spec.head_dim)
        return (grouped * k[:, :, None] + v[:, :, None]).flatten(1)

    return attend


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("make_spec", "sizes"),
    [
        (
            shipped_spec,
            [*range(1, 34), 46, 47, 48, 63, 64, 65, 93, 95, 127, 128, 129, 200, 255, 333, 511, 599],
        ),
        (large_spec, [*range(1, 14), 16, 17, 21, 31, 32, 33, 43, 64, 101]),
        (odd_spec, [*range(1, 34), *range(95, 120), 199, 201, 255, 397, 399, 512, 597, 599]),
    ],
)
def test_a_row_never_depends_on_its_neighbours(make_spec, sizes, dtype, threads):
    torch.set_num_threads(threads)
    spec = make_spec()
    decoder, attend = random_decoder(spec, dtype), row_attend(spec)
    total = 160 if make_spec is large_spec else ROWS
    tokens, positions = torch.randint(spec.vocab_size, (total,)), torch.randint(1024, (total,))

    def logits(start, stop):
        return decoder.logits(decoder.hidden(tokens[start:stop], positions[start:stop], attend))

    together = logits(0, total)
    assert together[:, : spec.vocab_size].isfinite().all()
    for rows in sizes if threads == 1 else sizes[1::5]:
        start = (7 * rows) % (total - rows + 1)
        assert torch.equal(logits(start, start + rows), together[start : start + rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_linear_is_row_invariant_from_one_row_up(dtype, packed):
    """M=1 takes another kernel in oneDNN, which is why PackedLinear never asks for it."""
    torch.manual_seed(0)
    weight, bias = (torch.randn(shape).to(dtype) for shape in ((1024, 3072), (1024,)))
    linear = packed(weight, bias)
    assert linear.row_invariant
    x = torch.randn(64, 3072).to(dtype)
    together = linear(x)
    for rows in (1, 2, 3, 4, 5, 8, 31):
        assert torch.equal(linear(x[-rows:]), together[-rows:]), f"{rows} rows"


@pytest.mark.parametrize("width", [100, 704, 720, 3072])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu_is_row_invariant_under_threads(width, dtype):
    """torch's silu is not by itself: its threads' ranges end inside rows, where scalar code takes over."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    gate_up = 3 * torch.randn(ROWS, 2 * width).to(dtype)
    one_by_one = torch.cat([elementwise._gated_silu(row[None]) for row in gate_up])
    gate, up = gate_up.float().chunk(2, dim=1)
    torch.testing.assert_close(
        one_by_one, (torch.nn.functional.silu(gate).to(dtype).float() * up).to(dtype), rtol=1e-2, atol=1e-6
    )
    for rows in (*range(2, 60), 93, 329, 331, 599, 600):
        assert torch.equal(elementwise._gated_silu(gate_up[:rows]), one_by_one[:rows]), f"{rows} rows"


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("width", [33, 704, 14_336])
def test_runs_cover_all_rows_and_split_evenly(threads, width):
    for rows in (1, 2, 47, 255, 600):
        left = rows
        while left:
            run = elementwise._even_run(left, width, threads)
            assert 1 <= run <= left
            assert run % min(threads, -(-run * width // elementwise._GRAIN)) == 0
            left -= run


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_loses_nothing_and_agrees_with_plain(dtype):
    """In whatever way this machine packs."""
    torch.manual_seed(0)
    for N, K in ((80, 48), (1408, 256), (131, 77)):
        weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((N, K), (N,), (9, K)))
        x /= K**0.5
        packed, plain = make_linear(weight, bias), PlainLinear(weight, bias)
        assert torch.equal(packed.dense(), weight)
        assert torch.equal(plain.dense(), weight)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(packed(x), plain(x), rtol=tolerance, atol=tolerance)


def test_packed_weight_does_not_follow_the_tensor_it_came_from():
    weight = torch.randn(64, 64)
    linear = PackedLinear(weight)
    before = linear.dense()
    weight.zero_()
    assert torch.equal(linear.dense(), before)


def test_dtypes_without_a_packed_kernel_get_a_plain_linear():
    linear = make_linear(torch.randn(4, 4, dtype=torch.float16))
    assert isinstance(linear, PlainLinear)
    assert not linear.row_invariant
