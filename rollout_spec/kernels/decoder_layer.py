"""Decoder layers in one call of the kernels, or each in two around attention: `decoder_layer.cpp`.

For few rows the way from one kernel to the next through Python takes longer than most of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout_spec.kernels.library import KINDS, Kernels

_BF16 = -1
_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _SIZE) for name in ("kind", "n", "k")),
        *((name, _POINTER) for name in ("packed", "scales", "bias")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "qk_norm", "post_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, _SIZE) for name in ("is_bf16", "rows", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, _SIZE) for name in ("block_size", "head_stride", "width", "threads")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("cosine", "signed_sine", "cache_rows", "tables")),
        *((name, _POINTER) for name in ("sequences", "first", "last")),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class KernelWeight:
    """A weight [N, K] as the kernels read it.

    Attributes:
        kernels: Those that packed it.
        kind: `bf16`, or one of `KINDS`.
        shape: (N, K).
        packed: See `Kernels.pack_bf16` and `Kernels.quantize`.
        scales: The same.
        bias: bfloat16 [N], of a `bf16` weight alone.
    """

    kernels: Kernels
    kind: str
    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    def structure(self) -> _Linear:
        """What C++ reads; it holds none of the tensors."""
        kind = KINDS.get(self.kind, _BF16)
        return _Linear(kind, *self.shape, *map(_address, (self.packed, self.scales, self.bias)))


@dataclass(frozen=True)
class KernelLayer:
    """The weights of a layer, see `models.decoder.LayerWeights`; norms contiguous, in the dtype of the pass.

    Without an `input_norm`, queries, keys and values are of what the layer is given as it is.
    """

    input_norm: Tensor | None
    qk_norm: Tensor | None
    post_norm: Tensor
    qkv: KernelWeight
    o: KernelWeight
    gate_up: KernelWeight
    down: KernelWeight

    def structure(self) -> _Layer:
        """What C++ reads; it holds none of the tensors."""
        norms, linears = (self.input_norm, self.qk_norm, self.post_norm), self.linears
        assert all(x is None or (x.is_contiguous() and x.dtype == self.post_norm.dtype) for x in norms)
        return _Layer(*map(_address, norms), *(x.structure() for x in linears))

    @property
    def linears(self) -> tuple[KernelWeight, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class KernelLayers:
    """All layers of a model.

    Attributes:
        kernels: What can compute them.
        dtype: Of the pass.
    """

    def __init__(self, layers: Sequence[KernelLayer]) -> None:
        self.kernels, self.dtype = layers[0].qkv.kernels, layers[0].post_norm.dtype
        assert all(x.kernels is self.kernels for layer in layers for x in layer.linears)
        assert all(layer.post_norm.dtype == self.dtype for layer in layers)
        self._held = tuple(layers)
        self._structures = (_Layer * len(layers))(*(layer.structure() for layer in layers))
        self._here = ctypes.addressof(self._structures)

    def __len__(self) -> int:
        return len(self._held)

    def address(self, index: int) -> int:
        """Of what C++ reads of a layer; that of the next follows."""
        return self._here + index * ctypes.sizeof(_Layer)


@dataclass(frozen=True)
class PagedRows:
    """Where the rows of a pass are in a paged cache, and what each sees of it.

    Attributes:
        kernels: What reads and writes the cache.
        keys, values: Of all layers, `[layers, kv_heads, blocks, block_size, head_dim]`.
        cache_rows: See `Kernels.store_entries`.
        tables, sequences, first, last: See `Kernels.attention`.
    """

    kernels: Kernels
    keys: Tensor
    values: Tensor
    cache_rows: Tensor
    tables: Tensor
    sequences: Tensor
    first: Tensor
    last: Tensor


class _Layers:
    """The layers of one pass: what the methods of `Kernels` do one by one, to the bit.

    Args:
        layers: Of the model.
        x: `[R, H]`, float32 or bfloat16: the residual stream, written in place.
        heads: Of queries, and of keys, and the size of one.
        cosine, signed_sine, eps: As in `Kernels.norm_rotate`.
        at: The rows' places in a paged cache, if it is read here.
    """

    def __init__(
        self,
        layers: KernelLayers,
        x: Tensor,
        heads: tuple[int, int, int],
        cosine: Tensor,
        signed_sine: Tensor,
        eps: float,
        at: PagedRows | None,
    ) -> None:
        rows, hidden = x.shape
        cache: tuple[int, int, int] = (0, 0, 0)
        places: tuple[Tensor, ...] = ()
        if at is not None:
            blocks, block_size = at.keys.shape[2:4]
            cache = block_size, blocks * block_size * heads[2], at.tables.shape[1]
            places = at.cache_rows, at.tables, at.sequences, at.first, at.last
        assert all(t.is_contiguous() for t in (x, cosine, signed_sine, *places))
        assert all(t.dtype == x.dtype for t in (cosine, signed_sine)) and layers.dtype == x.dtype
        assert all(t.dtype == torch.int64 for t in places)
        self._layers, self._library, self._x = layers, layers.kernels.library, x
        self._held = cosine, signed_sine, at
        self._pass = _Pass(
            x.dtype == torch.bfloat16, rows, hidden, *heads, *cache, torch.get_num_threads(), eps,
            *map(_address, (cosine, signed_sine, *places)),
        )  # fmt: skip
        self._here = ctypes.addressof(self._pass)
        size = self._library.decoder_layer_scratch(layers.address(0), self._here)
        self._room = torch.empty(size, dtype=torch.uint8)
        self._scratch = self._room.data_ptr()


class LayersInOneCall(_Layers):
    """With attention over a paged cache, the rows being `at` these places of it.

    The layer that is computed first in a call has its queries, keys and values of `read` [R, its own K], if that is not x.
    """

    def __init__(
        self,
        layers: KernelLayers,
        x: Tensor,
        heads: int,
        cosine: Tensor,
        signed_sine: Tensor,
        eps: float,
        at: PagedRows,
        read: Tensor | None = None,
    ) -> None:
        keys, values = at.keys, at.values
        self._read = x if read is None else read
        assert self._read.is_contiguous() and self._read.dtype == x.dtype and len(self._read) == len(x)
        assert all(t.is_contiguous() and t.dtype == x.dtype for t in (keys, values))
        assert len(at.first) == len(x) and len(layers) == len(keys) and layers.kernels is at.kernels
        super().__init__(layers, x, (heads, keys.shape[1], keys.shape[-1]), cosine, signed_sine, eps, at)
        self._cache, self._stride = (keys.data_ptr(), values.data_ptr()), keys.stride(0) * keys.element_size()

    def __call__(self, start: int, stop: int) -> None:
        """Compute the layers `start .. stop`; layer i reads and writes part i of the cache."""
        keys, values = (part + start * self._stride for part in self._cache)
        self._library.decoder_layers(
            self._layers.address(start), stop - start, self._here, self._x.data_ptr(), self._read.data_ptr(), keys, values,
            self._stride, self._scratch,
        )  # fmt: skip


class LayersAroundAttention(_Layers):
    """Each in two calls, with attention in between by `attend`, see `models.decoder.Attend`."""

    def __init__(
        self,
        layers: KernelLayers,
        x: Tensor,
        heads: tuple[int, int, int],
        cosine: Tensor,
        signed_sine: Tensor,
        eps: float,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(layers, x, heads, cosine, signed_sine, eps, None)
        self._attend = attend
        queries, keys, size = heads
        self._shape, self._split = (len(x), queries + 2 * keys, size), (queries, keys, keys)

    def __call__(self, start: int, stop: int) -> None:
        """Compute the layers `start .. stop`."""
        library, x = self._library, self._x
        for index in range(start, stop):
            layer, qkv = self._layers.address(index), torch.empty(self._shape, dtype=x.dtype)
            library.decoder_layer_before(layer, self._here, x.data_ptr(), qkv.data_ptr(), self._scratch)
            attended = self._attend(index, *qkv.split(self._split, 1)).contiguous()
            library.decoder_layer_after(layer, self._here, x.data_ptr(), attended.data_ptr(), self._scratch)
