"""Drafts of the self-drafter on a CPU come from the q that the verifier is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("vllm")

from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from rollout_spec.integrations.vllm.self_drafter import SelfDrafter, draw

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

SAMPLES = 40_000


def sampling(*temperatures: float) -> SimpleNamespace:
    return SimpleNamespace(
        temperature=torch.tensor(temperatures),
        all_greedy=max(temperatures) == 0,
        all_random=min(temperatures) > 0,
    )


@pytest.fixture
def drafter() -> SelfDrafter:
    made = object.__new__(SelfDrafter)
    made.device = torch.device("cpu")
    made._enable_probabilistic_draft_probs = True
    return made


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.45, 0.2, 0.0])
    counts = torch.bincount(draw(p.expand(SAMPLES, -1)), minlength=7)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], p[p > 0].double() / p.double().sum() * SAMPLES).pvalue > 1e-3
    assert chisquare(counts[p > 0], torch.full((4,), SAMPLES / 4)).pvalue < 1e-9  # it would see


@pytest.mark.parametrize("last", [0, 4])
def test_the_ends_of_a_row_can_be_drawn_and_nothing_behind_them(last: int) -> None:
    p = torch.zeros(1000, 5)
    p[:, last] = 0.3  # sums need not be one
    assert (draw(p) == last).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_numbers_stay_within_what_is_probable(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, dtype: torch.full(size, number, dtype=dtype))
    p = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0], [0.0, 0.1, 0.1, 0.1, 0.0]])
    assert draw(p).tolist() == [1 if number == 0 else 3] * 2


def test_q_is_vllms_and_drafts_come_from_it(drafter: SelfDrafter) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    for temperature in (1.0, 0.6):
        rows, metadata = logits.repeat(SAMPLES, 1), sampling(*[temperature] * SAMPLES)
        tokens, q = drafter._sample_from_logits(rows.clone(), metadata)
        _, theirs = compute_probs_and_sample_next_token(rows[:1].clone(), sampling(temperature))
        assert q is not None
        torch.testing.assert_close(q[:1], theirs)
        counts = torch.bincount(tokens, minlength=12)
        assert chisquare(counts, q[0].double() / q[0].double().sum() * SAMPLES).pvalue > 1e-3


def test_greedy_requests_among_others_get_the_likeliest(drafter: SelfDrafter) -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 6)
    tokens, _ = drafter._sample_from_logits(logits.clone(), sampling(*[0.0, 1.0] * 200))
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))
    tokens, _ = drafter._sample_from_logits(logits.clone(), sampling(*[0.0] * 400))
    assert torch.equal(tokens, logits.argmax(-1))
