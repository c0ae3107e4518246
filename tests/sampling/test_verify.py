from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.sampling import reference
from rollout_spec.sampling.noise import Stream, fold, row_keys
from rollout_spec.sampling.verify import (
    Ragged,
    coupled_scores,
    draft_coupled,
    draft_rejection,
    lead_coupled,
    lead_rejection,
    verify_coupled,
    verify_rejection,
)

V, TRUE_V = 64, 40


def make_logits(batch: int, rows: int, seed: int, scale: float = 2.0, holes: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, rows, V, generator=generator) * scale
    logits[torch.rand(logits.shape, generator=generator) < holes] = -math.inf
    logits[..., 3] = 0.0
    logits[..., TRUE_V:] = -math.inf
    return logits


def make_keys(batch: int, rows: int, seed: int = 0) -> torch.Tensor:
    bases = torch.tensor([fold(seed, b) for b in range(batch)])
    return row_keys(bases, 0, torch.arange(rows).expand(batch, -1))


def drafter_near(target: torch.Tensor, seed: int, noise: float = 0.8) -> torch.Tensor:
    k = target.shape[1] - 1
    return torch.where(
        target[:, :k] > -math.inf,
        target[:, :k] + noise * make_logits(len(target), k, seed, 1.0, 0.0),
        target[:, :k],
    )


