"""Linear layers y = x W^T + b, and the choice of kernel per device.

A trajectory can only be the same with and without speculation if a row's result does not depend on how many rows
share its forward pass. `row_invariant` says whether a layer promises that, bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """A linear layer, however its weight is stored."""

    row_invariant: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Map x[R, K] to [R, N] in x's dtype."""
        ...


class PlainLinear:
    """`F.linear` on an ordinary weight[N, K]; the kernel may change with the number of rows."""

    row_invariant = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """The weight [N, K]."""
        return self.weight


class PackedLinear:
    """oneDNN's prepacked CPU kernel: row-invariant for 4 rows and more; fewer are repeated up to 4.

    Keeps the packed weight only. float32 and bfloat16.
    """

    row_invariant = True
    min_rows = 4

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self.min_rows)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows >= self.min_rows:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        repeated = torch.cat((x,) * -(-self.min_rows // rows))
        return torch.ops.mkldnn._linear_pointwise.default(repeated, self._packed, self.bias, "none", [], "")[
            :rows
        ]

    def dense(self) -> Tensor:
        """The weight [N, K] that was packed, unpacked into new memory."""
        return self._packed.to_dense()


def can_pack(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` runs on this device in this dtype."""
    if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def make_linear(weight: Tensor, bias: Tensor | None = None, device: torch.device | str = "cpu") -> Linear:
    """The best linear layer for weight[N, K] and bias[N] on `device`: packed on CPUs, plain elsewhere."""
    weight = weight.to(device)
    bias = None if bias is None else bias.to(device)
    return (PackedLinear if can_pack(device, weight.dtype) else PlainLinear)(weight, bias)
