"""Drafts of history and of a drafter in one ragged block."""

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


def test_rows_may_begin_at_another_column_in_every_sequence(make_engine):
    """As drafts behind history's do: a row has the logits that it has in a pass over the whole block."""
    backend = make_engine().backend
    runner, size, rng = backend.runner, backend.config.block_size, np.random.default_rng(0)
    length, first = np.array([size + 9, 6]), torch.tensor([2, 1])
    tokens = rng.integers(0, backend.spec.vocab_size, (2, size + 20))
    tables = np.array([backend.pool.allocate(2) for _ in length])
    slots = SimpleNamespace(tables=tables, length=length, tokens=tokens)
    with torch.inference_mode():
        for row, count in enumerate(length):
            runner.score(runner.target, tokens[row, :count], tables[row])
        block = runner.block(slots, np.arange(2), np.array([3, 3]))
        fed = torch.from_numpy(np.stack([row[n - 1 : n + 3] for row, n in zip(tokens, length)]))
        whole = runner.forward(runner.target, block, fed)
        found = runner.forward(runner.target, block, fed.gather(1, first[:, None]), first)
    assert torch.allclose(found[:, 0], whole[torch.arange(2), first], atol=1e-5)
    assert not torch.allclose(whole[:, 1], whole[:, 2], atol=1e-2)
