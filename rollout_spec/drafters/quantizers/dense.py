"""No quantization: a drafter that equals its target, as a control in tests and ablations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer

PACKED_FOR_ROWS = 4


class DenseLinear(QuantizedLinear):
    """The weight itself in its own dtype; on CPU packed for oneDNN where that supports the dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        if self.weight.device.type == "cpu" and _packs(self.weight.dtype):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)

    def matmul(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype).contiguous()
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def payload(self) -> dict[str, Tensor]:
        return {"weight": self.weight.to_dense() if self.weight.is_mkldnn else self.weight}

    def dequantized(self) -> Tensor:
        return self.payload()["weight"].float()


def _packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class DenseQuantizer(Quantizer):
    """Weights as they are."""

    name = "dense"
    bits = 16

    def missing(self, device: torch.device) -> str | None:
        return None

    def layer_type(self, device: torch.device) -> type[QuantizedLinear]:
        return DenseLinear
