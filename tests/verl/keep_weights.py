"""For runs without the plugin: lets verl load weights into vLLM's linears on a CPU, where vLLM packs and drops them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from rollout_spec.integrations.after_import import after_import


def keep(module: ModuleType) -> None:
    def dispatch_cpu_unquantized_gemm(layer: Any, *_: Any, **__: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm  # type: ignore[attr-defined]


after_import("vllm.model_executor.layers.utils", keep)
