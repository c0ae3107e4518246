"""Linear layers y = x W^T + b, and the choice of kernel per device.

A trajectory can only be the same with and without speculation if a row's result does not depend on how many rows
share its forward pass. `row_invariant` says whether a layer promises that, bit for bit, from `min_rows` rows up.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.decoder_layer import KernelWeight
from rollout_spec.kernels.library import Kernels, kernels


class Linear(Protocol):
    """A linear layer, however its weight is stored."""

    row_invariant: bool
    min_rows: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map x[R, K] to [R, N] in x's dtype."""
        ...

    def dense(self) -> Tensor:
        """The weight [N, K]."""
        ...

    def for_kernels(self) -> KernelWeight | None:
        """The weight for this project's CPU kernels, if one of them is all that the layer is."""
        ...


class PlainLinear:
    """`F.linear` on an ordinary weight[N, K]; the kernel may change with the number of rows."""

    row_invariant = False
    min_rows = 4  # fewer take another path in stock CPU kernels

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """The weight [N, K]."""
        return self.weight

    def for_kernels(self) -> None:
        """There is none."""


class KernelLinear:
    """This project's own CPU kernel for bfloat16, at the memory's speed for few rows; row-invariant by its order of sums.

    Keeps the packed weight only.
    """

    row_invariant = True
    min_rows = 1

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self._shape = (weight.shape[0], weight.shape[1])
        self._kernels, self._packed, self.bias = kernels, kernels.pack_bf16(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.bf16_linear(x, self._packed, self._shape[0], self.bias)

    def dense(self) -> Tensor:
        """The weight [N, K] that was packed, unpacked into new memory."""
        return self._kernels.unpack_bf16(self._packed, self._shape)

    def for_kernels(self) -> KernelWeight:
        """The packed weight."""
        return KernelWeight(self._kernels, "bf16", self._shape, self._packed, bias=self.bias)


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

    def for_kernels(self) -> None:
        """There is none."""


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
    if weight.is_cpu and weight.dtype == torch.bfloat16 and (own := kernels()) is not None:
        return KernelLinear(weight, bias, own)
    return (PackedLinear if can_pack(device, weight.dtype) else PlainLinear)(weight, bias)
