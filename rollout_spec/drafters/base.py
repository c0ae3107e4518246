"""What a drafter is: it proposes tokens for a round; it cannot change what is emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rollout_spec.models.decoder import Decoder
from rollout_spec.models.weights import Piece
from rollout_spec.sampling.pipeline import SamplingBatch


@dataclass(frozen=True)
class DraftRound:
    """One speculative block, as drafters see it.

    Attributes:
        last_tokens: The token each sequence ends with `[B]`; its keys and values are not in the cache yet.
        width: Draft tokens to propose, K.
        batch: The sampling pipeline of these sequences; drafts are drawn from the processed distribution.
        keys: Noise keys of the K positions being drafted `[B, K]`.
        coupled: Whether to draft with the target's own noise (`coupled`) or with noise of its own.
        forward: `(model, tokens [B, n], first) -> logits [B, n, V]`: run a decoder that shares the target's
            KV cache on rows `first ..` of the block, writing provisional entries.
    """

    last_tokens: Tensor
    width: int
    batch: SamplingBatch
    keys: Tensor
    coupled: bool
    forward: Callable[[Decoder, Tensor, int], Tensor]


@dataclass(frozen=True)
class Proposal:
    """Draft tokens `[B, K]` and, for rejection sampling, the processed logits `[B, K, V]` they were drawn from.

    `logits` is None for a deterministic proposal (a point mass). `healthy` is a boolean scalar tensor, False
    when the drafter produced a NaN or infinite logit; it is read with the verdict, without a synchronisation of
    its own.
    """

    tokens: Tensor
    logits: Tensor | None
    healthy: Tensor


class Drafter(Protocol):
    """Made from policy `version`; `stage` and `commit` follow the policy through an update."""

    name: str
    version: int

    def propose(self, round: DraftRound) -> Proposal:
        """Draft `round.width` tokens for every sequence."""

    def stage(self, piece: Piece) -> None:
        """Take one new weight of the policy, as it arrives; nothing is in force before `commit`."""

    def commit(self, target: Decoder, version: int) -> None:
        """Put everything staged in force, for the policy `version` whose weights `target` now holds."""

    def rollback(self) -> None:
        """Forget what was staged; the update failed."""

    def discard(self) -> None:
        """Free its weights (sleep); usable again after the next `commit`."""
