"""The drafter's norms and gates on this project's kernels are those of vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from rollout_spec.integrations.vllm.elementwise import use_kernels

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_they_compute_what_vllm_computes(dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        heads, hidden, gate = RMSNorm(32, 1e-3, dtype=dtype), RMSNorm(64, 1e-3, dtype=dtype), SiluAndMul()
        other = RMSNorm(64, var_hidden_size=32, dtype=dtype)
    for layer in (heads, hidden, other):
        nn.init.normal_(layer.weight)
    native: list[Any] = [layer._forward_method for layer in (heads, hidden, gate, other)]
    use_kernels(nn.ModuleList([heads, hidden, gate, other]), dtype)
    assert [layer._forward_method != was for layer, was in zip((heads, hidden, gate, other), native)] == [
        True,
        True,
        True,
        False,  # a norm over part of its width
    ]
    x, residual = torch.randn(5, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    found, expected = hidden(x.clone(), residual.clone()), native[1](x.clone(), residual.clone())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
    by_head = torch.randn(5, 6, 32, dtype=dtype)[:, :4]  # queries lie beside keys
    torch.testing.assert_close(heads(by_head), native[0](by_head), rtol=near, atol=near)
    torch.testing.assert_close(gate(x), native[2](x), rtol=near, atol=near)
