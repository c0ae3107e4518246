"""8-bit weights (one scale per output row) times 8-bit activations (one scale per input row).

A scale per activation row, rather than one per batch as PyTorch's own dynamic linear uses, keeps a row's
draft independent of the rows it is batched with.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import (
    QuantizedLinear,
    quantize_rows_int8,
    round_up,
)
from rollout_spec.drafters.quantizers.kernel import KernelQuantizer

MULTIPLE = 16  # of rows and columns, for cuBLASLt
LEAST_ROWS = 32  # CUDA's `_int_mm` needs more than 16


@cache
def activation_levels() -> int:
    """Positive activation levels on this CPU: 127, or 63 where fbgemm sums products in saturating 16 bits."""
    return 127 if torch.cpu._is_vnni_supported() else 63


class FbgemmInt8Linear(QuantizedLinear):
    """Int8 on CPU through fbgemm's prepacked unsigned-by-signed product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        q, scale = quantize_rows_int8(weight, (self.out_features, self.in_features))
        zero_points = torch.zeros(self.out_features, dtype=torch.long)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with (
                warnings.catch_warnings()
            ):  # quantized tensors are deprecated; `_fbgemm` covers their removal
                warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
                quantized = torch._make_per_channel_quantized_tensor(q, scale.double(), zero_points, 0)
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = engine

    def matmul(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = x.abs().amax(1, keepdim=True).mul_(1 / activation_levels()).clamp_min_(1e-30)
        zero_point = activation_levels() + 1
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1.0, zero_point, self.packed
        )
        return y.mul_(scale)

    def payload(self) -> dict[str, Tensor]:
        weight, _ = torch.ops.quantized.linear_unpack(self.packed)
        return {"weight": weight.int_repr(), "scale": weight.q_per_channel_scales().float()}

    def dequantized(self) -> Tensor:
        return _dequantize(**self.payload())

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.out_features * (self.in_features + 4) + bias


class Int8Linear(QuantizedLinear):
    """Int8 through `torch._int_mm`, for CUDA and for CPUs without fbgemm."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        padded = round_up(self.out_features, MULTIPLE), round_up(self.in_features, MULTIPLE)
        self.weight, self.scale = quantize_rows_int8(weight, padded)

    def matmul(self, x: Tensor) -> Tensor:
        rows = len(x)
        scale = x.abs().amax(1, keepdim=True).float().mul_(1 / 127).clamp_min_(1e-30)
        q = x.new_zeros(max(rows, LEAST_ROWS), self.weight.shape[1], dtype=torch.int8)
        q[:rows, : self.in_features] = (x / scale).round_()
        return torch._int_mm(q, self.weight.t())[:rows].float().mul_(scale).mul_(self.scale)

    def payload(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "scale": self.scale}

    def dequantized(self) -> Tensor:
        return _dequantize(self.weight, self.scale)[: self.out_features, : self.in_features]


def _fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"
    )


def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float().mul_(scale[:, None])


class Int8Quantizer(KernelQuantizer):
    """8-bit weights and activations."""

    name = "int8"
    bits = 8

    def stock_missing(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not _fbgemm() and torch.backends.cpu.get_cpu_capability() != "AVX512":
            return "needs a PyTorch build with fbgemm, or a CPU with AVX512"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
            return "needs a GPU of compute capability 7.5 or higher"
        return None

    def stock_layer(self, device: torch.device) -> type[QuantizedLinear]:
        return FbgemmInt8Linear if device.type == "cpu" and _fbgemm() else Int8Linear
