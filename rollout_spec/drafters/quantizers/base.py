"""What a kind of quantized linear has to provide, and the steps all kinds share.

A quantized linear pads its weight with zeros to what its kernel accepts and hides that: callers see the
weight's own shape. Quantization is deterministic: the same weight gives the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.decoder_layer import KernelWeight

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32, an L2 cache
GPU_BLOCK_ELEMENTS = 1 << 24
PROBE_ERROR = {4: 0.15, 8: 0.04, 16: 0.01}


class QuantizedLinear(ABC):
    """`y = x W^T + bias` with a quantized copy of `W`.

    Attributes:
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        bias: [N] in the weight's dtype, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [R, K] float -> [R, N] of the same dtype."""
        if not len(x):
            return x.new_empty(0, self.out_features)
        y = self.matmul(x)
        if y.shape[1] != self.out_features:
            y = y[:, : self.out_features].contiguous()
        y = y.to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x: [R, K] float -> [R, N padded], any float dtype, without bias; a tensor of its own."""

    @abstractmethod
    def payload(self) -> dict[str, Tensor]:
        """The quantized weight's tensors, bias aside."""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight the kernel multiplies with: [N, K] float32."""

    def for_kernels(self) -> KernelWeight | None:
        """As `Linear.for_kernels`."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that defines the layer; equal bytes mean equal layers."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {**self.payload(), **bias}

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors()`."""
        return sum(t.nbytes for t in self.tensors().values())


class Quantizer(ABC):
    """One kind of quantized linear.

    Attributes:
        name: As in `SpeculationConfig.drafter`.
        bits: Bits per weight, scales aside; indexes the acceptance priors of `choose`.
    """

    name: str
    bits: int

    def unavailable(
        self, device: torch.device | str, dtype: torch.dtype, out_features: int = 64, in_features: int = 64
    ) -> str | None:
        """Why a [out_features, in_features] linear cannot run on `device` with `dtype` activations, or None.

        The first call per device and dtype quantizes a small weight and compares its product with float32, so
        a kernel that is missing, crashes or computes something else is found here.
        """
        device = torch.device(device)
        if out_features < 1 or in_features < 1:
            return f"needs a non-empty weight, not [{out_features}, {in_features}]"
        if dtype not in FLOAT_DTYPES:
            return f"needs float32, bfloat16 or float16 activations, not {dtype}"
        if device.type not in ("cpu", "cuda"):
            return f"has no kernel for device {device.type!r}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "CUDA is not available"
        return self.missing(device) or _probe(self, device, dtype)

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """What this machine lacks for the kind's kernel on `device`, or None."""

    @abstractmethod
    def layer_type(self, device: torch.device) -> Callable[[Tensor, Tensor | None], QuantizedLinear]:
        """The layer this kind uses on `device`, to be built from a weight and a bias."""

    def quantize(self, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
        """weight: [N, K] float, bias: [N] or None. NaNs reach the outputs of their row."""
        with torch.no_grad():
            return self.layer_type(weight.device)(weight, bias)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to the calling thread.

    Elementwise passes over blocks that fit a cache are over before other threads have joined; on a machine
    with busy cores, waiting for them made quantization tens of times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _probe(quantizer: Quantizer, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 192, generator=generator, dtype=torch.float32)
    x = torch.randn(3, 192, generator=generator, dtype=torch.float32).to(dtype)
    try:
        y = quantizer.quantize(weight.to(device, dtype))(x.to(device)).float().cpu()
    except Exception as error:
        return f"its kernel failed on a trial: {type(error).__name__}: {str(error).splitlines()[0]}"
    wrong = relative_error(y, x.float() @ weight.t())
    if not wrong <= PROBE_ERROR[quantizer.bits]:
        return (
            f"its kernel is off by {wrong:.2g} on a trial; at most {PROBE_ERROR[quantizer.bits]} is expected"
        )
    return None


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return ((y.float() - reference).norm() / reference.norm()).item()


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def pad_columns(x: Tensor, columns: int) -> Tensor:
    """x: [R, K] -> [R, columns], zeros on the right."""
    return x if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1]))


def fp32_row_blocks(
    weight: Tensor, padded: tuple[int, int], row_multiple: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, [rows, padded K] float32 to overwrite), zero padded, for `padded` = (rows, columns).

    `padded[0]` and every block's height are multiples of `row_multiple`. Blocks share one buffer small enough
    to stay in cache, which bounds the temporary memory and avoids a trip to DRAM per elementwise pass.
    """
    n, k = weight.shape
    rows_padded, columns = padded
    target = CPU_BLOCK_ELEMENTS if weight.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    height = min(rows_padded, max(row_multiple, target // columns // row_multiple * row_multiple))
    buffer = torch.zeros(height, columns, device=weight.device)
    for start in range(0, rows_padded, height):
        block = buffer[: min(height, rows_padded - start)]
        filled = max(0, min(n - start, len(block)))
        block[:filled, :k].copy_(weight[start : start + filled])
        block[filled:].zero_()
        block[:, k:].zero_()
        yield start, block


def quantize_rows_int8(weight: Tensor, padded: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: ([N, K] padded int8, [N] padded float32 scale), weight = int8 * scale."""
    q = torch.empty(padded, dtype=torch.int8, device=weight.device)
    scale = torch.empty(padded[0], device=weight.device)
    for start, block in fp32_row_blocks(weight, padded, 1):
        stop = start + len(block)
        s = torch.div(block.abs().amax(1).clamp_min_(1e-30), 127, out=scale[start:stop])
        q[start:stop] = block.mul_(s.reciprocal()[:, None]).round_()
    return q, scale
