"""4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), one scale per 64 weights, bitsandbytes kernels.

On CPU the weight goes straight into the layout of bitsandbytes' AVX512-BF16 kernel; the bytes equal those of
its own `quantize_4bit` followed by `_convert_weight_packed_for_cpu`, which takes over ten times as long.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import (
    QuantizedLinear,
    fp32_row_blocks,
    pad_columns,
    round_up,
)
from rollout_spec.drafters.quantizers.kernel import KernelQuantizer

GROUP = 64
PANEL = 32  # rows interleaved in bitsandbytes' packed CPU layout
BINS = 64
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@cache
def _bitsandbytes() -> ModuleType:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about an optional kernel download that is not used here
    try:
        import bitsandbytes.functional
    finally:
        log.setLevel(level)
    return bitsandbytes.functional


def _bin(v: Tensor) -> Tensor:
    """Which of `BINS` equal parts of [-1, 1] each value is in; monotone, int32, NaN gets a valid bin too."""
    return v.add(1).mul_(BINS / 2).to(torch.int32).clamp_(0, BINS - 1)


@cache
def _bin_tables() -> tuple[Tensor, Tensor]:
    """Per bin: the number of code boundaries in lower bins (uint8), and its own boundary or inf (float32).

    Bins are narrower than the distance between boundaries, so that a value's code, the number of boundaries
    below it, is one lookup plus one comparison.
    """
    levels = torch.tensor(LEVELS)
    boundaries = (levels[:-1] + levels[1:]) / 2
    bins = _bin(boundaries)
    boundary = torch.full((BINS,), float("inf"))
    boundary[bins.long()] = boundaries
    below = (bins[None] < torch.arange(BINS)[:, None]).sum(1, dtype=torch.uint8)
    return below, boundary


def _codes(v: Tensor) -> Tensor:
    """v: float32 in [-1, 1] -> nearest level's index, uint8; a value on a boundary takes the lower one."""
    below, boundary = _bin_tables()
    bins = _bin(v).view(-1)
    codes = below.index_select(0, bins)
    above = boundary.index_select(0, bins)
    torch.gt(v.view(-1), above, out=above)
    return codes.add_(above.to(torch.uint8)).view_as(v)


class PackedNf4Linear(QuantizedLinear):
    """NF4 on CPU; activations are cast to bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        n, k = self.padded = round_up(self.out_features, PANEL), round_up(self.in_features, GROUP)
        self.levels = torch.tensor(LEVELS)
        packed = torch.empty(n // PANEL, k // 2, PANEL // 2, dtype=torch.int16)
        absmax = torch.empty(n, k // GROUP)
        for start, block in fp32_row_blocks(weight, self.padded, PANEL):
            stop = start + len(block)
            groups = block.view(len(block), -1, GROUP)
            scale = torch.amax(groups.abs(), 2, out=absmax[start:stop])
            codes = _codes(groups.mul_(scale.clamp(min=1e-38).reciprocal_()[..., None]))
            halves = codes.view(torch.int32).view(-1, 2, PANEL // 2, k // 4)
            pairs = (halves[:, 1] << 4).bitwise_or_(halves[:, 0]).view(torch.int16)
            packed[start // PANEL : stop // PANEL] = pairs.transpose(1, 2)
        self.packed = packed.view(torch.uint8).view(n, k // 2)
        self.absmax = absmax.t().to(torch.bfloat16).contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        x = pad_columns(x, self.padded[1]).to(torch.bfloat16).contiguous()
        return torch.ops.bitsandbytes.gemv_4bit(x, self.packed, self.padded, self.absmax, self.levels, GROUP)

    def payload(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "absmax": self.absmax}

    def dequantized(self) -> Tensor:
        n, k = self.padded
        pairs = self.packed.view(n // PANEL, k // 2, PANEL // 2, 2)
        codes = torch.cat([pairs & 15, pairs >> 4], 2).transpose(1, 2).reshape(n, k)
        groups = self.levels[codes.long()].view(n, -1, GROUP) * self.absmax.t().float()[..., None]
        return groups.view(n, k)[: self.out_features, : self.in_features]


class Nf4Linear(QuantizedLinear):
    """NF4 in bitsandbytes' standard layout, for CUDA."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.columns = round_up(self.in_features, GROUP)
        self.functional = _bitsandbytes()
        self.packed, self.state = self.functional.quantize_4bit(
            pad_columns(weight, self.columns).contiguous(), blocksize=GROUP, quant_type="nf4"
        )

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        return bitsandbytes.matmul_4bit(pad_columns(x, self.columns).contiguous(), self.packed, self.state)

    def payload(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "absmax": self.state.absmax}

    def dequantized(self) -> Tensor:
        return self.functional.dequantize_4bit(self.packed, self.state)[:, : self.in_features].float()


class Nf4Quantizer(KernelQuantizer):
    """4-bit NormalFloat weights through bitsandbytes."""

    name = "nf4"
    bits = 4

    def stock_missing(self, device: torch.device) -> str | None:
        try:
            functional = _bitsandbytes()
        except Exception as error:
            return f"needs a working bitsandbytes (pip install bitsandbytes); importing it failed: {error}"
        if device.type == "cpu" and not functional.has_avx512bf16():
            return "needs a C++ compiler (g++), or a CPU with AVX512-BF16; int8 is the alternative"
        return None

    def stock_layer(self, device: torch.device) -> type[QuantizedLinear]:
        _bitsandbytes()
        return PackedNf4Linear if device.type == "cpu" else Nf4Linear
