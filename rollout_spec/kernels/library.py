"""The kernels as functions of tensors. `kernels()` is None where they cannot be had; callers then use stock ones."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rollout_spec.kernels.build import NO_REGISTERS, Unavailable, build, may_use_tile_registers, variants
from rollout_spec.kernels.memory import WeightMemory

logger = logging.getLogger("rollout_spec")

KINDS = {"int8": 0, "int4": 1, "nf4": 2}  # as in nf4.h

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_CACHE, _ROWS = [_POINTER, _POINTER, *[_SIZE] * 5], [_POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE]
_ATTENTION_INPUTS = [_INT, _POINTER, _SIZE, *_CACHE, *_ROWS]
_SIGNATURES = {
    "bf16_packed_size": ([_SIZE, _SIZE], _SIZE),
    "bf16_pack": ([_POINTER, _SIZE, _SIZE, _POINTER, _INT], None),
    "bf16_unpack": ([_POINTER, _SIZE, _SIZE, _POINTER], None),
    "bf16_linear": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _INT], None),
    "attention": ([*_ATTENTION_INPUTS, _POINTER, _INT], None),
    "store_entries": (
        [_SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER],
        None,
    ),
    "rms_norm": ([_INT, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _POINTER, _INT], None),
    "norm_rotate": (
        [_INT, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _FLOAT, _INT],
        None,
    ),
    "gated_silu": ([_INT, _POINTER, _SIZE, _SIZE, _POINTER, _INT], None),
    "quantized_size": ([_INT, _SIZE, _SIZE], _SIZE),
    "quantize": ([_INT, _INT, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT], None),
    "quantized_linear": (
        [_INT, _INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _INT],
        None,
    ),
    "uniform_noise": ([_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _INT], None),
    "race": ([_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT], None),
    "decoder_layer_scratch": ([_POINTER, _POINTER], _SIZE),
    "decoder_layers": ([_POINTER, _SIZE, *[_POINTER] * 5, _SIZE, _POINTER], None),
    "decoder_layer_before": ([*[_POINTER] * 5], None),
    "decoder_layer_after": ([*[_POINTER] * 5], None),
}


class Kernels:
    """One variant's library. Every function uses torch's number of threads, and its result does not depend on it.

    Attributes:
        variant: Which instructions it was built for.
        build: The variant with a digest of sources, flags and libraries.
        library: The functions themselves.

    Raises:
        Unavailable: The file cannot be loaded, or the system does not let this process use its registers.
    """

    def __init__(self, path: Path, variant: str) -> None:
        if variant == "amx" and not may_use_tile_registers():
            raise Unavailable(NO_REGISTERS)
        self.variant, self.build = variant, path.stem
        self._memory = WeightMemory()
        try:
            self.library = library = ctypes.CDLL(str(path))
        except OSError as error:  # a folder that nothing may run from, or half a file
            remedy = "delete it, or set ROLLOUT_SPEC_CACHE to a folder that libraries may be loaded from"
            raise Unavailable(f"{path} cannot be loaded ({error}); {remedy}") from error
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result

    def pack_bf16(self, weight: Tensor) -> Tensor:
        """bfloat16 weight [N, K] -> its packed form, flat bfloat16; see `bf16_linear.cpp`."""
        weight = _checked(weight, torch.bfloat16, 2)
        packed = self._memory.take(self.library.bf16_packed_size(*weight.shape), torch.bfloat16)
        self.library.bf16_pack(weight.data_ptr(), *weight.shape, packed.data_ptr(), torch.get_num_threads())
        return packed

    def unpack_bf16(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """The weight [N, K] that was packed."""
        weight = torch.empty(shape, dtype=torch.bfloat16)
        self.library.bf16_unpack(packed.data_ptr(), *shape, weight.data_ptr())
        return weight

    def bf16_linear(self, x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """x [M, K] bfloat16 -> [M, N]; sums in float32, and rounds once."""
        x = _checked(x, torch.bfloat16, 2)
        rows, columns = x.shape
        y = torch.empty((rows, out_features), dtype=torch.bfloat16)
        self.library.bf16_linear(
            x.data_ptr(), rows, columns, out_features, packed.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def quantize(self, kind: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K], float32 or bfloat16 -> packed uint8, and for int8 a float32 scale per row (of N padded to 16).

        The layout is described in `quantized_linear.cpp`. NaNs and infinities make the scale of their row (int8) or
        of their group NaN.
        """
        weight = weight.contiguous()
        packed = self._memory.take(self.library.quantized_size(KINDS[kind], *weight.shape), torch.uint8)
        scales = torch.empty(-(-weight.shape[0] // 16) * 16, dtype=torch.float32) if kind == "int8" else None
        self.library.quantize(
            KINDS[kind], _is_bf16(weight), weight.data_ptr(), *weight.shape, packed.data_ptr(),
            None if scales is None else scales.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return packed, scales

    def quantized_linear(
        self, kind: str, x: Tensor, packed: Tensor, scales: Tensor | None, out_features: int
    ) -> Tensor:
        """x [M, K], float32 or bfloat16 -> [M, N] in its dtype; x is rounded to 8 bits with a scale per row."""
        x = x.contiguous()
        rows, columns = x.shape
        y = torch.empty((rows, out_features), dtype=x.dtype)
        self.library.quantized_linear(
            KINDS[kind], _is_bf16(x), x.data_ptr(), rows, columns, out_features, packed.data_ptr(),
            None if scales is None else scales.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        sequences: Tensor,
        first: Tensor,
        last: Tensor,
    ) -> Tensor:
        """Attention of rows over a stretch of their sequences; a row's bits depend on nothing else.

        Args:
            q: `[R, heads, head_dim]`, float32 or bfloat16; head_dim a multiple of 16.
            keys: `[kv_heads, blocks, block_size, head_dim]`, contiguous, of q's dtype.
            values: The same.
            tables: Block tables int64 `[B, width]`.
            sequences: The line of `tables` that is each row's, int64 `[R]`.
            first: The first entry each row sees, int64 `[R]`.
            last: The entry behind the last one, int64 `[R]`; a row that sees none gives zeros.

        Returns:
            `[R, heads * head_dim]` in q's dtype.
        """
        rows, heads, head_dim = q.shape
        q = _heads_together(q)
        assert (
            head_dim % 16 == 0 and keys.is_contiguous() and values.is_contiguous() and keys.dtype == q.dtype
        )
        assert all(x.is_contiguous() and x.dtype == torch.int64 for x in (tables, sequences, first, last))
        assert len(sequences) == len(first) == len(last) == rows
        kv_heads, blocks, block_size, _ = keys.shape
        out = torch.empty((rows, heads * head_dim), dtype=q.dtype)
        self.library.attention(
            q.dtype == torch.bfloat16, q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(),
            blocks * block_size * head_dim, block_size, head_dim, heads, kv_heads, tables.data_ptr(), tables.shape[1],
            sequences.data_ptr(), first.data_ptr(), last.data_ptr(), rows, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def store_entries(self, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write k and v `[R, kv_heads, head_dim]` at flat `rows` int64 `[R * kv_heads]` of keys and values `[.., head_dim]`."""
        count, kv_heads, head_dim = k.shape
        k, v = _heads_together(k), _heads_together(v)
        assert k.dtype == v.dtype == keys.dtype and rows.is_contiguous()
        self.library.store_entries(
            k.element_size(), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), rows.data_ptr(), count, kv_heads,
            head_dim, keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x `[R, H]` over its root mean square, rounded to its dtype (float32 or bfloat16), times weight `[H]`."""
        is_bf16, x = _is_bf16(x), x.contiguous()
        out = torch.empty_like(x)
        self.library.rms_norm(
            is_bf16, x.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def norm_rotate(
        self, x: Tensor, heads: int, weight: Tensor | None, cosine: Tensor, signed_sine: Tensor, eps: float
    ) -> None:
        """Normalise, if weight `[heads, head_dim]` is given, and rotate the first `heads` heads of x, in place.

        Args:
            x: `[R, all heads, head_dim]` contiguous, float32 or bfloat16.
            heads: How many are rotated.
            weight: Of the norm, a line per head.
            cosine: `[R, 1, head_dim]`, contiguous, as `RotaryTable` gives it.
            signed_sine: The same.
            eps: Added to the mean square.
        """
        rows, every, head_dim = x.shape
        assert (
            x.is_contiguous()
            and cosine.is_contiguous()
            and signed_sine.is_contiguous()
            and cosine.dtype == x.dtype
        )
        self.library.norm_rotate(
            x.dtype == torch.bfloat16, x.data_ptr(), every * head_dim, None if weight is None else weight.data_ptr(),
            cosine.data_ptr(), signed_sine.data_ptr(), rows, heads, head_dim, eps, torch.get_num_threads(),
        )  # fmt: skip

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate_up `[R, 2F]`, gate first; `[R, F]` in its dtype, float32 or bfloat16."""
        is_bf16, gate_up = _is_bf16(gate_up), gate_up.contiguous()
        rows, width = gate_up.shape
        out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
        self.library.gated_silu(
            is_bf16, gate_up.data_ptr(), rows, width // 2, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def uniform_noise(self, keys: Tensor, offsets: Tensor, hashes: Tensor, out: Tensor) -> None:
        """What `noise.exponential` takes the logarithm of.

        Args:
            keys: int64, of `rows` rows.
            offsets: Of the stream's three words, int64 [3].
            hashes: Of the vocabulary, int32 [V].
            out: float32 of `rows * V` elements, contiguous; written to.
        """
        keys = keys.contiguous()
        assert keys.dtype == offsets.dtype == torch.int64 and hashes.dtype == torch.int32
        assert (
            out.dtype == torch.float32 and out.is_contiguous() and out.numel() == keys.numel() * len(hashes)
        )
        self.library.uniform_noise(
            keys.data_ptr(), offsets.data_ptr(), hashes.data_ptr(), keys.numel(), len(hashes), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def race(self, p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The coupled choice of every row, see `sampling/verify.py`.

        Args:
            p: Probabilities, float32 [R, V], V a multiple of 16.
            noise: Exp(1) of the groups in the first V / 16 columns and of a group's members in the last 16, float32
                [R, W]; it is used up.

        Returns:
            Tokens int64 [R], and the lead of each float32 [R], as a ratio: over the next group, or over the next member
            of its own.
        """
        p = _checked(p, torch.float32, 2)
        rows, size = p.shape
        assert size % 16 == 0 and noise.dtype == torch.float32 and noise.is_contiguous()
        assert len(noise) == rows and noise.shape[1] >= size // 16 + 16
        tokens, leads = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self.library.race(
            p.data_ptr(), rows, size // 16, noise.data_ptr(), noise.shape[1], tokens.data_ptr(), leads.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return tokens, leads


def _heads_together(x: Tensor) -> Tensor:
    """x [R, heads, head_dim] with a row's elements in one piece; rows may be apart."""
    together = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if together else x.clone(memory_format=torch.contiguous_format)


def _is_bf16(x: Tensor) -> bool:
    assert x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.dim() == 2, (
        x.device,
        x.dtype,
        x.shape,
    )
    return x.dtype == torch.bfloat16


def _checked(x: Tensor, dtype: torch.dtype, dimensions: int) -> Tensor:
    assert x.is_cpu and x.dtype == dtype and x.dim() == dimensions, (x.device, x.dtype, x.shape)
    return x.contiguous()


@cache
def kernels() -> Kernels | None:
    """This machine's kernels, built if need be; None, and one line in the log, if they cannot be had."""
    reasons = []
    try:
        names = variants()
    except Unavailable as none:
        names, reasons = [], [none]
    for name in names:
        try:
            found = Kernels(build(name), name)
        except Unavailable as failure:
            reasons.append(failure)
            continue
        if reasons:
            logger.warning(
                "CPU kernels for %s are not available, those for %s are used: %s", names[0], name, reasons[0]
            )
        return found
    logger.warning("CPU kernels are not available, torch's own are used: %s", reasons[-1])
    return None
