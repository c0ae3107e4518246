"""Both verifiers emit exactly the target's processed distribution: chi-square against an enumerated joint.

`test_power.py` shows that verifiers broken on purpose do not pass.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_toy import (
    DEPTH,
    DRAFT,
    OPTIONS,
    PADDED,
    VERIFIERS,
    VOCAB,
    N,
    chi_square,
    coupled,
    joint_p_value,
    noise_bases,
    pair_p_value,
    rejection,
    simulate,
)

from rollout_spec.contracts import SamplingParams
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.verify import draft_coupled, draft_rejection, verify_coupled

CASES = [
    (verifier, temperature, option, (1, 2, 4)[(t + o) % 3])
    for verifier in ("coupled", "rejection")
    for t, temperature in enumerate((0.7, 1.0, 1.3))
    for o, option in enumerate(OPTIONS)
]


BONFERRONI = 1e-4 / 60


@pytest.mark.parametrize(("verifier", "temperature", "option", "k"), CASES)
def test_emits_the_processed_distribution(verifier, temperature, option, k):
    params = SamplingParams(temperature=temperature, **OPTIONS[option])
    verify = VERIFIERS[verifier]
    tokens = simulate(
        params, k, verify, draft=DRAFT[verify], version=CASES.index((verifier, temperature, option, k))
    )
    assert joint_p_value(tokens, params) > BONFERRONI


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("option", ["none", "all"])
def test_emits_the_processed_distribution_with_a_deterministic_proposal(verifier, option):
    params = SamplingParams(**OPTIONS[option])
    assert joint_p_value(simulate(params, 2, VERIFIERS[verifier], version=100), params) > BONFERRONI


@pytest.mark.parametrize("option", ["none", "all"])
def test_a_drafter_that_returns_nan_changes_nothing_emitted(option):
    params = SamplingParams(**OPTIONS[option])
    tokens = simulate(params, 2, rejection, draft=draft_rejection, version=101, corrupt=0.4)
    assert joint_p_value(tokens, params) > BONFERRONI


@pytest.mark.parametrize("option", OPTIONS)
def test_coupled_trajectories_do_not_depend_on_the_draft(option):
    params = SamplingParams(temperature=0.9, **OPTIONS[option])
    bases = noise_bases()[:5_000]
    plain = simulate(params, 0, coupled, draft=draft_coupled, bases=bases)
    for k, corrupt in ((1, 0.0), (2, 0.4), (4, 0.0)):
        speculative = simulate(params, k, coupled, draft=draft_coupled, bases=bases, corrupt=corrupt)
        assert torch.equal(plain, speculative)
    assert torch.equal(plain, simulate(params, 2, coupled, bases=bases))


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_siblings_and_policy_steps_are_independent(verifier):
    params, verify = SamplingParams(), VERIFIERS[verifier]
    run = simulate(params, 2, verify, draft=DRAFT[verify], version=200)
    sibling = simulate(params, 2, verify, draft=DRAFT[verify], version=200, bases=noise_bases(sample=1))
    next_step = simulate(params, 2, verify, draft=DRAFT[verify], version=201)
    assert pair_p_value(run, sibling, params) > BONFERRONI
    assert pair_p_value(run, next_step, params) > BONFERRONI


def test_coupled_positions_are_independent():
    """Under one unconditional distribution for every token, four tokens are four independent draws."""
    logits = torch.full((PADDED,), -torch.inf)
    logits[:VOCAB] = torch.linspace(0, 1.5, VOCAB)
    keys = row_keys(noise_bases(), 3, torch.arange(DEPTH).expand(N, -1))
    tokens = verify_coupled(logits.expand(N, DEPTH, -1), None, None, keys).tokens
    single = logits[:VOCAB].double().softmax(0).numpy()
    joint = single
    for _ in range(DEPTH - 1):
        joint = np.outer(joint, single).reshape(-1)
    weights = VOCAB ** torch.arange(DEPTH - 1, -1, -1)
    assert chi_square((tokens * weights).sum(1), joint) > BONFERRONI