def as_lists(verdict):
    return [
        (verdict.tokens[b, : verdict.emitted[b]].tolist(), verdict.accepted[b].item())
        for b in range(len(verdict.tokens))
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 5), point_mass=st.booleans())
def test_equal_the_reference(seed, k, point_mass):
    batch = 6
    target, keys = make_logits(batch, k + 1, seed), make_keys(batch, k + 1, seed)
    lengths = torch.randint(0, k + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    drafts = q = None
    if k:
        q = drafter_near(target, seed + 1)
        drafts = draft_coupled(q, keys[:, :k])
    verdict = verify_coupled(target, drafts, lengths, keys)
    for b, got in enumerate(as_lists(verdict)):
        draft = drafts[b, : lengths[b]].tolist() if k else []
        assert got == reference.verify_coupled(target[b].numpy(), draft, keys[b])
    if k:
        drafts = q.argmax(-1) if point_mass else draft_rejection(q, keys[:, :k])
        q = None if point_mass else q
    verdict = verify_rejection(target, drafts, lengths, q, keys)
    for b, got in enumerate(as_lists(verdict)):
        draft = drafts[b, : lengths[b]].tolist() if k else []
        expected = reference.verify_rejection(
            target[b].numpy(), draft, None if q is None else q[b].numpy(), keys[b]
        )
        assert got == expected


def test_shapes_and_types():
    target, keys = make_logits(3, 4, 0), make_keys(3, 4)
    q = drafter_near(target, 1)
    for verdict in (
        verify_coupled(target, draft_coupled(q, keys[:, :3]), None, keys),
        verify_rejection(target, draft_rejection(q, keys[:, :3]), None, q, keys),
    ):
        assert verdict.tokens.shape == (3, 4)
        assert all(x.dtype == torch.int64 for x in verdict)
        assert torch.equal(verdict.emitted, verdict.accepted + 1)


def test_coupled_tokens_are_those_of_plain_decoding():
    target, keys = make_logits(50, 5, 0), make_keys(50, 5)
    plain = torch.cat(
        [verify_coupled(target[:, i : i + 1], None, None, keys[:, i : i + 1]).tokens for i in range(5)], 1
    )
    drafts = draft_coupled(drafter_near(target, 1), keys[:, :4])
    assert torch.equal(verify_coupled(target, drafts, None, keys).tokens, plain)


@pytest.mark.parametrize("vocab_size", [64, 320, 152_064])
def test_coupled_scores_rank_the_emitted_token_first(vocab_size):
    torch.manual_seed(0)
    rows = 8 if vocab_size > 1000 else 2000
    target, keys = torch.randn(rows, 1, vocab_size) * 3, make_keys(rows, 1)
    target[:, :, 5::7] = -math.inf
    tokens = verify_coupled(target, None, None, keys).tokens
    scores = coupled_scores(target[:, 0], keys[:, 0])
    assert torch.equal(scores.argmax(-1, keepdim=True), tokens)
    assert (scores.topk(2).values.diff() < 0).all()
    assert not scores.isnan().any()
    assert not scores[:, 5::7].isfinite().any()


@pytest.mark.parametrize("vocab_size", [64, 320, 152_064])
def test_a_lead_is_the_distance_to_the_next_best_choice(vocab_size):
    torch.manual_seed(1)
    rows = 8 if vocab_size > 1000 else 500
    q, keys = torch.randn(rows, 1, vocab_size) * 3, make_keys(rows, 1)
    q[:, :, 5::7] = -math.inf
    drafts, leads = lead_coupled(q, keys)
    assert torch.equal(drafts, draft_coupled(q, keys))
    best = coupled_scores(q[:, 0], keys[:, 0]).double().topk(2).values
    assert leads.shape == (rows, 1) and (leads >= 0).all()
    torch.testing.assert_close(leads[:, 0].double(), best[:, 0] - best[:, 1], atol=1e-4, rtol=1e-4)


def test_a_choice_without_alternative_is_sure():
    """Greedy decoding: the processed distribution is a point mass."""
    q = torch.full((2, 1, V), -math.inf)
    q[[0, 1], 0, [5, 9]] = 0.0
    for lead in (lead_coupled, lead_rejection):
        drafts, leads = lead(q, make_keys(2, 1))
        assert drafts.tolist() == [[5], [9]] and (leads == math.inf).all()


def test_a_lead_under_rejection_is_the_log_odds_of_the_draft():
    q, keys = make_logits(400, 1, 2), make_keys(400, 1)
    q[:100, :, :3] = q[:100, :, 4:] = -math.inf  # a single choice is certain
    drafts, leads = lead_rejection(q, keys)
    assert torch.equal(drafts, draft_rejection(q, keys))
    p = q.double().softmax(-1).gather(-1, drafts[..., None])[..., 0]
    assert (leads[:100] > 10).all()
    torch.testing.assert_close(
        leads[100:].double(), (p / (1 - p)).log().clamp_min(0)[100:], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("lead", [lead_coupled, lead_rejection])
def test_a_broken_drafter_leads_by_nothing_that_counts(lead):
    q = make_logits(3, 1, 0)
    q[1] = math.nan
    drafts, leads = lead(q, make_keys(3, 1))
    assert ((drafts >= 0) & (drafts < V)).all()
    assert not leads[1] > 0 and leads[[0, 2]].isfinite().all()


def test_narrow_choices_are_the_ones_rejected():
    target, keys = make_logits(4000, 2, 0), make_keys(4000, 2)
    q = drafter_near(target, 1, noise=0.2)
    drafts, leads = lead_coupled(q, keys[:, :1])
    accepted = verify_coupled(target, drafts, None, keys).accepted == 1
    narrow = leads[:, 0] < leads.median()
    assert accepted[~narrow].double().mean() > accepted[narrow].double().mean() + 0.1


def test_a_perfect_drafter_is_always_accepted():
    target, keys = make_logits(500, 4, 0), make_keys(500, 4)
    q = target[:, :3]
    assert (verify_coupled(target, draft_coupled(q, keys[:, :3]), None, keys).accepted == 3).all()
    assert (verify_rejection(target, draft_rejection(q, keys[:, :3]), None, q, keys).accepted == 3).all()


def test_acceptance_rates_match_theory():
    n = 40_000
    target = make_logits(1, 2, 0).expand(n, -1, -1)
    q, keys = drafter_near(target[:1], 1).expand(n, -1, -1), make_keys(n, 2)
    tv = (target[0, 0].softmax(0) - q[0, 0].softmax(0)).abs().sum().item() / 2
    assert 0.2 < tv < 0.4
    rejection = (
        verify_rejection(target, draft_rejection(q, keys[:, :1]), None, q, keys).accepted.double().mean()
    )
    coupled = verify_coupled(target, draft_coupled(q, keys[:, :1]), None, keys).accepted.double().mean()
    assert abs(rejection - (1 - tv)) < 5 * 0.5 / math.sqrt(n)
    assert coupled > (1 - tv) / (1 + tv) - 5 * 0.5 / math.sqrt(n)


def test_greedy_rows_need_no_noise():
    target = torch.full((2, 3, V), -math.inf)
    target[0, range(3), [4, 5, 6]] = 0.0
    target[1, range(3), [7, 8, 9]] = 0.0
    drafts = torch.tensor([[4, 1], [7, 8]])
    expected = [([4, 5], 1), ([7, 8, 9], 2)]
    keys = make_keys(2, 3)
    assert as_lists(verify_coupled(target, drafts, None, None)) == expected
    assert as_lists(verify_coupled(target, drafts, None, keys)) == expected
    assert as_lists(verify_rejection(target, drafts, None, None, keys)) == expected
    assert torch.equal(draft_coupled(target, None), torch.tensor([[4, 5, 6], [7, 8, 9]]))


def test_tokens_without_probability_are_never_emitted():
    n, k = 20_000, 3
    target = make_logits(1, k + 1, 5, holes=0.8).expand(n, -1, -1)
    q, keys = make_logits(1, k, 6, holes=0.8).expand(n, -1, -1), make_keys(n, k + 1)
    for drafts, proposal in ((draft_rejection(q, keys[:, :k]), q), (torch.randint(0, TRUE_V, (n, k)), None)):
        for verdict in (
            verify_coupled(target, drafts, None, keys),
            verify_rejection(target, drafts, None, proposal, keys),
        ):
            emitted = torch.arange(k + 1) < verdict.emitted.unsqueeze(1)
            probable = target.gather(-1, verdict.tokens.unsqueeze(-1)).squeeze(-1) > -math.inf
            assert (probable | ~emitted).all()
    drafted = draft_rejection(q, keys[:, :k])
    assert (q.gather(-1, drafted.unsqueeze(-1)) > -math.inf).all()


BAD = {"nan": torch.nan, "inf": math.inf, "nothing": -math.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_row_of_the_drafter_ends_the_proposal(value):
    target, keys = make_logits(30, 4, 0), make_keys(30, 4)
    good = target[:, :3].clone()
    bad = good.clone()
    bad[:, 1] = value
    for draft in (draft_coupled, draft_rejection):
        drafts = draft(bad, keys[:, :3])
        assert drafts.min() >= 0
        assert drafts.max() < TRUE_V
    drafts = draft_rejection(bad, keys[:, :3])
    verdict = verify_rejection(target, drafts, None, bad, keys)
    shorter = verify_rejection(target, drafts, torch.full((30,), 1), good, keys)
    assert as_lists(verdict) == as_lists(shorter)
    assert (verdict.accepted == 1).all()


def test_drafts_that_q_excludes_or_that_are_out_of_range_count_as_not_proposed():
    target, keys = make_logits(30, 3, 0), make_keys(30, 3)
    q = target[:, :2].clone()
    q[..., 3] = -math.inf
    plain = as_lists(verify_rejection(target[:, :1], None, None, None, keys[:, :1]))
    for token in (3, -1, V, 10**9):
        drafts = torch.full((30, 2), token)
        assert as_lists(verify_rejection(target, drafts, None, q, keys)) == plain
        if token != 3:
            assert as_lists(verify_rejection(target, drafts, None, None, keys)) == plain
            assert (verify_coupled(target, drafts, None, keys).accepted == 0).all()


def test_an_empty_residual_falls_back_to_the_target(monkeypatch):
    """Rounding may reject where p = q; the token then comes from p."""
    target, keys = make_logits(20, 2, 0), make_keys(20, 2)
    drafts = draft_rejection(target[:, :1], keys[:, :1])

    def reject_always(keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        return torch.full(keys.shape, 1.5 if stream is Stream.ACCEPT else 0.5, dtype=torch.float64)

    monkeypatch.setattr("rollout_spec.sampling.verify.uniform", reject_always)
    verdict = verify_rejection(target, drafts, None, target[:, :1], keys)
    assert (verdict.accepted == 0).all()
    expected = [
        np.searchsorted(np.cumsum(p := reference.softmax(row.numpy())), 0.5 * p.sum()) for row in target[:, 0]
    ]
    assert verdict.tokens[:, 0].tolist() == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_the_rows_beside_them(threads):
    torch.set_num_threads(threads)
    target, keys = make_logits(40, 5, 0), make_keys(40, 5)
    q = drafter_near(target, 1)
    drafts = draft_rejection(q, keys[:, :4])
    together = verify_rejection(target, drafts, None, q, keys), verify_coupled(target, drafts, None, keys)
    for b in range(40):
        one = slice(b, b + 1)
        alone = (
            verify_rejection(target[one], drafts[one], None, q[one], keys[one]),
            verify_coupled(target[one], drafts[one], None, keys[one]),
        )
        for all_rows, row in zip(together, alone):
            assert as_lists(all_rows)[b] == as_lists(row)[0]


def ragged_of(lengths):
    """The rows 0..lengths[b] of every sequence, as a pass over them alone lays them out."""
    width = int(lengths.max()) + 1
    inside = torch.arange(width) <= lengths[:, None]
    place = torch.where(inside, inside.flatten().cumsum(0).view_as(inside) - 1, 0)
    return Ragged(inside.flatten().nonzero().squeeze(1), place)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_ragged_rows_give_the_verdict_of_the_whole_grid(batch, k, seed):
    generator = torch.Generator().manual_seed(seed)
    target, keys = make_logits(batch, k + 1, seed), make_keys(batch, k + 1)
    lengths = torch.randint(0, k + 1, (batch,), generator=generator)
    lengths[0] = k
    q = drafter_near(target, seed)[:, :k]
    ragged = ragged_of(lengths)
    rows = target.flatten(0, 1)[ragged.cells][:, None]
    drafts = draft_coupled(q, keys[:, :k])
    assert_same_verdict(
        verify_coupled(target, drafts, lengths, keys), verify_coupled(rows, drafts, lengths, keys, ragged)
    )
    drafts = draft_rejection(q, keys[:, :k])
    assert_same_verdict(
        verify_rejection(target, drafts, lengths, q, keys),
        verify_rejection(rows, drafts, lengths, q, keys, ragged),
    )


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_drafts_of_two_drafters_in_one_block(batch, k, seed):
    """The first drafts of a block are somebody's only choice, the others drawn from q: as the reference has it."""
    generator = torch.Generator().manual_seed(seed)
    target, keys = make_logits(batch, k + 1, seed), make_keys(batch, k + 1)
    q = drafter_near(target, seed)[:, :k]
    certain = torch.randint(0, k + 1, (batch,), generator=generator)
    likely = target[:, :k].argmax(-1)
    is_certain = torch.arange(k) < certain[:, None]
    drafts = torch.where(is_certain, likely, draft_rejection(q, keys[:, :k]))
    q_place = torch.where(is_certain, -1, torch.arange(batch * k).view(batch, k).flip(0))
    q_rows = q.flip(0).flatten(0, 1)
    lengths = torch.full((batch,), k)
    verdict = verify_rejection(target, drafts, lengths, q_rows, keys, None, q_place)
    point = torch.full_like(q, -math.inf).scatter_(-1, drafts[..., None], 0.0)
    mixed = torch.where(is_certain[..., None], point, q)
    assert_same_verdict(verdict, verify_rejection(target, drafts, lengths, mixed, keys))
    for b in range(batch):
        emitted, accepted = reference.verify_rejection(
            target[b].numpy(), drafts[b].tolist(), mixed[b].numpy(), keys[b]
        )
        assert int(verdict.accepted[b]) == accepted
        assert verdict.tokens[b, : accepted + 1].tolist() == emitted


def assert_same_verdict(a, b):
    assert torch.equal(a.accepted, b.accepted)
    for row, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        assert torch.equal(x[: a.emitted[row]], y[: b.emitted[row]])
