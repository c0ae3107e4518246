"""Finished trajectories against one plain pass of the target over them: their logprobs, and their tokens.

The plain pass sees no draft, no batch and no cache entry of the run it checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.engine import RolloutEngine
from rollout_spec.requests import noise_key
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.pipeline import token_logprobs
from rollout_spec.sampling.table import SamplingTable
from rollout_spec.sampling.verify import coupled_scores


@dataclass(frozen=True)
class Recomputed:
    """A completion's T output positions, from a plain pass.

    Attributes:
        logprobs: float32 [3, T]: full-policy, processed, and mask mass of its tokens, as the engine reports them.
        scores: float32 [T, V]: `coupled_scores` of every token at every position; log p where it was greedy.
    """

    logprobs: Tensor
    scores: Tensor

    def margin(self, position: int, token: int) -> float:
        """By how much the best score of a position beats that of `token`."""
        row = self.scores[position]
        return float(row.max() - row[token])


@torch.inference_mode()
def recompute(engine: RolloutEngine, completion: Completion, params: SamplingParams) -> Recomputed:
    """Score a completion in one plain pass. All its tokens must be of one policy version, the one in force."""
    backend = engine.backend
    prompt, output = completion.prompt_token_ids, completion.token_ids
    padded = backend.spec.padded_vocab_size
    logits = backend.score(backend.weights.target, np.array(prompt + output))[len(prompt) - 1 : -1]
    raw = pad(logits, (0, padded - logits.shape[1]), value=-math.inf)[None]
    tokens = torch.tensor([output], device=raw.device)
    table = SamplingTable(1, padded, raw.device, backend.spec.vocab_size)
    key = noise_key(engine.config.seed, completion.request_id, params.seed, completion.index)
    table.assign(0, params, prompt, [], (), key)
    batch = table.select(torch.zeros(1, dtype=torch.int64, device=raw.device), [0])
    processed = batch.process(raw, block=tokens)
    logprobs = torch.cat(token_logprobs(raw, processed, tokens))
    if params.temperature == 0:
        return Recomputed(logprobs, raw[0].log_softmax(-1))
    positions = torch.arange(len(prompt), len(prompt) + len(output), device=raw.device)[None]
    keys = row_keys(batch.key, backend.weights.version, positions)
    return Recomputed(logprobs, coupled_scores(processed.logits[0], keys[0]))


@dataclass
class Parity:
    """Differences between what the engine reported and a plain pass, over `tokens` tokens.

    Attributes:
        worst, mean: Of |logprob - recomputed logprob|.
        processed: Worst |processed logprob + log(mask mass) - logprob before the cuts|, with the wrong share of
            mass as an error of its own: the two reported figures must agree with the plain pass together.
        replayed: Tokens compared with the recomputed coupled choice.
        margins: By how much that choice beats the emitted token, wherever it is another one.
    """

    tokens: int = 0
    worst: float = 0.0
    mean: float = 0.0
    processed: float = 0.0
    replayed: int = 0
    margins: tuple[float, ...] = ()


def parity(
    engine: RolloutEngine,
    completions: Sequence[Completion],
    params: Sequence[SamplingParams],
    *,
    replay: bool,
) -> Parity:
    """Compare completions with plain passes; `replay` their tokens too (coupled verifier only)."""
    result = Parity()
    for completion, p in zip(completions, params, strict=True):
        count = len(completion.token_ids)
        plain = recompute(engine, completion, p)
        reported = torch.tensor(
            [completion.logprobs, completion.processed_logprobs, completion.mask_mass],
            device=plain.logprobs.device,
        )
        error = (reported[0] - plain.logprobs[0]).abs()
        uncut = reported[1] + reported[2].log() - plain.logprobs[1] - plain.logprobs[2].log()
        result.tokens += count
        result.worst = _worse(result.worst, error.max())
        result.mean += float(error.sum())
        result.processed = _worse(result.processed, uncut.abs().max())
        if replay:
            chosen = plain.scores.argmax(-1).tolist()
            result.replayed += count
            result.margins += tuple(
                plain.margin(position, token)
                for position, token in enumerate(completion.token_ids)
                if chosen[position] != token
            )
    result.mean /= max(result.tokens, 1)
    return result


def _worse(worst: float, error: Tensor) -> float:
    """The larger; NaN is the worst."""
    value = float(error)
    return math.inf if math.isnan(value) else max(worst, value)
