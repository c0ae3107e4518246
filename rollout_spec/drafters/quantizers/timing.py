"""Time the kinds on this machine and choose the one that should speed speculation up most."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer, relative_error

ACCEPTANCE_PRIOR = {8: 0.99, 4: 0.96}
"""Acceptance per draft token assumed before anything was drafted, by bits: the low ends of what a weight-only
copy of its own target reached on a small trained model (0.999 and 0.996 to 0.998), lowered because larger
models with higher-entropy outputs accept less."""
CPU_SAMPLE_ELEMENTS = 1 << 24
GPU_SAMPLE_ELEMENTS = 1 << 28
SAMPLE_ROW_MULTIPLE = 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """What one kind costs for all linears of a model.

    Attributes:
        name: The kind.
        bits: Bits per weight.
        rows: R of the activations [R, K].
        microseconds: One pass through all linears with R rows.
        requantize_seconds_per_GB: Quantization time per 10^9 bytes of 16-bit weights.
        weight_gigabytes: 10^9 bytes of the model's linears at 16 bits.
        error: Largest relative output error over the shapes, on Gaussian weights.
    """

    name: str
    bits: int
    rows: int
    microseconds: float
    requantize_seconds_per_GB: float  # noqa: N815
    weight_gigabytes: float
    error: float


@dataclass(frozen=True)
class Choice:
    """The chosen kind and why.

    Attributes:
        name: A kind, or `none` when no kind's expected gain exceeds 1.
        gains: Expected speedup over plain decoding, per kind.
    """

    name: str
    gains: Mapping[str, float]


def expected_tau(alpha: float, draft_length: int) -> float:
    """Tokens per verification, (1 - alpha^(K+1)) / (1 - alpha) (Leviathan et al. 2023, arXiv:2211.17192, eq. 1)."""
    return sum(alpha**i for i in range(draft_length + 1))


def choose(timings: Sequence[Timing], draft_length: int) -> Choice:
    """The kind with the largest expected gain of one speculative round over plain decoding.

    gain = tau T_T / (K T_D + T_V), with tau from `ACCEPTANCE_PRIOR`, T_T and T_D the `dense` and the kind's
    time at the fewest rows timed, and T_V the `dense` time at the most rows. Time the rows of one draft step
    (B) and of one verification (B (K + 1)).

    Args:
        timings: From `time_quantizers`; must include `dense`.
        draft_length: K.
    """
    by_name: dict[str, list[Timing]] = {}
    for timing in sorted(timings, key=lambda t: t.rows):
        by_name.setdefault(timing.name, []).append(timing)
    if "dense" not in by_name:
        raise ValueError("choose needs the timings of 'dense', the target's own linears")
    dense = by_name.pop("dense")
    target, verify = dense[0].microseconds, dense[-1].microseconds
    gains = {}
    for name, (first, *_) in by_name.items():
        tau = expected_tau(ACCEPTANCE_PRIOR[first.bits], draft_length)
        gains[name] = tau * target / (draft_length * first.microseconds + verify)
    best = max(gains, key=gains.__getitem__, default="none")
    return Choice(best if gains.get(best, 0.0) > 1.0 else "none", gains)


@torch.no_grad()
def time_quantizers(
    quantizers: Mapping[str, Quantizer],
    shapes: Sequence[tuple[int, int]],
    device: torch.device | str,
    dtype: torch.dtype,
    rows: Sequence[int] = (1, 4),
    repeats: int = 5,
) -> list[Timing]:
    """Time every available kind on Gaussian weights, `dense` for comparison included.

    Kinds and shapes take turns, so that every weight has left the caches when its turn comes again, and so
    that a busy moment of the machine hits all alike; each figure is the least over `repeats`. Only the first
    rows of a large weight are timed and the result scaled, and equal shapes are timed once.

    Args:
        quantizers: Kinds by name, without those that are `unavailable`.
        shapes: (N, K) of every linear of the model, repeated as often as it occurs.
        dtype: The engine's, of weights and activations.
        rows: R to time.

    Returns:
        One entry per kind and R.
    """
    device = torch.device(device)
    counts = Counter(shapes)
    if not counts:
        raise ValueError("shapes is empty: give (N, K) of the model's linears")
    generator = torch.Generator(device).manual_seed(0)
    limit = CPU_SAMPLE_ELEMENTS if device.type == "cpu" else GPU_SAMPLE_ELEMENTS
    quantize_s = dict.fromkeys(quantizers, 0.0)
    error = dict.fromkeys(quantizers, 0.0)
    layers: dict[tuple[str, tuple[int, int]], QuantizedLinear] = {}
    inputs: dict[int, Tensor] = {}
    scale = {}
    for n, k in counts:
        sampled = min(n, max(SAMPLE_ROW_MULTIPLE, limit // k // SAMPLE_ROW_MULTIPLE * SAMPLE_ROW_MULTIPLE))
        scale[n, k] = counts[n, k] * n / sampled
        weight = torch.randn(sampled, k, device=device, generator=generator).to(dtype)
        if k not in inputs:
            inputs[k] = torch.randn(max(rows), k, device=device, generator=generator).to(dtype)
        reference = inputs[k].float() @ weight.float().t()
        for name, quantizer in quantizers.items():
            seconds, layer = _timed(device, quantizer.quantize, weight)
            layers[name, (n, k)] = layer
            quantize_s[name] += seconds * scale[n, k]
            error[name] = max(error[name], relative_error(layer(inputs[k]), reference))
    best = dict.fromkeys(((*key, r) for r in rows for key in layers), math.inf)
    for _ in range(repeats):
        for name, shape, r in best:
            x, layer = inputs[shape[1]][:r], layers[name, shape]
            seconds, _ = _timed(device, layer, x)
            best[name, shape, r] = min(best[name, shape, r], seconds)
    gigabytes = sum(2e-9 * n * k * count for (n, k), count in counts.items())
    return [
        Timing(
            name,
            quantizer.bits,
            r,
            1e6 * sum(best[name, shape, r] * scale[shape] for shape in counts),
            quantize_s[name] / gigabytes,
            gigabytes,
            error[name],
        )
        for name, quantizer in quantizers.items()
        for r in rows
    ]


def _timed(device: torch.device, call: Callable[..., Result], *args: Tensor) -> tuple[float, Result]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
