"""Kinds of weight-quantized linear for the self-drafter: `nf4`, `int4`, `int8`, and `dense` as the control.

A kind trades acceptance (fewer bits, lower) for the drafter's speed; which pays depends on the machine, so
`time_quantizers` and `choose` measure. A kind's kernel is tried once before it counts as available.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout_spec.contracts import invalid
from rollout_spec.drafters.quantizers import timing
from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer
from rollout_spec.drafters.quantizers.dense import DenseQuantizer
from rollout_spec.drafters.quantizers.int4 import Int4Quantizer
from rollout_spec.drafters.quantizers.int8 import Int8Quantizer
from rollout_spec.drafters.quantizers.nf4 import Nf4Quantizer
from rollout_spec.drafters.quantizers.timing import ACCEPTANCE_PRIOR, Choice, Timing, choose, expected_tau

__all__ = [
    "ACCEPTANCE_PRIOR",
    "QUANTIZERS",
    "Choice",
    "QuantizedLinear",
    "Quantizer",
    "Timing",
    "available_quantizers",
    "choose",
    "expected_tau",
    "get_quantizer",
    "time_quantizers",
    "usual_quantizer",
]

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (Nf4Quantizer(), Int4Quantizer(), Int8Quantizer(), DenseQuantizer())
}

_USUAL = ("nf4", "int4", "int8")


def available_quantizers(device: torch.device | str, dtype: torch.dtype) -> dict[str, str | None]:
    """Every kind's name, with None if it runs on `device` with `dtype` activations, else the reason it does not."""
    return {name: quantizer.unavailable(device, dtype) for name, quantizer in QUANTIZERS.items()}


def get_quantizer(name: str, device: torch.device | str, dtype: torch.dtype) -> Quantizer:
    """The kind called `name`; InvalidRequest if unknown, or unavailable on `device` with `dtype` activations."""
    if name not in QUANTIZERS:
        raise invalid("speculation.drafter", name, f"use one of {', '.join(QUANTIZERS)}")
    reasons = available_quantizers(device, dtype)
    if reasons[name] is not None:
        usable = ", ".join(other for other, reason in reasons.items() if reason is None)
        raise invalid("speculation.drafter", name, f"{reasons[name]}; available here: {usable or 'none'}")
    return QUANTIZERS[name]


def usual_quantizer(device: torch.device | str, dtype: torch.dtype) -> str:
    """The kind to draft with where none was timed: 4 bits where they run, else 8. InvalidRequest if none does."""
    reasons = available_quantizers(device, dtype)
    return (
        next((name for name in _USUAL if reasons[name] is None), None)
        or get_quantizer("int8", device, dtype).name
    )


def time_quantizers(
    shapes: Sequence[tuple[int, int]],
    device: torch.device | str,
    dtype: torch.dtype,
    rows: Sequence[int] = (1, 4),
    repeats: int = 5,
) -> list[Timing]:
    """Time every kind available on `device`; see `quantizers.timing.time_quantizers`."""
    usable = {
        name: QUANTIZERS[name] for name, reason in available_quantizers(device, dtype).items() if not reason
    }
    return timing.time_quantizers(usable, shapes, device, dtype, rows, repeats)
