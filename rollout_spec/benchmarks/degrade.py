"""Drafters made worse on purpose: a small policy quantizes kindly, so speed is also measured at lower acceptance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout_spec.contracts import Completion
from rollout_spec.drafters.quantize import get_quantizer
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.drafters.quantizers.perturbed import PerturbedQuantizer
from rollout_spec.engine import RolloutEngine
from rollout_spec.models.weights import Piece, is_linear, slots_of

_CLOSE_ENOUGH = 0.003


@torch.inference_mode()
def perturb(engine: RolloutEngine, noise: float, seed: int = 0) -> None:
    """Quantize the drafter's weights anew, with relative `noise` on them (0: as they are)."""
    backend = engine.backend
    weights, drafter = backend.weights, backend.weights.drafter
    assert isinstance(drafter, QuantizedSelfDrafter)
    quantizer = get_quantizer(drafter.name, backend.device, backend.dtype)
    drafter.quantizer = PerturbedQuantizer(quantizer, noise, seed) if noise else quantizer
    for slot, linear in slots_of(weights.target.weights).items():
        if is_linear(slot):
            drafter.stage(Piece(slot, linear.dense(), linear.bias))
    drafter.commit(weights.target, weights.version)


def degrade(engine: RolloutEngine, wanted: float, texts: Sequence[Completion], seed: int = 0) -> float:
    """Perturb the drafter until its acceptance on `texts` measures `wanted`; returns what it measures."""
    low, high, found = 0.0, 1.0, 1.0
    for _ in range(10):
        noise = (low + high) / 2
        perturb(engine, noise, seed)
        found = acceptance(engine, texts)
        if abs(found - wanted) < _CLOSE_ENOUGH:
            break
        low, high = (noise, high) if found > wanted else (low, noise)
    return found


@torch.inference_mode()
def acceptance(engine: RolloutEngine, completions: Sequence[Completion]) -> float:
    """Mean 1 - TV between target and drafter over the answers' tokens: acceptance per draft token at T=1."""
    values = []
    for completion in completions:
        logits = engine.backend.compare(np.array(completion.prompt_token_ids + completion.token_ids))
        assert logits is not None
        target, draft = (x[len(completion.prompt_token_ids) - 1 : -1].softmax(-1) for x in logits)
        values.append(torch.minimum(target, draft).sum(-1))
    return torch.cat(values).mean().item()
