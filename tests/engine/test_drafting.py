"""Drafts of history and of a drafter in one ragged block, under rejection sampling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout_spec.drafters.base import Proposal
from rollout_spec.sampling import verify
from rollout_spec.sampling.noise import fold, row_keys
from rollout_spec.torch_backend.drafting import Drafts

V = 64


@pytest.mark.parametrize("seed", range(40))
def test_every_draft_is_judged_by_the_distribution_it_was_drawn_from(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, before = np.array([4, 3, 2, 3]), np.array([1, 0, 0, 3])  # own: 3, 3, 2, 0
    batch, width = len(lengths), int(lengths.max())
    target = torch.randn(batch, width + 1, V, generator=generator) * 2
    q = target[:, :width] + 0.5 * torch.randn(batch, width, V, generator=generator)
    keys = row_keys(torch.tensor([fold(seed, b) for b in range(batch)]), 0, torch.arange(width + 1)[None])
    history = target[:, :width].argmax(-1).numpy()
    block = SimpleNamespace(draft_lengths=torch.from_numpy(lengths), last_tokens=torch.zeros(batch))
    stages = SimpleNamespace(stages=SimpleNamespace(sampled=True))
    drafts = Drafts(lengths, before, history, block, stages, keys, None, False)
    tokens, logits = [], []
    for step in range(3):
        rows = np.flatnonzero(lengths - before > step)
        at = torch.from_numpy(before[rows] + step)
        logits.append(q[rows, at][:, None])
        tokens.append(verify.draft_rejection(logits[-1], keys[rows, at][:, None]))
    drafts.add(Proposal(tokens, logits, torch.tensor(True)))
    found = drafts.verify(target.flatten(0, 1)[drafts.ragged.cells][:, None])

    certain = torch.arange(width) < torch.from_numpy(before)[:, None]
    point = torch.full_like(q, -math.inf).scatter_(-1, drafts.tokens[..., None], 0.0)
    mixed = torch.where(certain[..., None], point, q)
    expected = verify.verify_rejection(target, drafts.tokens, torch.from_numpy(lengths), mixed, keys)
    assert torch.equal(found.accepted, expected.accepted)
    for b in range(batch):
        emitted = int(expected.emitted[b])
        assert torch.equal(found.tokens[b, :emitted], expected.tokens[b, :emitted])
