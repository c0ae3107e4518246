"""The sampling rules again, slowly: one sequence, one row, NumPy float64 where the fast code uses batches.

Tests compare `pipeline` and `verify` with this file. It shares only the noise with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from rollout_spec.contracts import SamplingParams
from rollout_spec.sampling.noise import Stream, exponential, uniform


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 probabilities of logits [V]."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def process(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    end_token_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Processed logits of one row, and the same before top_k, top_p and min_p.

    Args:
        logits: float32 [V].
        params: Sampling parameters.
        prompt: Prompt tokens.
        output: Output tokens the row is conditioned on, draft tokens included.
        end_token_ids: Tokens masked while the output is shorter than `min_tokens`.
    """
    scores = logits.astype(np.float32).copy()
    for token in set(prompt) | set(output):
        penalty = np.float32(params.repetition_penalty)
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(output):
        scores[token] -= np.float32(params.frequency_penalty) * np.float32(list(output).count(token))
        scores[token] -= np.float32(params.presence_penalty)
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += np.float32(bias)
    if len(output) < params.min_tokens:
        masked = scores.copy()
        masked[list(end_token_ids)] = -np.inf
        if np.isfinite(masked).any():
            scores = masked

    if params.temperature == 0:
        point = np.full_like(scores, -np.inf)
        point[np.argmax(scores)] = 0.0
        return point, point.copy()
    scores = scores / np.float32(params.temperature)
    uncut = scores.copy()
    if 0 < params.top_k < len(scores):
        scores[scores < np.sort(scores)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        probs, above = softmax(scores), 0.0
        for token in sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True):
            if above > 0 and 1 - above <= 1 - params.top_p:
                scores[token] = -np.inf
            above += probs[token]
    if params.min_p > 0:
        probs = softmax(scores)
        scores[probs < params.min_p * probs.max()] = -np.inf
    return scores, uncut


def verify_coupled(
    target_logits: np.ndarray, drafts: Sequence[int], keys: torch.Tensor
) -> tuple[list[int], int]:
    """Emitted tokens and number of accepted drafts of one sequence.

    Args:
        target_logits: float32 [S, V], processed.
        drafts: At most S - 1 tokens.
        keys: int64 [S].
    """
    emitted: list[int] = []
    for row in range(len(drafts) + 1):
        p = softmax(target_logits[row])
        groups = len(p) // 16
        width = math.ceil((groups + 16) / 64) * 64
        noise = exponential(keys[row : row + 1], width, Stream.TARGET)[0].double().numpy()
        winner = int(np.argmax([p[group::groups].sum() / noise[group] for group in range(groups)]))
        emitted.append(winner + groups * int(np.argmax(p[winner::groups] / noise[-16:])))
        if row < len(drafts) and drafts[row] != emitted[-1]:
            break
    return emitted, len(emitted) - 1


def verify_rejection(
    target_logits: np.ndarray, drafts: Sequence[int], q_logits: np.ndarray | None, keys: torch.Tensor
) -> tuple[list[int], int]:
    """Emitted tokens and number of accepted drafts of one sequence.

    Args:
        target_logits: float32 [S, V], processed.
        drafts: At most S - 1 tokens.
        q_logits: float32 [K, V], processed; None when each draft was the proposal's only choice.
        keys: int64 [S].
    """
    emitted: list[int] = []
    for row in range(len(drafts) + 1):
        p = softmax(target_logits[row])
        residual = p
        if row < len(drafts):
            q = np.eye(1, len(p), drafts[row])[0] if q_logits is None else softmax(q_logits[row])
            draft = drafts[row]
            if np.isfinite(q).all() and q[draft] > 0:
                if uniform(keys[row], Stream.ACCEPT).item() * q[draft] < p[draft]:
                    emitted.append(draft)
                    continue
                residual = np.maximum(p - q, 0.0)
                residual = residual if residual.any() else p
        cdf = np.cumsum(residual)
        u = uniform(keys[row], Stream.RESIDUAL).item()
        emitted.append(int(np.searchsorted(cdf, u * cdf[-1], side="right")))
        break
    return emitted, len(emitted) - 1
