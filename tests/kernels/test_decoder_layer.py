"""A layer in one call, or in two around attention, is the kernels one by one, to the bit."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rollout_spec.drafters.quantizers.kernel import KernelQuantizedLinear
from rollout_spec.kernels.decoder_layer import (
    KernelLayers,
    LayersAroundAttention,
    LayersInOneCall,
    PagedRows,
)
from rollout_spec.models.decoder import LayerWeights
from rollout_spec.models.linear import KernelLinear, PlainLinear

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH = 80, 6, 2, 16, 144
BLOCKS, BLOCK, LAYERS, EPS = 7, 8, 3, 1e-6
CASES = [("bf16", torch.bfloat16)] + [
    (kind, dtype) for kind in ("int8", "int4", "nf4") for dtype in (torch.bfloat16, torch.float32)
]


def gaussian(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(kernels, kind, dtype, normed, bias, seed, reads=HIDDEN):
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, reads), "o": (HIDDEN, HEADS * DIM)}
    shapes |= {"gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    linears = {}
    for number, (name, shape) in enumerate(shapes.items()):
        weight = gaussian(*shape, seed=seed + number, dtype=dtype) / shape[1] ** 0.5
        own = gaussian(shape[0], seed=seed - number, dtype=dtype) if bias and name == "qkv" else None
        if kind == "bf16":
            linears[name] = KernelLinear(weight, own, kernels)
        else:
            linears[name] = KernelQuantizedLinear(weight, own, kind=kind, kernels=kernels)
    norms = [1 + gaussian(*size, seed=seed, dtype=dtype) / 4 for size in ((HIDDEN,), (HEADS + KV_HEADS, DIM))]
    return LayerWeights(
        input_norm=norms[0], post_norm=norms[0].flip(0), qk_norm=norms[1] if normed else None, **linears
    )


class Batch:
    """Rows of two sequences in a cache that has something in every entry; the last row sees nothing."""

    def __init__(self, kernels, rows, dtype):
        shape = (LAYERS, KV_HEADS, BLOCKS, BLOCK, DIM)
        self.kernels, self.rows = kernels, rows
        self.keys, self.values = (gaussian(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
        self.x = gaussian(rows, HIDDEN, seed=3, dtype=dtype)
        self.cosine, self.sine = (gaussian(rows, 1, DIM, seed=seed, dtype=dtype) for seed in (4, 5))
        self.tables = torch.tensor([[4, 0, 2], [1, 3, 6]])
        self.sequences = (torch.arange(rows) > rows // 2).long()
        self.last = 1 + torch.arange(rows) % 20
        self.first = torch.where(self.last > 9, 2, 0)
        self.first[-1] = self.last[-1]
        place = self.last.clamp_min(1) - 1
        flat = self.tables[self.sequences, place // BLOCK] * BLOCK + place % BLOCK
        self.cache_rows = (flat[:, None] + torch.arange(KV_HEADS) * BLOCKS * BLOCK).flatten()

    def in_one_call(self, layers, stops=(LAYERS,), read=None):
        at = PagedRows(
            self.kernels, self.keys, self.values, self.cache_rows, self.tables, self.sequences, self.first, self.last
        )  # fmt: skip
        own = [layer.for_kernels() for layer in layers]
        if read is not None:
            own[0] = replace(own[0], input_norm=None)
        run = LayersInOneCall(KernelLayers(own), self.x, HEADS, self.cosine, self.sine, EPS, at, read)
        for start, stop in pairwise((0, *stops)):
            run(start, stop)

    def around_attention(self, layers, stops=(LAYERS,)):
        """With the attention of a caller, who may hand back what is not contiguous."""
        heads = HEADS, KV_HEADS, DIM

        def attend(index, q, k, v):
            keys, values = self.keys[index], self.values[index]
            self.kernels.store_entries(k, v, self.cache_rows, keys, values)
            seen = self.tables, self.sequences, self.first, self.last
            return self.kernels.attention(q, keys, values, *seen).t().contiguous().t()

        own = KernelLayers([layer.for_kernels() for layer in layers])
        run = LayersAroundAttention(own, self.x, heads, self.cosine, self.sine, EPS, attend)
        for start, stop in pairwise((0, *stops)):
            run(start, stop)

    def one_by_one(self, layers, read=None):
        own, rotated = self.kernels, HEADS + KV_HEADS
        for index, layer in enumerate(layers):
            keys, values = self.keys[index], self.values[index]
            if read is None:
                read = own.rms_norm(self.x, layer.input_norm, EPS)
            qkv, read = layer.qkv(read).view(self.rows, rotated + KV_HEADS, DIM), None
            own.norm_rotate(qkv, rotated, layer.qk_norm, self.cosine, self.sine, EPS)
            own.store_entries(qkv[:, HEADS:rotated], qkv[:, rotated:], self.cache_rows, keys, values)
            seen = self.tables, self.sequences, self.first, self.last
            self.x += layer.o(own.attention(qkv[:, :HEADS], keys, values, *seen))
            self.x += layer.down(own.gated_silu(layer.gate_up(own.rms_norm(self.x, layer.post_norm, EPS))))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("way", ["in_one_call", "around_attention"])
def test_it_is_the_kernels_one_by_one(kernels, threads, kind, dtype, rows, normed, way):
    layers = [make_layer(kernels, kind, dtype, normed, kind == "bf16", 10 * n) for n in range(LAYERS)]
    found, expected = Batch(kernels, rows, dtype), Batch(kernels, rows, dtype)
    before = found.x.clone()
    getattr(found, way)(layers)
    expected.one_by_one(layers)
    assert found.x.isfinite().all() and not torch.equal(found.x, before)
    for name in ("x", "keys", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(("kind", "dtype"), CASES)
@pytest.mark.parametrize("reads", [HIDDEN, 2 * HIDDEN])
def test_one_without_an_input_norm_reads_what_it_is_given(kernels, threads, kind, dtype, reads):
    """What the layers after it read is normed as ever."""
    layers = [
        make_layer(kernels, kind, dtype, False, kind == "bf16", 10 * n, HIDDEN if n else reads)
        for n in range(LAYERS)
    ]
    found, expected = Batch(kernels, 3, dtype), Batch(kernels, 3, dtype)
    read = gaussian(3, reads, seed=6, dtype=dtype)
    found.in_one_call(layers, read=read)
    expected.one_by_one(layers, read)
    for name in ("x", "keys", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("way", ["in_one_call", "around_attention"])
def test_they_can_be_run_in_parts(kernels, way):
    layers = [make_layer(kernels, "bf16", torch.bfloat16, True, False, 10 * n) for n in range(LAYERS)]
    whole, parts = Batch(kernels, 3, torch.bfloat16), Batch(kernels, 3, torch.bfloat16)
    getattr(whole, way)(layers)
    getattr(parts, way)(layers, stops=(0, 1, LAYERS))
    for name in ("x", "keys", "values"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@pytest.mark.parametrize("way", ["in_one_call", "around_attention"])
def test_layers_are_not_confused(kernels, way):
    layers = [make_layer(kernels, "bf16", torch.bfloat16, True, False, 10 * n) for n in range(LAYERS)]
    outputs = []
    for order in (layers, layers[::-1]):
        batch = Batch(kernels, 3, torch.bfloat16)
        getattr(batch, way)(order)
        outputs.append(batch.x)
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))


def test_a_layer_with_a_part_that_has_no_kernel_has_none(kernels):
    layer = make_layer(kernels, "bf16", torch.bfloat16, True, False, 0)
    assert layer.for_kernels() is not None
    parts = {
        name: getattr(layer, name) for name in ("input_norm", "qk_norm", "post_norm", "qkv", "o", "gate_up")
    }
    assert LayerWeights(**parts, down=PlainLinear(layer.down.dense())).for_kernels() is None
    assert make_layer(kernels, "nf4", torch.bfloat16, True, True, 0).for_kernels() is None, (
        "its bias is added apart"
    )
