"""A reduced draft vocabulary: the tokens that rollouts really use (the verifier keeps all, so nothing is lost but speed)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import invalid


def token_counts(episodes: Iterable[Episode], vocab_size: int) -> Tensor:
    """int64 [vocab_size]: how often each token was sampled in the responses."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for episode in episodes:
        counts += torch.bincount(episode.tokens[episode.prompt_tokens :].cpu(), minlength=vocab_size)
    return counts


def choose_draft_tokens(counts: Tensor, coverage: float = 0.999, *, multiple: int = 64) -> Tensor | None:
    """The fewest most frequent tokens that make up `coverage` of `counts`, int64 ascending; None: all are needed.

    Their number is rounded up to a multiple of `multiple`, for the head's kernels.

    Raises:
        InvalidRequest: `coverage` is not within (0, 1], or nothing was counted.
    """
    if not 0 < coverage <= 1:
        raise invalid("coverage", coverage, "use a share within (0, 1]")
    total = int(counts.sum())
    if total == 0:
        raise invalid("counts", 0, "no token was sampled; give episodes with responses")
    frequency, order = counts.sort(descending=True, stable=True)
    enough = frequency.cumsum(0) >= coverage * total
    size = int(enough.int().argmax()) + 1
    size = -(-size // multiple) * multiple
    return None if size >= len(counts) else order[:size].sort().values
