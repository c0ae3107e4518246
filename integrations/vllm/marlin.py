"""int4 weights on vLLM's Marlin kernel: a drafter's linears on a GPU, as fast as their bytes from one row to dozens.

PyTorch's 4-bit kernel slows down from a few rows on, and bitsandbytes' unpacks the weight first. The kernel's layout:
a tile of 64 columns holds column 8 j + i at place 8 i + j, in scales and zero points alike; zero points are stored
eight to a word, the even ones first.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import (
    QuantizedLinear,
    Quantizer,
    fp32_row_blocks,
    pad_columns,
    round_up,
)

GROUP = 64  # weights that share a scale and a zero point
ROWS, COLUMNS = 64, 128  # of the kernel's smallest tile of a weight
BLOCKS_PER_SM = 4  # the most it starts, a lock each


class MarlinLinear(QuantizedLinear):
    """weight = (q - zero) * scale per group, q and zero in 0..15; activations are cast to the scales' 16-bit dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        dtype = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
        self.rows, self.columns = round_up(self.out_features, ROWS), round_up(self.in_features, COLUMNS)
        words, scales, zeros = quantize_groups(weight, (self.rows, self.columns), dtype)
        self.packed = _repack(words, self.columns, self.rows)
        self.scales = _tiled(scales)
        self.zeros = _packed_zeros(zeros)
        _locks(weight.device).zero_()  # when weights come anew they may have slept, and lost what they held

    def matmul(self, x: Tensor) -> Tensor:
        from vllm import _custom_ops as ops
        from vllm.scalar_type import scalar_types

        x = pad_columns(x, self.columns).to(self.scales.dtype).contiguous()
        y: Tensor = ops.marlin_gemm(
            a=x,
            c=None,
            b_q_weight=self.packed,
            b_bias=None,
            b_scales=self.scales,
            a_scales=None,
            global_scale=None,
            b_zeros=self.zeros,
            workspace=_locks(x.device),
            b_q_type=scalar_types.uint4,
            size_m=len(x),
            size_n=self.rows,
            size_k=self.columns,
            use_fp32_reduce=True,
            **_unused("marlin_gemm", "g_idx", "perm"),
        )
        return y

    def payload(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}

    def dequantized(self) -> Tensor:
        """Read through the kernel, which alone knows the packed layout; rounded to its dtype."""
        identity = torch.eye(self.in_features, device=self.packed.device, dtype=self.scales.dtype)
        return self.matmul(identity)[:, : self.out_features].t().float()


class MarlinQuantizer(Quantizer):
    """4-bit integer weights, bfloat16 or float16 activations."""

    name = "int4"
    bits = 4

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or higher"
        import vllm._custom_ops  # noqa: F401  # loads the operators

        has = hasattr(torch.ops._C, "marlin_gemm") and hasattr(torch.ops._C, "gptq_marlin_repack")
        return None if has else "this build of vLLM has no Marlin kernel"

    def layer_type(self, device: torch.device) -> type[QuantizedLinear]:
        return MarlinLinear


def quantize_groups(
    weight: Tensor, padded: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [N, K] -> 4-bit codes, eight along K to an int32 word [K / 8, N], `dtype` scales and int32 zero points
    [K / 64, N], all of the `padded` (N, K)."""
    n, k = padded
    words = torch.empty(k // 8, n, dtype=torch.int32, device=weight.device)
    scales = torch.empty(k // GROUP, n, dtype=dtype, device=weight.device)
    zeros = torch.empty(k // GROUP, n, dtype=torch.int32, device=weight.device)
    for start, block in fp32_row_blocks(weight, padded, ROWS):
        own = slice(start, start + len(block))
        groups = block.view(len(block), -1, GROUP)
        low, high = groups.amin(2).clamp_max_(0), groups.amax(2).clamp_min_(0)
        scale = (high - low).div_(15).clamp_min_(torch.finfo(dtype).tiny).to(dtype)
        zero = (-low / scale.float()).round_().clamp_(0, 15)
        codes = groups.div_(scale.float()[..., None]).add_(zero[..., None]).round_().clamp_(0, 15)
        words[:, own] = _words(codes.to(torch.int32).view_as(block)).t()
        scales[:, own], zeros[:, own] = scale.t(), zero.to(torch.int32).t()
    return words, scales, zeros


def _words(codes: Tensor) -> Tensor:
    """[R, C] int32 in 0..15 -> [R, C / 8] int32, the first code in the lowest bits."""
    eight = codes.view(len(codes), -1, 8)
    word = eight[..., 0].clone()
    for place in range(1, 8):
        word |= eight[..., place] << (4 * place)
    return word


def _tiled(x: Tensor) -> Tensor:
    """[G, N] -> the same with the columns of each 64 in the kernel's order."""
    return x.view(len(x), -1, 8, 8).transpose(2, 3).flatten(1).contiguous()


def _packed_zeros(zeros: Tensor) -> Tensor:
    """[G, N] -> [G, N / 8] words of zero points."""
    return _words(_tiled(zeros).view(len(zeros), -1, 4, 2).transpose(2, 3).flatten(1))


def _repack(words: Tensor, size_k: int, size_n: int) -> Tensor:
    from vllm import _custom_ops as ops

    extra = _unused("gptq_marlin_repack", "perm")
    if extra:
        extra["perm"] = torch.empty(0, dtype=torch.int32, device=words.device)
    packed: Tensor = ops.gptq_marlin_repack(words, size_k=size_k, size_n=size_n, num_bits=4, **extra)
    return packed


@functools.cache
def _locks(device: torch.device) -> Tensor:
    """Of the kernel's blocks; it leaves them zero, so that calls on one stream share them."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.inference_mode(False):
        return torch.zeros(sms * BLOCKS_PER_SM, dtype=torch.int32, device=device)


def _unused(operator: str, *names: str) -> dict[str, Tensor | None]:
    """The arguments for reordered columns, where the operator of this release still has them (before 0.32)."""
    return {name: None for name in names if name in _parameters(operator)}


@functools.cache
def _parameters(operator: str) -> frozenset[str]:
    from vllm import _custom_ops as ops

    return frozenset(inspect.signature(getattr(ops, operator)).parameters)
