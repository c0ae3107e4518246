"""The norms and gates of an eager drafter on a CPU, by this project's kernels.

Uncompiled, vLLM computes each of them with half a dozen operations of PyTorch, which for one token take longer together
than reading a layer's quantized weights. The target keeps vLLM's: what is emitted follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from rollout_spec.kernels.library import Kernels, kernels


def use_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the norms and gates of `model`, which computes in `dtype` on a CPU, run on kernels, if there are any."""
    own = kernels()
    if own is None or dtype not in (torch.float32, torch.bfloat16):
        return
    for module in model.modules():
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            if module.weight.dtype == dtype:
                _rebind(module, partial(_norm, own, module))
        elif type(module) is SiluAndMul:
            _rebind(module, partial(_gate, own))


def _rebind(layer: Any, forward: Callable[..., Any]) -> None:
    layer._forward_method = forward


def _norm(
    kernels: Kernels, layer: RMSNorm, x: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x [.., H], with `residual` its sum with that, which is returned too."""
    if residual is not None:
        x = x + residual
    rows = x.reshape(-1, x.shape[-1])
    normed = kernels.rms_norm(rows, layer.weight, layer.variance_epsilon).view(x.shape)
    return normed if residual is None else (normed, x)


def _gate(kernels: Kernels, x: Tensor) -> Tensor:
    """silu of the first half of x [.., 2F], times the second."""
    return kernels.gated_silu(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], x.shape[-1] // 2)
