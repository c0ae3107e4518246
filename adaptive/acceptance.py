"""What a drafter would be accepted with, computed from recorded episodes without decoding anything.

Given the target's token x at a position, rejection sampling has accepted it as the draft with probability
min(1, q(x) / p(x)), independently of the other positions: p(x) splits into min(p, q)(x), drafted and accepted, and the
rest, drawn after a rejection. So along a recorded sequence the rounds of an engine with draft length K form a Markov
chain, and accepted lengths, prompts' and ends' effects included, follow without sampling. The same holds for the
coupled verifier with its own probability (`losses.coupled_acceptance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout_spec.adaptive.losses import coupled_acceptance, log_distribution, tv
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import Batch, pack
from rollout_spec.adaptive.samples import Episode

_ROWS = 4096  # predictions whose distributions are in memory at once


@dataclass(frozen=True)
class Acceptance:
    """Of a drafter on episodes, at temperature 1.

    Attributes:
        alpha: Mean of 1 - TV(p, q) in step 0, 1, .. of a round, over all positions that a round could have begun at.
        tau: Tokens per verification by rejection sampling at draft length `len(alpha)`, the last round of a sequence
            counted with the tokens that were left to emit.
        tau_coupled: The same for the coupled verifier.
        tokens: Tokens of responses behind these figures.
    """

    alpha: tuple[float, ...]
    tau: float
    tau_coupled: float
    tokens: int


@torch.no_grad()
def measure(
    module: EagleModule,
    target: TargetTensors,
    episodes: Sequence[Episode],
    draft_length: int = 5,
    *,
    batch_tokens: int = 8192,
    stop: Callable[[], bool] = lambda: False,
) -> Acceptance:
    """Acceptance on `episodes`, which the target sampled at temperature 1.

    Args:
        module, target: The drafter, and what it is lent.
        episodes: In batches of about `batch_tokens`, or one longer one.
        draft_length: K.
        stop: Asked between batches; what has been measured until then is returned.

    Raises:
        InvalidRequest: See `pack`.
    """
    overlap, counts = np.zeros(draft_length), np.zeros(draft_length)
    tokens, rounds, device = 0, np.zeros(2), module.fc.weight.device
    for group in _groups(episodes, batch_tokens):
        if stop():
            break
        batch = pack(group, max(len(episode.tokens) for episode in group)).to(device)
        alpha, accepted = _steps(module, target, batch, draft_length)
        for step in range(draft_length):
            counted = batch.drafts(step).cpu().numpy()
            overlap[step] += alpha[step][counted].sum()
            counts[step] += counted.sum()
        for chance in _sequences(batch, accepted):
            tokens += chance.shape[2]
            rounds += [expected_rounds(each) for each in chance]
    shares = overlap / np.maximum(counts, 1)
    tau, coupled = tokens / rounds if tokens else (math.nan, math.nan)
    return Acceptance(tuple(shares.tolist()), float(tau), float(coupled), tokens)


def expected_rounds(chance: NDArray[np.float64]) -> float:
    """Verifications that a sequence of n tokens takes.

    Args:
        chance: float64 [K, n]: the probability that a draft for token i, made in step j of its round, is accepted.
    """
    draft_length, n = chance.shape
    begins = np.zeros(n + draft_length + 1)
    begins[0] = 1.0
    for start in range(n):
        alive = begins[start]
        for step in range(draft_length):
            if start + step >= n:
                alive = 0.0
                break
            passed = alive * chance[step, start + step]
            begins[start + step + 1] += alive - passed
            alive = passed
        begins[min(start + draft_length + 1, n)] += alive
    return float(begins[:n].sum())


def _groups(episodes: Sequence[Episode], budget: int) -> list[list[Episode]]:
    groups: list[list[Episode]] = [[]]
    total = 0
    for episode in sorted(episodes, key=lambda episode: len(episode.tokens)):
        if len(episode.tokens) < 3 or len(episode.tokens) <= episode.prompt_tokens:
            continue
        if total + len(episode.tokens) > budget and groups[-1]:
            groups.append([])
            total = 0
        groups[-1].append(episode)
        total += len(episode.tokens)
    return [group for group in groups if group]


def _steps(
    module: EagleModule, target: TargetTensors, batch: Batch, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """1 - TV [K, B, L], and the chance that token t + 2 is accepted under both verifiers [2, K, B, L]."""
    shape = batch.tokens.shape
    at = (batch.weights > 0).flatten().nonzero()[:, 0]
    alpha = np.zeros((steps, shape.numel()))
    accepted = np.zeros((2, steps, shape.numel()))
    for step, states in enumerate(module.unroll(target, batch, steps)):
        for rows in at.split(_ROWS):
            features = batch.next_features.flatten(0, 1)[rows]
            chosen = batch.next_tokens.flatten()[rows]
            log_p, on_draft = log_distribution(target.logits(module.spec, features), module.draft_tokens)
            log_q = module.logits(target, states.flatten(0, 1)[rows]).log_softmax(-1)
            place = rows.cpu().numpy()
            alpha[step, place] = _array(1.0 - tv(on_draft, log_q))
            full = log_q
            if module.draft_tokens is not None:
                full = torch.full_like(log_p, -torch.inf).index_copy_(1, module.draft_tokens, log_q)
            ratio = (full - log_p).gather(1, chosen[:, None])[:, 0]
            accepted[0, step, place] = _array(ratio.exp().clamp(max=1.0))
            accepted[1, step, place] = _array(coupled_acceptance(log_p, full, chosen))
    return alpha.reshape(steps, *shape), accepted.reshape(2, steps, *shape)


def _sequences(batch: Batch, accepted: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Per segment, [2, K, n] of its n response tokens, in order."""
    segments, weights = batch.segments.cpu().numpy(), batch.weights.cpu().numpy()
    found = []
    for row in range(len(segments)):
        for segment in np.unique(segments[row][weights[row] > 0]):
            here = (segments[row] == segment) & (weights[row] > 0)
            found.append(accepted[:, :, row, here])
    return found


def _array(x: Tensor) -> NDArray[np.float64]:
    return x.double().cpu().numpy()
