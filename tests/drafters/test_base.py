"""The loop that drafters share."""

import math

import pytest
import torch

from rollout_spec.drafters.base import DraftRound, draft

VOCAB = 64


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(
    ("value", "healthy"), [(0.5, True), (-math.inf, True), (math.inf, False), (math.nan, False)]
)
@pytest.mark.parametrize("step", [0, 2])
def test_a_round_is_healthy_unless_some_logit_was_nan_or_infinite(coupled, value, healthy, step):
    """A token that cannot be drafted, at -inf, is no fault."""

    def forward(tokens, at):
        logits = torch.zeros(2, 1, VOCAB)
        if at == step:
            logits[1, 0, 7] = value
        return logits

    round = DraftRound(
        (2, 2, 2), coupled, None, lambda raw, *_: raw, lambda at: torch.tensor([[3 + at], [90 + at]])
    )
    proposal = draft(round, forward)
    assert bool(proposal.healthy) is healthy
    assert len(proposal.tokens) == 3
