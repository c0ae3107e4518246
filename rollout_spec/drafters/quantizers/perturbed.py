"""A quantizer that first adds noise to the weights: a drafter as bad as one wants, for measurements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer


class PerturbedQuantizer(Quantizer):
    """`base`, applied to `weight + noise * std(weight) * N(0, 1)`.

    A small trained policy quantizes kindly; larger ones accept less. Noise brings acceptance down to a wanted
    value without touching what is emitted or what a step costs.
    """

    def __init__(self, base: Quantizer, noise: float, seed: int = 0) -> None:
        self.base, self.noise = base, noise
        self.name, self.bits = base.name, base.bits
        self._generator = torch.Generator().manual_seed(seed)

    def missing(self, device: torch.device) -> str | None:
        return self.base.missing(device)

    def layer_type(self, device: torch.device) -> Callable[[Tensor, Tensor | None], QuantizedLinear]:
        make = self.base.layer_type(device)

        def perturbed(weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
            noise = torch.randn(weight.shape, generator=self._generator).to(weight)
            return make(weight + self.noise * weight.std() * noise, bias)

        return perturbed
