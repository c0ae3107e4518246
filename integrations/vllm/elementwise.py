"""The norms and gates of an eager drafter on a CPU, by this project's kernels.

Uncompiled, vLLM computes each of them with half a dozen operations of PyTorch, which for one token take longer together
than reading a layer's quantized weights. The target keeps vLLM's: what is emitted follows from it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from rollout_spec.kernels.library import Kernels, kernels


def use_kernels(model: nn.Module, dtype: torch.dtype) -> int:
    """Let the norms and gates of `model`, which computes in `dtype` on a CPU, run on kernels; returns how many do."""
    own, count = kernels(), 0
    if own is None or dtype not in (torch.float32, torch.bfloat16):
        return 0
    for module in model.modules():
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            if module.weight.dtype == dtype:
                module._forward_method, count = partial(_norm, own, module), count + 1
        elif type(module) is SiluAndMul:
            module._forward_method, count = partial(_gate, own), count + 1
    return count


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
