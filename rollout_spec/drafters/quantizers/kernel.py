"""Quantized linears on this project's own CPU kernels: int8, int4 and nf4 weights, 8-bit activations.

Activations have one scale per row, so that a row's draft does not depend on the rows it is batched with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer, one_thread, round_up
from rollout_spec.kernels.decoder_layer import KernelWeight
from rollout_spec.kernels.library import Kernels, kernels

PANEL, GROUP = 16, 64
NF4_LEVELS = (0, 10, 15, 19, 23, 26, 29, 32, 35, 37, 40, 43, 46, 50, 55, 64)  # in 32nds, plus 32


class KernelQuantizedLinear(QuantizedLinear):
    """A weight in the layout of `kernels/quantized_linear.cpp`; runs in float32 and bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, kind: str, kernels: Kernels) -> None:
        super().__init__(weight, bias)
        self.kind, self._kernels = kind, kernels
        self.packed, self.scales = kernels.quantize(kind, _supported(weight.detach()))

    def matmul(self, x: Tensor) -> Tensor:
        return self._kernels.quantized_linear(
            self.kind, _supported(x), self.packed, self.scales, self.out_features
        )

    def for_kernels(self) -> KernelWeight | None:
        """The packed weight, unless a bias is added to its product."""
        if self.bias is not None:
            return None
        shape = (self.out_features, self.in_features)
        return KernelWeight(self._kernels, self.kind, shape, self.packed, self.scales)

    def payload(self) -> dict[str, Tensor]:
        scales = {} if self.scales is None else {"scales": self.scales}
        return {"packed": self.packed, **scales}

    def dequantized(self) -> Tensor:
        n, k = round_up(self.out_features, PANEL), round_up(self.in_features, GROUP)
        if self.scales is not None:
            lines = self.packed.view(torch.int8).view(n // PANEL, k // 4, PANEL, 4)
            weight = lines.transpose(1, 2).reshape(n, k).float() * self.scales[:, None]
        else:
            weight = self._from_codes(self.packed.view(n // PANEL, k // GROUP, -1)).view(n, k)
        return weight[: self.out_features, : self.in_features].contiguous()

    def _from_codes(self, blocks: Tensor) -> Tensor:
        """Blocks [panels, groups, bytes] -> [panels, 16, groups, 64] float32."""
        size = PANEL * GROUP // 2
        lines = blocks[..., :size].unflatten(2, (GROUP // 8, PANEL, 4))
        codes = torch.stack((lines & 15, lines >> 4), 4).permute(0, 3, 1, 2, 4, 5).flatten(3).long()
        affine = blocks[..., size:].contiguous().view(torch.bfloat16).float().unflatten(2, (-1, PANEL))
        scale, *offset = affine.permute(2, 0, 3, 1)[..., None]
        if self.kind == "int4":
            return codes * scale + offset[0]
        return (torch.tensor(NF4_LEVELS)[codes] - 32) * scale


def _supported(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


class KernelQuantizer(Quantizer):
    """A kind that has a kernel of this project's for CPUs; elsewhere, and without a compiler, a stock one."""

    def missing(self, device: torch.device) -> str | None:
        return self.stock_missing(device) if _kernels(device) is None else None

    def layer_type(self, device: torch.device) -> Callable[[Tensor, Tensor | None], QuantizedLinear]:
        own = _kernels(device)
        if own is not None:
            return partial(KernelQuantizedLinear, kind=self.name, kernels=own)
        return _on_one_thread(self.stock_layer(device))

    @abstractmethod
    def stock_missing(self, device: torch.device) -> str | None:
        """What this machine lacks for the stock kernel on `device`, or None."""

    @abstractmethod
    def stock_layer(self, device: torch.device) -> type[QuantizedLinear]:
        """The layer on a stock kernel."""


def _kernels(device: torch.device) -> Kernels | None:
    return kernels() if device.type == "cpu" else None


def _on_one_thread(layer: type[QuantizedLinear]) -> Callable[[Tensor, Tensor | None], QuantizedLinear]:
    def make(weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        with one_thread():
            return layer(weight, bias)

    return make
