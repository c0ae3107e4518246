"""Drafts of the self-drafter on a CPU come from the q that the verifier is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("vllm")

from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from rollout_spec.integrations.vllm.self_drafter import SelfDrafter

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
