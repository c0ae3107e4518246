"""One decode pass laid out: who drafts what, which rows are computed, and where the drafts end up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rollout_spec.drafters.base import DraftRound, Proposal
from rollout_spec.models.decoder import Decoder
from rollout_spec.policy.records import Stop
from rollout_spec.sampling import verify
from rollout_spec.sampling.pipeline import SamplingBatch
from rollout_spec.torch_backend.runner import Block, Runner


class Drafts:
    """The draft tokens of a block, and how they came about.

    Attributes:
        block, batch, keys: As given.
        ragged: Which rows are computed; None if all lengths are the same.

    Args:
        lengths: Draft tokens of each sequence, int64 `[B]`.
        from_history: How many of them, the first, are history's, int64 `[B]`.
        history: Those tokens `[B, >= from_history.max()]`, or None if there are none.
        block: The block they are for; its sequences are in order of falling `lengths - from_history`.
        batch: Sampling parameters of its sequences.
        keys: Noise keys of its rows, int64 `[B, S]`.
        runner: Runs forwards.
        coupled: Which verifier is in force.
        stop: Ends the drafting of a drafter with weights; None: it drafts all.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        from_history: np.ndarray,
        history: np.ndarray | None,
        block: Block,
        batch: SamplingBatch,
        keys: Tensor,
        runner: Runner,
        coupled: bool,
        stop: Stop | None = None,
    ) -> None:
        self.block, self.batch, self.keys, self._runner, self._coupled = block, batch, keys, runner, coupled
        self._stop, self._leads = stop, list[np.ndarray]()
        self._before, self._own = from_history, lengths - from_history
        self._tokens = keys.new_zeros(keys.shape[0], keys.shape[1] - 1)
        self._history: Tensor | None = None
        if from_history.any():
            assert history is not None
            width = int(from_history.max())
            self._tokens[:, :width] = torch.from_numpy(history[:, :width]).to(keys.device)
            self._history = torch.from_numpy(from_history).to(keys.device)
        self._proposal: Proposal | None = None
        self.ragged = _ragged(lengths, keys.device)

    @property
    def follow_history(self) -> bool:
        """Whether history drafts the first tokens of some sequence."""
        return self._history is not None

    @property
    def round(self) -> DraftRound:
        """What a drafter with weights is asked for, behind history's tokens."""
        active = tuple(int((self._own > step).sum()) for step in range(int(self._own.max())))
        more = None if self._stop is None else self._more
        return DraftRound(active, self._coupled, self._forward, self._process, self._round_keys, more=more)

    def add(self, proposal: Proposal) -> None:
        """Put a drafter's tokens behind history's."""
        self._proposal = proposal
        for step, tokens in enumerate(proposal.tokens):
            count = len(tokens)
            if self._history is None:
                self._tokens[:count, step] = tokens[:, 0]
            else:
                self._tokens[:count].scatter_(1, self._history[:count, None] + step, tokens)

    def shorten(self, lengths: np.ndarray, block: Block) -> None:
        """Verify only the first `lengths [B]` drafts of each sequence, history's among them, in a `block` for so many."""
        self.block, self.keys = block, self.keys[:, : block.shape[1]]
        self.ragged = _ragged(lengths, self.keys.device)

    @property
    def tokens(self) -> Tensor:
        """int64 `[B, K]`, K the longest; what lies behind a sequence's own length is meaningless but in range."""
        return self._tokens[:, : self.keys.shape[1] - 1]

    @property
    def drafted(self) -> np.ndarray | None:
        """Tokens of each sequence that the drafter drew, int64 `[B]`; None if all that were asked for."""
        return np.minimum(self._own, len(self._leads)) if self._leads else None

    @property
    def leads(self) -> np.ndarray | None:
        """How sure the drafter was of its tokens, float32 `[B, steps]`, NaN where it drafted none; None if nobody asked."""
        if not self._leads:
            return None
        leads = np.full((len(self._own), len(self._leads)), np.nan, np.float32)
        for step, found in enumerate(self._leads):
            leads[: len(found), step] = found
        return leads

    @property
    def healthy(self) -> Tensor | None:
        """Whether all logits of the drafter were finite; None if no drafter with weights took part."""
        return None if self._proposal is None else self._proposal.healthy

    def verify(self, processed: Tensor) -> verify.Verdict:
        """The verdict on these drafts, given the processed logits of its rows (the computed ones, if ragged)."""
        lengths, greedy = self.block.draft_lengths, not self.batch.stages.sampled
        drafts = self.tokens if self.tokens.shape[1] else None
        if self._coupled:
            keys = None if greedy else self.keys
            return verify.verify_coupled(processed, drafts, lengths, keys, self.ragged)
        logits = None if self._proposal is None else self._proposal.logits
        if logits is None:
            return verify.verify_rejection(processed, drafts, lengths, None, self.keys, self.ragged)
        q_logits, q_place = torch.cat([x.squeeze(1) for x in logits]), torch.full_like(self._tokens, -1)
        start = 0
        for step, tokens in enumerate(self._proposal.tokens if self._proposal else ()):
            count = len(tokens)
            rows = torch.arange(start, start + count, device=q_place.device).unsqueeze(1)
            column = (
                torch.full_like(rows, step) if self._history is None else self._history[:count, None] + step
            )
            q_place[:count].scatter_(1, column, rows)
            start += count
        q_place = q_place[:, : self.tokens.shape[1]]
        return verify.verify_rejection(processed, drafts, lengths, q_logits, self.keys, self.ragged, q_place)

    # --- what a round calls ----------------------------------------------------------------------------

    def _more(self, leads: Tensor) -> bool:
        assert self._stop is not None
        self._leads.append(leads[:, 0].numpy())
        return self._stop.more(self._leads[-1])

    def _forward(self, model: Decoder, tokens: Tensor | None, step: int) -> Tensor:
        count = int((self._own > step).sum())
        last = self.block.last_tokens[:count, None]
        if self._history is None:
            return self._runner.forward(model, self.block, last if tokens is None else tokens[:count], step)
        if tokens is not None:
            return self._runner.forward(model, self.block, tokens[:count], self._history[:count] + step)
        before = self._before[:count]
        width = int(before.max())
        fed = torch.cat((last, self._tokens[:count, :width]), 1)
        cells = np.flatnonzero(np.arange(width + 1) <= before[:, None])
        ends = np.cumsum(before + 1) - 1
        return self._runner.forward(
            model,
            self.block,
            fed,
            cells=torch.from_numpy(cells).to(fed.device),
            wanted=torch.from_numpy(ends).to(fed.device),
        )

    def _process(self, raw: Tensor, step: int, drafted: list[Tensor]) -> Tensor:
        count = len(raw)
        batch = self.batch if count == len(self.keys) else self.batch.take(slice(count))
        if self._history is None:
            block = torch.cat([tokens[:count] for tokens in drafted], 1) if drafted else None
            return batch.process(raw, block, step).logits
        block = self._tokens[:count].clone()
        for earlier, tokens in enumerate(drafted):
            block.scatter_(1, self._history[:count, None] + earlier, tokens[:count])
        return batch.process(raw, block, self._history[:count] + step).logits

    def _round_keys(self, step: int) -> Tensor:
        count = int((self._own > step).sum())
        if self._history is None:
            return self.keys[:count, step : step + 1]
        return self.keys[:count].gather(1, self._history[:count, None] + step)


def _ragged(lengths: np.ndarray, device: torch.device) -> verify.Ragged | None:
    """The rows 0..lengths[b] of every sequence; None if all lengths are the same."""
    longest = int(lengths.max())
    if (lengths == longest).all():
        return None
    inside = np.arange(longest + 1) <= lengths[:, None]
    place = np.where(inside, np.cumsum(inside).reshape(inside.shape) - 1, 0)
    return verify.Ragged(*(torch.from_numpy(x).to(device) for x in (np.flatnonzero(inside), place)))
