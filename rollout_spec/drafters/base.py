"""What a drafter is: it proposes tokens for a round; it cannot change what is emitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rollout_spec.models.decoder import Attend, Decoder
from rollout_spec.models.weights import Piece
from rollout_spec.sampling import verify


class FeatureModel(Protocol):
    """What a drafter computes over features of the target."""

    def hidden(
        self, tokens: Tensor, positions: Tensor, features: Tensor, attend: Attend, *, own: bool
    ) -> Tensor:
        """States [R, H] of tokens int64 [R] with features [R, F], or with states [R, H] of its `own`."""


@dataclass(frozen=True)
class DraftRound:
    """One speculative block, as drafters see it.

    Sequences are in order of falling draft length. Those that draft in step j are the first `active[j]`; what a
    sequence drafts in its step 0 follows its last token, or what history has proposed behind it.

    Attributes:
        active: Sequences that draft in every step; as many entries as the longest draft has tokens.
        coupled: Whether to draft with the target's own noise (`coupled`) or with noise of its own.
        forward: `(model, tokens [B', 1] or None, j) -> logits [active[j], 1, V]`: run a decoder that shares the
            target's KV cache, writing provisional entries; `tokens` are those drafted in step j - 1, None in
            step 0.
        process: `(logits, j, drafted) -> logits` of the processed distribution that drafts are drawn from;
            `drafted` holds the tokens of the steps before.
        keys: `j -> int64 [active[j], 1]`: noise keys of the positions being drafted.
        follow: `(model, tokens [B', 1] or None, states [B', H] or None, j) -> states [active[j], H]`: run a
            `FeatureModel` over a cache of its own. In step 0 (None, None) it reads the target's features of all
            tokens that it has not read, later the `tokens` and its own `states` of step j - 1. None where the
            backend keeps no features.
        more: `leads float32 [active[j], 1] -> bool`: whether to go on after step j, given how sure the drafter was of
            what it drafted there (`verify.lead_coupled`, `verify.lead_rejection`); None: go on to the end.
    """

    active: tuple[int, ...]
    coupled: bool
    forward: Callable[[Decoder, Tensor | None, int], Tensor]
    process: Callable[[Tensor, int, list[Tensor]], Tensor]
    keys: Callable[[int], Tensor]
    follow: Callable[[FeatureModel, Tensor | None, Tensor | None, int], Tensor] | None = None
    more: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Proposal:
    """What was drafted in each step.

    Attributes:
        tokens: int64 `[active[j], 1]` per step.
        logits: The processed logits `[active[j], 1, V]` they were drawn from, for rejection sampling; None for a
            deterministic proposal (a point mass), or if nobody will ask.
        healthy: Boolean scalar tensor, False when the drafter produced a NaN or infinite logit; it is read with
            the verdict, without a synchronisation of its own.
    """

    tokens: list[Tensor]
    logits: list[Tensor] | None
    healthy: Tensor


def draft(round: DraftRound, forward: Callable[[Tensor | None, int], Tensor]) -> Proposal:
    """Draw a token of every sequence step by step, until all have theirs or the round wants no more.

    Args:
        forward: `(tokens [B', 1] of step j - 1 or None, j) -> logits float32 [active[j], 1, V]`.
    """
    tokens: Tensor | None = None
    drafted: list[Tensor] = []
    logits: list[Tensor] = []
    healthy: Tensor | None = None
    for step in range(len(round.active)):
        raw = forward(tokens, step)
        finite = raw.amax() < torch.inf  # NaN is the largest
        healthy = finite if healthy is None else healthy & finite
        processed = round.process(raw, step, drafted)
        if round.more is None:
            draw = verify.draft_coupled if round.coupled else verify.draft_rejection
            tokens, leads = draw(processed, round.keys(step)), None
        else:
            draw_led = verify.lead_coupled if round.coupled else verify.lead_rejection
            tokens, leads = draw_led(processed, round.keys(step))
        drafted.append(tokens)
        if not round.coupled:
            logits.append(processed)
        if leads is not None and round.more is not None and not round.more(leads):
            break
    assert healthy is not None, "a round has at least one step"
    return Proposal(drafted, logits or None, healthy)


class Drafter(Protocol):
    """`stage` and `commit` follow the policy through an update.

    Attributes:
        name: Distinct among the drafters of an engine.
        version: Of the policy that it is a copy of, under another version of which it is stale; else its own.
    """

    name: str
    version: int

    def propose(self, round: DraftRound) -> Proposal:
        """Draft for every sequence of the round."""

    def stage(self, piece: Piece) -> None:
        """Take one new weight of the policy, as it arrives; nothing is in force before `commit`."""

    def commit(self, target: Decoder, version: int) -> None:
        """Put everything staged in force, for the policy `version` whose weights `target` now holds."""

    def rollback(self) -> None:
        """Forget what was staged; the update failed."""

    def discard(self) -> None:
        """Free its weights (sleep); usable again after the next `commit`."""
