"""What the decoder does between its linears: on this project's CPU kernels where they are, else in torch's operations.

Both round where transformers does, and treat every row alone, to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.library import Kernels, kernels
from rollout_spec.models.rope import rotate

_GRAIN = 32768  # at::internal::GRAIN_SIZE: elements an elementwise CPU kernel leaves to one thread


def _own(x: Tensor) -> Kernels | None:
    return kernels() if x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) else None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x[R, H] with weight[H]."""
    own = _own(x)
    if own is not None:
        return own.rms_norm(x, weight, eps)
    # The weight is applied outside `rms_norm`: transformers' rounding in bf16, and no slower.
    return torch.rms_norm(x, weight.shape, None, eps).mul_(weight)


def norm_rotate(
    qkv: Tensor, rotated: int, weight: Tensor | None, cos: Tensor, signed_sin: Tensor, eps: float
) -> Tensor:
    """The first `rotated` heads of qkv[R, heads, hd], normalised with weight[rotated, hd] if any, then rotated.

    `cos` and `signed_sin` come from `RotaryTable`. May write over qkv.
    """
    own = _own(qkv)
    if own is not None:
        own.norm_rotate(qkv, rotated, weight, cos, signed_sin, eps)
        return qkv[:, :rotated]
    qk = qkv[:, :rotated]
    if weight is not None:
        qk = torch.rms_norm(qk, weight.shape[1:], None, eps).mul_(weight)
    return rotate(qk, cos, signed_sin)


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up[R, 2F], gate first; [R, F] contiguous."""
    own = _own(gate_up)
    return own.gated_silu(gate_up) if own is not None else _gated_silu(gate_up)


def _gated_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    rows, width = gate.shape
    if rows * width <= _GRAIN or not gate.is_cpu or torch.get_num_threads() == 1:
        return F.silu(gate).mul_(up)
    # torch cuts the elements into equal ranges, one per thread, and computes the end of a range with scalar code,
    # whose exp differs in the last bit. Runs of rows that split evenly keep each row's cut points fixed.
    activated = torch.empty((rows, width), dtype=gate.dtype)
    start = 0
    while start < rows:
        stop = start + _even_run(rows - start, width, torch.get_num_threads())
        torch.ops.aten.silu.out(gate[start:stop], out=activated[start:stop])
        start = stop
    return activated.mul_(up)


def _even_run(rows: int, width: int, threads: int) -> int:
    """The most rows, at most `rows`, that torch's threads share in whole rows."""
    run = rows
    while run > 1 and run % min(threads, -(-run * width // _GRAIN)):
        run -= 1
    return run
