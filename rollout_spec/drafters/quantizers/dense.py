"""No quantization: a drafter that equals its target, as a control in tests and ablations."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer
from rollout_spec.models.linear import make_linear


class DenseLinear(QuantizedLinear):
    """The weight itself in its own dtype, on the kernel that the target's linears use."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.linear = make_linear(
            weight.detach().clone(memory_format=torch.contiguous_format), device=weight.device
        )
        self._dtype = weight.dtype

    def matmul(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self._dtype).contiguous())

    def payload(self) -> dict[str, Tensor]:
        return {"weight": self.linear.dense()}

    def dequantized(self) -> Tensor:
        return self.payload()["weight"].float()


class DenseQuantizer(Quantizer):
    """Weights as they are."""

    name = "dense"
    bits = 16

    def missing(self, device: torch.device) -> str | None:
        return None

    def layer_type(self, device: torch.device) -> type[QuantizedLinear]:
        return DenseLinear
