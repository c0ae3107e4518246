"""From raw logits to the distribution a token is drawn from: the one pipeline.

Drafting, verification and plain decoding all call `SamplingBatch.process`, so an option means the same in each.
Row s of a block is conditioned on the recorded output and on the block's first `first + s` tokens.

A row never ends fully -inf: if `min_tokens` would mask every token that is left, it masks none in that row.
The other stages cannot empty a row: biases are finite and every cut keeps the most probable token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rollout_spec.contracts import SamplingParams

_NEG_INF = -math.inf


@dataclass(frozen=True)
class Stages:
    """Which stages some sequence of a batch uses (host side). `top_k` is the largest k, 0 for none.

    `sampled` is False when every sequence is greedy: no noise is needed then.
    """

    penalties: bool = False
    logit_bias: bool = False
    min_tokens: bool = False
    temperature: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    greedy: bool = False
    sampled: bool = True

    @classmethod
    def of(cls, params: SamplingParams, *, has_end_tokens: bool, vocab_size: int) -> Stages:
        """The stages of one request; the cuts do nothing to a greedy one."""
        sampled = params.temperature != 0
        return cls(
            penalties=params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0,
            logit_bias=bool(params.logit_bias),
            min_tokens=params.min_tokens > 0 and has_end_tokens,
            temperature=sampled and params.temperature != 1,
            top_k=params.top_k if sampled and 0 < params.top_k < vocab_size else 0,
            top_p=sampled and params.top_p < 1,
            min_p=sampled and params.min_p > 0,
            greedy=not sampled,
            sampled=sampled,
        )

    @classmethod
    def union(cls, stages: Iterable[Stages]) -> Stages:
        """The stages of a batch, which is not empty."""
        return cls(*(max(column) for column in zip(*(vars(s).values() for s in stages), strict=True)))


@dataclass
class Processed:
    """The distribution a token is drawn from.

    Attributes:
        logits: float32 [B, S, V], -inf outside the kept set; 0 at the argmax and -inf elsewhere in greedy rows.
            The caller's own tensor when no stage is in use.
        uncut: The same before top_k, top_p and min_p, or None when nothing can have been cut.
    """

    logits: Tensor
    uncut: Tensor | None = None


class TokenLogprobs(NamedTuple):
    """Natural logs and a probability, each float32 [B, S]; meanings as in `contracts.Completion`."""

    logprob: Tensor
    processed_logprob: Tensor
    mask_mass: Tensor


@dataclass
class SamplingBatch:
    """Sampling parameters of the B sequences of one step, made by `SamplingTable.select`.

    Attributes:
        stages: What any of them uses.
        key: int64 [B], the noise base for `noise.row_keys`.
        temperature, tail, min_p, repetition, presence, frequency: float32 [B]; tail is 1 - top_p.
        top_k: int64 [B], 0 for off.
        min_tokens, output_length: int64 [B].
        counts: int32 [B, V], output tokens so far. With `in_prompt`, bool [B, V], present if penalties are used.
        bias_ids, bias: int64 and float32 [B, W], padded with zero biases; present if a bias is used.
        end_ids: int64 [B, W'], padded by repetition; present if min_tokens is used.
    """

    stages: Stages
    key: Tensor
    temperature: Tensor
    top_k: Tensor
    tail: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    min_tokens: Tensor
    output_length: Tensor
    counts: Tensor | None = None
    in_prompt: Tensor | None = None
    bias_ids: Tensor | None = None
    bias: Tensor | None = None
    end_ids: Tensor | None = None

    @classmethod
    def tempered(cls, temperature: Tensor) -> SamplingBatch:
        """Parameters of B sequences that use no stage but `temperature [B]`."""
        zeros, ones = torch.zeros_like(temperature), torch.ones_like(temperature)
        none = torch.zeros_like(temperature, dtype=torch.int64)
        return cls(
            Stages(temperature=True),
            key=none, temperature=temperature, top_k=none, tail=zeros, min_p=zeros, repetition=ones, presence=zeros,
            frequency=zeros, min_tokens=none, output_length=none,
        )  # fmt: skip

    def take(self, sequences: Tensor | slice) -> SamplingBatch:
        """The same for some of the sequences, given as an index int64 [B'] or a slice; one may come several times."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stages"}
        return replace(self, **{name: x[sequences] for name, x in tensors.items() if x is not None})

    def process(self, logits: Tensor, block: Tensor | None = None, first: int | Tensor = 0) -> Processed:
        """Apply every stage in the order of `contracts.SamplingParams`.

        Args:
            logits: float32 [B, S, V], never written to; padded columns are -inf.
            block: int64 [B, P], draft tokens after the recorded output. Draft step j passes the j tokens drafted
                so far and first=j; verification passes all K and first=0.
            first: Number of block tokens before row 0; int64 [B] where it differs between sequences.

        Returns:
            The processed distribution; its logits are `logits` itself when no stage is in use.
        """
        use = self.stages
        scores = logits
        if use.penalties:
            scores = self._penalise(scores, block, first)
        if use.logit_bias:
            scores = self._add_bias(scores)
        if use.min_tokens:
            scores = self._mask_end_tokens(scores, first)
        if use.temperature:
            scores = scores / torch.where(self.temperature == 0, 1.0, self.temperature)[:, None, None]
        uncut = scores if use.top_k or use.top_p or use.min_p else None
        if use.top_k:
            scores = _cut_top_k(scores, self.top_k, use.top_k)
        if use.top_p:
            scores = _cut_top_p(scores, self.tail)
        if use.min_p:
            threshold = scores.amax(-1, keepdim=True) + self.min_p.log()[:, None, None]
            scores = scores.masked_fill(scores < threshold, _NEG_INF)
        if use.greedy:
            greedy = (self.temperature == 0)[:, None, None]
            point = torch.full_like(scores, _NEG_INF).scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)
            scores = torch.where(greedy, point, scores)
            uncut = None if uncut is None else torch.where(greedy, point, uncut)
        return Processed(scores, uncut)

    def _penalise(self, scores: Tensor, block: Tensor | None, first: int | Tensor) -> Tensor:
        assert self.counts is not None
        assert self.in_prompt is not None
        counts = self.counts.unsqueeze(1)
        if block is not None and block.shape[1]:
            shape = (*scores.shape[:2], block.shape[1])
            column = torch.arange(block.shape[1], device=scores.device)
            seen_by_row = (column < _rows(scores, first).unsqueeze(-1)).to(counts.dtype).expand(shape)
            index = block[:, None].expand(shape)
            counts = counts.expand_as(scores).scatter_add(2, index, seen_by_row)
        present = counts > 0
        repetition, presence, frequency = (
            x[:, None, None] for x in (self.repetition, self.presence, self.frequency)
        )
        repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores = torch.where(present | self.in_prompt.unsqueeze(1), repeated, scores)
        return scores - frequency * counts - presence * present

    def _add_bias(self, scores: Tensor) -> Tensor:
        assert self.bias_ids is not None
        assert self.bias is not None
        shape = (*scores.shape[:2], self.bias.shape[1])
        return scores.scatter_add(
            2, self.bias_ids.unsqueeze(1).expand(shape), self.bias.unsqueeze(1).expand(shape)
        )

    def _mask_end_tokens(self, scores: Tensor, first: int | Tensor) -> Tensor:
        assert self.end_ids is not None
        too_short = self.output_length[:, None] + _rows(scores, first) < self.min_tokens[:, None]
        too_short = too_short.unsqueeze(-1)
        ids = self.end_ids.unsqueeze(1).expand(*scores.shape[:2], -1)
        kept = scores.gather(2, ids)
        masked = scores.scatter(2, ids, torch.where(too_short, _NEG_INF, kept))
        others = masked.amax(-1, keepdim=True) > _NEG_INF
        return masked.scatter_(2, ids, torch.where(too_short & others, _NEG_INF, kept))


def _rows(scores: Tensor, first: int | Tensor) -> Tensor:
    """Block tokens before every row of scores [B, S, V]: int64 [1 or B, S]."""
    rows = torch.arange(scores.shape[1], device=scores.device)
    return (first.unsqueeze(1) if isinstance(first, Tensor) else first) + rows.unsqueeze(0)


def _cut_top_k(scores: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """Keep scores >= the k-th largest, ties included (transformers' TopKLogitsWarper)."""
    kth = (top_k - 1).clamp_min(0)[:, None, None].expand(*scores.shape[:2], 1)
    threshold = scores.topk(largest_k).values.gather(2, kth)
    threshold = threshold.masked_fill((top_k == 0)[:, None, None], _NEG_INF)
    return scores.masked_fill(scores < threshold, _NEG_INF)


def _cut_top_p(scores: Tensor, tail: Tensor) -> Tensor:
    """Drop a token iff it and all that rank below it weigh <= tail = 1 - top_p (transformers' TopPLogitsWarper).

    Equal scores rank by index, the higher index first, as a stable ascending sort leaves them.
    """
    probs = scores.softmax(-1)
    values, ids = _ranked(scores, probs, tail)
    mass = probs.gather(-1, ids).double()
    not_above = probs.sum(-1, keepdim=True, dtype=torch.float64) - mass.cumsum(-1) + mass
    dropped = not_above <= tail[:, None, None]
    dropped[..., 0] = False
    values = values.masked_fill(dropped, _NEG_INF)
    cut = torch.full_like(scores, _NEG_INF).scatter_(-1, ids, values)
    return torch.where((tail > 0)[:, None, None], cut, scores)


def _ranked(scores: Tensor, probs: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and token ids in falling order, equal scores by falling index: each [B, S, C].

    On CUDA all V are sorted. On CPU, where reading a number back costs nothing, only those that can be kept: all
    tokens with p < tail / V together weigh less than tail, so none of them is.
    """
    if scores.is_cuda:
        values, ids = scores.sort(dim=-1, stable=True)
        return values.flip(-1), ids.flip(-1)
    floor = (tail / scores.shape[-1] * 0.999).masked_fill(tail == 0, 2.0)
    candidates = int((probs >= floor[:, None, None]).sum(-1).max())
    ids = scores.topk(max(candidates, 1)).indices.sort(-1, descending=True).values
    values, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def token_logprobs(raw_logits: Tensor, processed: Processed, tokens: Tensor) -> TokenLogprobs:
    """What is reported of each token.

    Args:
        raw_logits: float32 [B, S, V], what `process` was given.
        processed: What it returned.
        tokens: int64 [B, S], in the vocabulary.
    """
    index = tokens.unsqueeze(-1)

    def chosen(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    logprob = chosen(raw_logits)
    if processed.logits is raw_logits:
        return TokenLogprobs(logprob, logprob, torch.ones_like(logprob))
    processed_logprob = chosen(processed.logits)
    if processed.uncut is None:
        return TokenLogprobs(logprob, processed_logprob, torch.ones_like(logprob))
    mask_mass = (processed.logits.logsumexp(-1) - processed.uncut.logsumexp(-1)).exp().clamp_max(1.0)
    return TokenLogprobs(logprob, processed_logprob, mask_mass)


def top_logprobs(raw_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the full policy at T=1: logprobs float32 and ids int64, each [B, S, k]."""
    ids = raw_logits.topk(k).indices
    return raw_logits.log_softmax(-1).gather(-1, ids), ids
