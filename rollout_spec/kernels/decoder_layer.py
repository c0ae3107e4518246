"""A decoder layer in one call of the kernels, or in two around attention: `decoder_layer.cpp`.

For few rows the way from one kernel to the next through Python takes longer than most of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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

    def structure(self) -> ctypes.Structure:
        """What C++ reads; it holds none of the tensors."""
        kind = KINDS.get(self.kind, _BF16)
        return _Linear(kind, *self.shape, *map(_address, (self.packed, self.scales, self.bias)))


class KernelLayer:
    """The weights of a layer, see `models.decoder.LayerWeights`; norms contiguous, in the dtype of the pass.

    Attributes:
        kernels: What can compute it.
        dtype: Of the pass.
        address: Of what C++ reads.
    """

    def __init__(
        self,
        input_norm: Tensor,
        qk_norm: Tensor | None,
        post_norm: Tensor,
        qkv: KernelWeight,
        o: KernelWeight,
        gate_up: KernelWeight,
        down: KernelWeight,
    ) -> None:
        norms, linears = (input_norm, qk_norm, post_norm), (qkv, o, gate_up, down)
        assert all(x is None or (x.is_contiguous() and x.dtype == input_norm.dtype) for x in norms)
        assert all(x.kernels is qkv.kernels for x in linears)
        self.kernels, self.dtype = qkv.kernels, input_norm.dtype
        self._held = norms, linears
        self._structure = _Layer(*map(_address, norms), *(x.structure() for x in linears))
        self.address = ctypes.addressof(self._structure)


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
        kernels: What computes them.
        x: `[R, H]`, float32 or bfloat16: the residual stream, written in place.
        heads: Of queries, and of keys, and the size of one.
        cosine, signed_sine, eps: As in `Kernels.norm_rotate`.
        at: The rows' places in a paged cache, if it is read here.
    """

    def __init__(
        self,
        kernels: Kernels,
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
        assert all(t.dtype == x.dtype for t in (cosine, signed_sine))
        assert all(t.dtype == torch.int64 for t in places)
        self._kernels, self._x = kernels, x
        self._held = cosine, signed_sine, at
        self._pass = _Pass(
            x.dtype == torch.bfloat16, rows, hidden, *heads, *cache, torch.get_num_threads(), eps,
            *map(_address, (cosine, signed_sine, *places)),
        )  # fmt: skip
        self._here, self._scratch = ctypes.addressof(self._pass), 0

    def _checked(self, layer: KernelLayer) -> ctypes.CDLL:
        assert layer.dtype == self._x.dtype and layer.kernels is self._kernels
        library = self._kernels.library
        if not self._scratch:
            size = library.decoder_layer_scratch(layer.address, self._here)
            self._room = torch.empty(size, dtype=torch.uint8)
            self._scratch = self._room.data_ptr()
        return library


class LayersInOneCall(_Layers):
    """With attention over a paged cache, the rows being `at` these places of it."""

    def __init__(
        self, x: Tensor, heads: int, cosine: Tensor, signed_sine: Tensor, eps: float, at: PagedRows
    ) -> None:
        keys, values = at.keys, at.values
        assert all(t.is_contiguous() and t.dtype == x.dtype for t in (keys, values))
        assert len(at.first) == len(x)
        super().__init__(at.kernels, x, (heads, keys.shape[1], keys.shape[-1]), cosine, signed_sine, eps, at)
        self._keys, self._values, self._stride = keys.data_ptr(), values.data_ptr(), keys[0].nbytes

    def __call__(self, index: int, layer: KernelLayer) -> None:
        """Compute the layer, whose part of the cache is `index`."""
        library, own = self._checked(layer), index * self._stride
        library.decoder_layer(
            layer.address, self._here, self._x.data_ptr(), self._keys + own, self._values + own, self._scratch
        )


class LayersAroundAttention(_Layers):
    """In two calls, with attention in between by `attend`, see `models.decoder.Attend`."""

    def __init__(
        self,
        kernels: Kernels,
        x: Tensor,
        heads: tuple[int, int, int],
        cosine: Tensor,
        signed_sine: Tensor,
        eps: float,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(kernels, x, heads, cosine, signed_sine, eps, None)
        self._attend = attend
        queries, keys, size = heads
        self._shape, self._split = (len(x), queries + 2 * keys, size), (queries, keys, keys)

    def __call__(self, index: int, layer: KernelLayer) -> None:
        """Compute the layer, the `index`-th of the pass."""
        library, x = self._checked(layer), self._x
        qkv = torch.empty(self._shape, dtype=x.dtype)
        library.decoder_layer_before(layer.address, self._here, x.data_ptr(), qkv.data_ptr(), self._scratch)
        attended = self._attend(index, *qkv.split(self._split, 1)).contiguous()
        library.decoder_layer_after(
            layer.address, self._here, x.data_ptr(), attended.data_ptr(), self._scratch
        )
