"""Rejection verification inside vLLM's V1 runner on a CPU: one random number for every draw.

vLLM's draws are races: the largest of p / E, with an E ~ Exp(1) for every token of the vocabulary. On a CPU making those
takes most of what sampling costs. Here a token is found by inverting its distribution function, and only where a
request goes on after its drafts. Requests with a seed are left to vLLM: their tokens follow from its generators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rollout_spec.integrations.vllm.coupled import GREEDY_BELOW
from rollout_spec.sampling.verify import draw_from


class Unseeded(dict[int, torch.Generator]):
    """The generators of a pass in which no request has one; stands where vLLM keeps those there are."""


def draw(weights: Tensor) -> Tensor:
    """Token i with probability weights[i] / sum: int64 [R], from weights float32 [R, V]."""
    return draw_from(weights, torch.rand(len(weights), dtype=torch.float64))


def verify(
    drafts: Tensor,
    lengths: list[int],
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus: Tensor,
    sampling_metadata: Any,
    width: int,
) -> Tensor:
    """What a pass emits: drafts x as long as each is accepted, with probability min(1, p(x) / q(x)), and one token more.

    That is drawn from max(p - q, 0), or is the bonus token if all were accepted. A draft counts as not proposed, and those
    after it, where q gives it no probability or its id is out of range; the next token is then drawn from p. Greedy
    requests accept what is the likeliest.

    Args:
        drafts: [N], request by request.
        lengths: Drafts of each of B requests.
        draft_probs: float32 [N, V], the q that drafts were drawn from; None where each was the only choice.
        target_logits: float32 [N, V], processed.
        bonus: [B, 1], each request's choice at the row after its drafts.
        sampling_metadata: vLLM's, of the B requests.
        width: K + 1, K being the longest draft.

    Returns:
        int32 [B, K + 1], -1 after the last emitted token.
    """
    count, rows, vocabulary = len(lengths), torch.arange(len(drafts)), target_logits.shape[-1]
    drafted = torch.tensor(lengths)
    starts = drafted.cumsum(0) - drafted
    request = torch.arange(count).repeat_interleave(drafted)
    place = rows - starts[request]
    greedy = sampling_metadata.temperature < GREEDY_BELOW

    index = drafts.to(torch.int64).clamp(0, vocabulary - 1)
    proposed = index == drafts
    q = torch.ones(len(rows))
    if draft_probs is not None:
        q = draft_probs[rows, index]
        proposed &= greedy[request] | (q > 0)
    p = (target_logits[rows, index] - target_logits.logsumexp(-1)).exp()
    accepts = torch.rand(len(rows), dtype=torch.float64) * q < p
    if not sampling_metadata.all_random:
        accepts = torch.where(greedy[request], target_logits.argmax(-1) == index, accepts)

    tokens, agrees = (torch.zeros(count, width, dtype=torch.int64) for _ in range(2))
    tokens[request, place] = index
    agrees[request, place] = (accepts & proposed).to(torch.int64)
    accepted = agrees.cumprod(1).sum(1)
    following, more = bonus.to(torch.int64, copy=True), accepted < drafted
    row = (starts + accepted)[more]
    following[more, 0] = _instead(
        target_logits[row], index[row], proposed[row], draft_probs, row, greedy[more]
    )
    tokens.scatter_(1, accepted[:, None], following)
    return torch.where(torch.arange(width) <= accepted[:, None], tokens, -1).to(torch.int32)


def _instead(
    logits: Tensor, drafts: Tensor, proposed: Tensor, draft_probs: Tensor | None, row: Tensor, greedy: Tensor
) -> Tensor:
    """The tokens int64 [R] that come instead of the drafts [R] rejected in these rows."""
    p = logits.softmax(-1)
    if draft_probs is None:
        residual = p.scatter(1, drafts[:, None], 0.0)
    else:
        residual = (p - draft_probs[row]).clamp_min_(0.0)
    usable = proposed & (residual.sum(-1) > 0)
    return torch.where(greedy, logits.argmax(-1), draw(torch.where(usable[:, None], residual, p)))
