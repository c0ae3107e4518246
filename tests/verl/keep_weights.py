"""For runs without the plugin: lets verl load weights into vLLM's linears on a CPU, where vLLM packs and drops them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from rollout_spec.integrations.after_import import after_import


def keep(module: ModuleType) -> None:
    """vLLM's own products, of what the weights are now: packed again whenever others were loaded."""
    pack = module.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)
        packed, of = layer.cpu_linear, layer.weight.detach().clone()

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            nonlocal packed, of
            if not torch.equal(layer.weight, of):
                pack(layer, remove_weight=False)
                packed, of = layer.cpu_linear, layer.weight.detach().clone()
                layer.cpu_linear = linear
            return packed(x, layer.weight, bias)

        layer.cpu_linear = linear

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm  # type: ignore[attr-defined]


after_import("vllm.model_executor.layers.utils", keep)
