"""4-bit integers with a scale and an offset per 64 weights, through PyTorch's weight-only kernels."""

from __future__ import annotations

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
ROWS = 64  # the CPU kernel's widest panel; other panel widths divide it
INNER_K_TILES = 4


class Int4Linear(QuantizedLinear):
    """weight = (q - 8) * scale + offset per group, q in 0..15; activations are cast to bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        n, self.columns = padded = round_up(self.out_features, ROWS), round_up(self.in_features, GROUP)
        affine = torch.empty(n, self.columns // GROUP, 2, dtype=torch.bfloat16, device=weight.device)
        packed = []
        for start, block in fp32_row_blocks(weight, padded, ROWS):
            groups = block.view(len(block), -1, GROUP)
            low, high = groups.amin(2), groups.amax(2)
            own = affine[start : start + len(block)]
            own[..., 0] = (high - low).div_(15).clamp_min_(1e-30)
            own[..., 1] = low + 8 * own[..., 0].float()
            scale, offset = own.float()[..., None].unbind(2)
            q = groups.sub_(offset).div_(scale).add_(8).round_().to(torch.int32).clamp_(0, 15)
            packed.append(_pack(q.view_as(block)))
        self.packed = torch.cat(packed)
        self.affine = affine.transpose(0, 1).contiguous()

    def matmul(self, x: Tensor) -> Tensor:
        x = pad_columns(x, self.columns).to(torch.bfloat16).contiguous()
        if x.device.type == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.affine)
        return torch.ops.aten._weight_int4pack_mm(x, self.packed, GROUP, self.affine)

    def payload(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "affine": self.affine}

    def dequantized(self) -> Tensor:
        """Read through the kernel, because the packed layout depends on the processor; rounded to bfloat16."""
        identity = torch.eye(self.in_features, device=self.packed.device, dtype=torch.bfloat16)
        return self.matmul(identity)[:, : self.out_features].t().float()


def _pack(q: Tensor) -> Tensor:
    """q: [rows, K] int32 in 0..15 -> the kernel's layout, which keeps panels of rows apart."""
    if q.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)


class Int4Quantizer(KernelQuantizer):
    """4-bit integer weights, bfloat16 activations."""

    name = "int4"
    bits = 4

    def stock_missing(self, device: torch.device) -> str | None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or higher"
        if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "needs a CPU with AVX2 or AVX512"
        return None

    def stock_layer(self, device: torch.device) -> type[QuantizedLinear]:
        return Int4Linear
