"""Rotary position embedding: a table of cosines and sines, and its application to queries and keys.

The numerics are transformers': angles, cosines and sines in float32, scaled, then cast to the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rollout_spec.models.spec import ModelSpec, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Rotation per position of each pair of dimensions.

    Returns:
        float32[head_dim / 2] radians per position, and the factor on cos and sin ("attention scaling"; YaRN only).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    plain = 1.0 / wavelengths
    if rope.type == "default":
        return plain, 1.0
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, plain), 1.0
    return _yarn(rope, plain, 1.0 / (rope.factor * wavelengths), head_dim)


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by `factor`, blend in between."""
    rotations = rope.original_max_positions * plain / (2 * math.pi)  # turns within the original context
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeSpec, plain: Tensor, interpolated: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate the slow dimensions, keep the fast, ramp between."""

    def dimension_turning(turns: float) -> float:
        context = rope.original_max_positions
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - slow

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    attention = rope.attention_factor
    if attention is None:
        both = rope.mscale and rope.mscale_all_dim
        attention = scale(rope.mscale) / scale(rope.mscale_all_dim) if both else scale(1.0)  # type: ignore[arg-type]
    return interpolated * (1 - keep) + plain * keep, attention


class RotaryTable:
    """Cosines and sines of every position the model is meant for, in the model's dtype.

    Args:
        spec: The model.
        device: Where the table lives.
        dtype: The model's compute dtype.
        length: Positions covered; None means `spec.max_positions`.
    """

    def __init__(
        self, spec: ModelSpec, device: torch.device | str, dtype: torch.dtype, length: int | None = None
    ) -> None:
        frequencies, scale = inverse_frequencies(spec.rope, spec.head_dim)
        angles = torch.arange(length or spec.max_positions, dtype=torch.float32)[:, None] * frequencies
        cos, sin = ((x * scale).to(device=device, dtype=dtype) for x in (angles.cos(), angles.sin()))
        self._cos, self._signed_sin = torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors for `rotate` at positions int64[R]: (cos, signed sin), each [R, 1, head_dim].

        The first half of the signed sine is negated, so that the rotation needs no negation.
        """
        cos, signed_sin = (table.index_select(0, positions) for table in (self._cos, self._signed_sin))
        return cos.unsqueeze(1), signed_sin.unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate heads x[R, heads, head_dim] by the factors of `RotaryTable`; dimension i pairs with i + head_dim/2."""
    half = x.shape[-1] // 2
    return (x * cos).add_(x.roll(half, -1).mul_(signed_sin))
