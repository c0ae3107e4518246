"""The chi-square test has power: each verifier here has one mistake, and is caught at p < 1e-8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sampling_toy import (
    DRAFT,
    VERIFIERS,
    Step,
    coupled,
    joint_p_value,
    pair_p_value,
    rejection,
    simulate,
)

from rollout_spec.contracts import SamplingParams
from rollout_spec.sampling.noise import Stream, uniform
from rollout_spec.sampling.verify import Verdict, draft_coupled, draft_rejection, verify_rejection

CAUGHT = 1e-8


def replace_last(step: Step, verdict: Verdict, logits: torch.Tensor, where: torch.Tensor) -> Verdict:
    """`verdict` with its last emitted token drawn from row [B, V] of `logits` instead, in the sequences `where`."""
    row = verdict.accepted.unsqueeze(1)
    key = step.keys.gather(1, row)
    redrawn = verify_rejection(logits.unsqueeze(1), None, None, None, key).tokens
    last = torch.where(where.unsqueeze(1), redrawn, verdict.tokens.gather(1, row))
    return verdict._replace(tokens=verdict.tokens.scatter(1, row, last))


def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x)), index.clamp(0, x.shape[1] - 1)]


def no_residual(step: Step) -> Verdict:
    verdict = rejection(step)
    return replace_last(step, verdict, rows(step.target, verdict.accepted), verdict.accepted < step.lengths)


def bonus_from_q(step: Step) -> Verdict:
    verdict = rejection(step)
    return replace_last(step, verdict, rows(step.q, verdict.accepted), verdict.accepted == step.lengths)


def bonus_from_the_row_before(step: Step) -> Verdict:
    verdict = rejection(step)
    return replace_last(
        step, verdict, rows(step.target, verdict.accepted - 1), verdict.accepted == step.lengths
    )


def bonus_from_the_last_row(step: Step) -> Verdict:
    verdict = rejection(step)
    return replace_last(step, verdict, step.target[:, -1], verdict.accepted == step.lengths)


def q_at_another_temperature(step: Step) -> Verdict:
    return rejection(replace(step, q=step.q * 0.7))


def q_without_its_row(step: Step) -> Verdict:
    return rejection(replace(step, q=step.q.roll(1, 0)))


def q_unprocessed(step: Step) -> Verdict:
    return rejection(replace(step, q=step.q_raw))


def target_unprocessed(step: Step) -> Verdict:
    return rejection(replace(step, target=step.target_raw))


def residual_unprocessed(step: Step) -> Verdict:
    verdict = rejection(step)
    unprocessed = rejection(replace(step, target=step.target_raw, q=step.q_raw))
    row = verdict.accepted.unsqueeze(1)
    swap = (unprocessed.accepted == verdict.accepted).unsqueeze(1)
    last = torch.where(swap, unprocessed.tokens.gather(1, row), verdict.tokens.gather(1, row))
    return verdict._replace(tokens=verdict.tokens.scatter(1, row, last))


def target_row_off_by_one(step: Step) -> Verdict:
    shifted = torch.cat([step.target[:, :1], step.target[:, :-1]], 1)
    return rejection(replace(step, target=shifted))


def coupled_unprocessed(step: Step) -> Verdict:
    return coupled(replace(step, target=step.target_raw))


def coupled_emits_the_draft(step: Step) -> Verdict:
    """Accepts one draft more than agreed."""
    verdict = coupled(step)
    accepted = (verdict.accepted + 1).minimum(step.lengths)
    tokens = torch.where(
        torch.arange(step.drafts.shape[1]) < accepted.unsqueeze(1), step.drafts, verdict.tokens[:, :-1]
    )
    return Verdict(torch.cat([tokens, verdict.tokens[:, -1:]], 1), accepted + 1, accepted)


BROKEN = [
    no_residual,
    bonus_from_q,
    bonus_from_the_row_before,
    bonus_from_the_last_row,
    q_at_another_temperature,
    q_without_its_row,
    q_unprocessed,
    target_unprocessed,
    residual_unprocessed,
    target_row_off_by_one,
    coupled_unprocessed,
    coupled_emits_the_draft,
]


@pytest.mark.parametrize("verify", BROKEN, ids=lambda verify: verify.__name__)
def test_a_broken_verifier_is_caught(verify):
    params = SamplingParams(temperature=0.7 if "processed" in verify.__name__ else 1.0)
    draft = draft_coupled if verify.__name__.startswith("coupled") else draft_rejection
    assert joint_p_value(simulate(params, 2, verify, draft=draft, version=300), params) < CAUGHT


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_noise_of_a_position_used_twice_is_caught(verifier):
    """The bonus token's position is not counted, so the next step starts with its noise again."""
    params, verify = SamplingParams(), VERIFIERS[verifier]
    tokens = simulate(
        params, 2, verify, draft=DRAFT[verify], version=301, advance=lambda verdict: verdict.accepted
    )
    assert joint_p_value(tokens, params) < CAUGHT


def test_draft_noise_reused_in_the_residual_draw_is_caught(monkeypatch):
    def reusing(keys: torch.Tensor, stream: Stream) -> torch.Tensor:
        return uniform(keys, Stream.DRAFT if stream is Stream.RESIDUAL else stream)

    monkeypatch.setattr("rollout_spec.sampling.verify.uniform", reusing)
    params = SamplingParams()
    assert joint_p_value(simulate(params, 2, rejection, draft=draft_rejection, version=302), params) < CAUGHT


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_noise_shared_between_siblings_is_caught(verifier):
    params, verify = SamplingParams(), VERIFIERS[verifier]
    run, sibling = (simulate(params, k, verify, draft=DRAFT[verify], version=303) for k in (1, 2))
    assert pair_p_value(run, sibling, params) < CAUGHT
