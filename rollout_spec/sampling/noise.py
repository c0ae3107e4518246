"""Counter-based noise: every number is a pure function of (key, stream, vocabulary index).

Nothing here holds a generator state, so the noise of a position is the same whether it is drawn in plain
decoding, in a draft step or in a verification row, alone or in a batch, and however often. Keys are int64 and
made in two steps: `fold` on the host once per sample, `row_keys` on the device for every position.

64-bit words are mixed with the finalizer of SplitMix64 (Steele, Lea, Flood 2014, constants by Stafford);
signed int64 arithmetic wraps, and logical shifts are arithmetic shifts with the sign bits masked off.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache, lru_cache

import torch
from torch import Tensor

from rollout_spec.kernels.library import kernels

_MASK64 = 2**64 - 1


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    word &= _MASK64
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = 0x9E3779B97F4A7C15
_WORD_STEP = 0xD1B54A32D192ED03
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUND = (0x7FEB352D, 0x846CA68B - 2**32)  # lowbias32 (Wellons 2018)


class Stream(IntEnum):
    """What a number is used for. Two streams of one row are independent.

    TARGET is the shared noise of coupled sampling (target and drafter); DRAFT, ACCEPT and RESIDUAL are the
    three draws of rejection sampling, which must not share noise (vllm#54282).
    """

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def fold(*words: int) -> int:
    """Mix any Python integers, in order, into one int64 key (host side).

    Every word enters with its length in 64-bit limbs and its sign, so (1, 2), (2, 1) and (1 + (2 << 64),)
    give unrelated keys.
    """
    state = _GOLDEN
    for word in words:
        word = int(word)
        limbs = word.bit_length() // 64 + 1
        state = _mix_int(state ^ limbs)
        for i in range(limbs):
            state = _mix_int(_mix_int(state + _GOLDEN) ^ (word >> (64 * i)) & _MASK64)
    return _signed(state)


def _mix_int(x: int) -> int:
    x &= _MASK64
    x = ((x ^ x >> 30) * _MIX[0]) & _MASK64
    x = ((x ^ x >> 27) * _MIX[1]) & _MASK64
    return x ^ x >> 31


def _mix(x: Tensor) -> Tensor:
    """`_mix_int` on int64 tensors."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(_MIX[0])
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(_MIX[1])
    return x ^ (x >> 31 & (1 << 33) - 1)


def row_keys(base: Tensor, version: Tensor | int, position: Tensor) -> Tensor:
    """Keys of the rows of a batch.

    Args:
        base: int64 [B], from `fold`.
        version: int64 [B] or one int in [0, 2**31): the policy version the row is sampled under.
        position: int64 [B, S] in [0, 2**32): index in the whole sequence, prompt included, of the token
            being sampled.

    Returns:
        int64 [B, S]. Distinct (version, position) under one base never collide: SplitMix64's output
        function applied to base + golden * (version << 32 | position).
    """
    step = _signed(_GOLDEN << 32)
    start = base + (version * step if isinstance(version, Tensor) else _signed(version * step))
    return _mix(start.unsqueeze(-1) + position * _signed(_GOLDEN))


@cache
def _word_offsets(stream: Stream, count: int, device: torch.device) -> Tensor:
    offsets = [_signed(_WORD_STEP * (8 * int(stream) + i + 1)) for i in range(count)]
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def _words(keys: Tensor, stream: Stream, count: int) -> Tensor:
    """`count` independent 64-bit words per key and stream: int64 [..., count]."""
    return _mix(keys.unsqueeze(-1) + _word_offsets(stream, count, keys.device))


@lru_cache(maxsize=8)
def _vocab_hash(vocab_size: int, device: torch.device) -> Tensor:
    """int32 [V]: lowbias32 of the vocabulary index, a bijection, so that no two tokens share their noise."""
    mask = 2**32 - 1
    x = torch.arange(vocab_size, dtype=torch.int64, device=device) + 0x9E3779B9
    x = (x ^ x >> 16) * _ROUND[0] & mask
    x = (x ^ x >> 15) * _ROUND[1] & mask
    x = x ^ x >> 16
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _xorshift(x: Tensor, shift: int, out: Tensor) -> Tensor:
    """out = x ^ (x >>> shift) on int32; `out` must not be x."""
    torch.bitwise_right_shift(x, shift, out=out)
    out.bitwise_and_((1 << (32 - shift)) - 1)
    return out.bitwise_xor_(x)


def exponential(keys: Tensor, vocab_size: int, stream: Stream, out: Tensor | None = None) -> Tensor:
    """Exp(1) noise for every row and token.

    Each element hashes its vocabulary index with six 32-bit words of its row (three multiply-xorshift rounds)
    to a signed integer x, and takes the state one round earlier as a fraction f in [-1/4, 1/4). Then
    v = |x + 1/4 + f| / 2**31 is uniform in (0, 1), in steps of about 2**-53 near zero, and E = -log1p(-v).
    Small E, which wins races, keeps full float32 resolution; 2**-52 < E < 16.7, so it is never 0 or infinite.

    Every pass is an elementwise operation, exact or evaluated alike wherever the element lies, so a row does
    not depend on the rows it is computed with, nor on whether there is a kernel for it.

    Args:
        keys: int64 [..., ], usually [B, S].
        vocab_size: V, a multiple of 64.
        stream: What the noise is for.
        out: float32 [..., V] to write into.

    Returns:
        float32 [..., V].
    """
    if out is None:
        out = torch.empty((*keys.shape, vocab_size), dtype=torch.float32, device=keys.device)
    own = kernels() if keys.is_cpu and out.is_contiguous() else None
    if own is not None:
        hashes = _vocab_hash(vocab_size, keys.device)
        own.uniform_noise(keys, _word_offsets(stream, 3, keys.device), hashes, out)
        return out.log1p_().neg_()
    words = _words(keys, stream, 3).view(torch.int32).unsqueeze(-1)
    k0, k1, k2, k3, k4, k5 = words.unbind(-2)
    x = _vocab_hash(vocab_size, keys.device) * (k0 | 1)
    y = _xorshift(x.add_(k1), 16, out=torch.empty_like(x))
    x = _xorshift(y.mul_(_ROUND[0]).add_(k2), 15, out=x)
    x.mul_(_ROUND[1]).add_(k3)
    y = _xorshift(x, 16, out=y).mul_(k4 | 1).add_(k5)
    return _from_bits(y, x, out)


def _from_bits(whole: Tensor, fraction: Tensor, out: Tensor) -> Tensor:
    """Exp(1) from two int32 words."""
    out.copy_(whole).add_(0.25 + 2.0**-20)
    out.add_(fraction, alpha=2.0**-33)  # a power of two, so that a fused multiply-add rounds alike
    out.abs_().mul_(-(2.0**-31) * (1 - 2.0**-24))
    return out.log1p_().neg_()


def uniform(keys: Tensor, stream: Stream) -> Tensor:
    """Uniform numbers in (0, 1) with 52 bits: float64, the shape of `keys`."""
    word = _words(keys, stream, 1).squeeze(-1)
    return ((word >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52
