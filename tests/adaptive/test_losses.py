"""Every formula against a slow one, and the acceptance that is predicted against decoding that is simulated."""

import math
import random

import numpy as np
import pytest
import torch

from rollout_spec.adaptive import losses
from rollout_spec.adaptive.acceptance import expected_rounds, measure
from rollout_spec.adaptive.losses import Objective
from rollout_spec.contracts import InvalidRequest

from .training_toys import make_episodes, make_module, make_target


def distributions(rows=4, vocab=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, rows, vocab, generator=generator)).log_softmax(-1)


def test_kl_and_tv_are_their_sums():
    log_p, log_q = distributions()
    for row, (p, q) in enumerate(zip(log_p.exp().tolist(), log_q.exp().tolist())):
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        tv = sum(abs(a - b) for a, b in zip(p, q)) / 2
        assert losses.kl(log_p, log_q)[row].item() == pytest.approx(kl, abs=1e-5)
        assert losses.tv(log_p, log_q)[row].item() == pytest.approx(tv, abs=1e-5)


def test_kl_and_soft_cross_entropy_have_one_gradient():
    log_p, _ = distributions()
    logits = torch.randn(4, 6, requires_grad=True)
    (a,) = torch.autograd.grad(losses.kl(log_p, logits.log_softmax(-1)).sum(), logits)
    (b,) = torch.autograd.grad(-(log_p.exp() * logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(a, b)


def test_a_reduced_vocabulary_leaves_out_tokens():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1, 4, 6])
    log_p, on_draft = losses.log_distribution(logits, tokens)
    log_q = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    q = torch.zeros(3, 8).index_copy_(1, tokens, log_q.exp())
    torch.testing.assert_close(losses.tv(on_draft, log_q), (log_p.exp() - q).abs().sum(1) / 2)
    best = on_draft.softmax(-1).log()  # p rescaled: no q has a smaller kl
    assert (losses.kl(on_draft, best) <= losses.kl(on_draft, log_q)).all()


def test_feature_regression_is_smooth_l1():
    a, b = torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 1.0]])
    assert losses.feature_regression(a, b).item() == pytest.approx((0.5 * 0.25 + 1.5) / 2)


def test_the_objective_is_the_weighted_sum():
    log_p, log_q = distributions()
    states, features = torch.randn(4, 5), torch.randn(4, 5)
    got = Objective(0.5, 2.0, 3.0)(log_p, log_q, states, features)
    regression = losses.feature_regression(states, features)
    want = 0.5 * regression + 2.0 * losses.kl(log_p, log_q) + 3.0 * losses.tv(log_p, log_q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("values", [{"kl": 0.0}, {"tv": -1.0}, {"feature": math.nan}])
def test_an_objective_without_sense_is_refused(values):
    with pytest.raises(InvalidRequest, match="objective"):
        Objective(**values)


def test_features_are_not_what_eagle3_predicts():
    with pytest.raises(InvalidRequest, match=r"objective.feature=1.0"):
        Objective(feature=1.0).check("eagle3")


def test_coupled_acceptance_is_that_of_gumbel_noise():
    log_p, log_q = distributions(2, 5)
    noise = -torch.log(-torch.log(torch.rand(400_000, 1, 5, generator=torch.Generator().manual_seed(0))))
    theirs, mine = (log_p + noise).argmax(-1), (log_q + noise).argmax(-1)
    for row in range(2):
        for token in range(5):
            drawn = theirs[:, row] == token
            share = (mine[drawn, row] == token).float().mean().item()
            chance = losses.coupled_acceptance(
                log_p[row : row + 1], log_q[row : row + 1], torch.tensor([token])
            )
            assert chance.item() == pytest.approx(share, abs=4 / math.sqrt(int(drawn.sum()) + 1))
    never = log_q.clone()
    never[:, 2] = -torch.inf
    assert losses.coupled_acceptance(log_p, never, torch.tensor([2, 2])).tolist() == [0.0, 0.0]


def test_rounds_are_those_of_simulated_verification():
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.2, 1.0, (3, 11))
    draw, counts = random.Random(0), []
    for _ in range(40_000):
        at = rounds = 0
        while at < 11:
            step = 0
            while step < 3 and at + step < 11 and draw.random() < chance[step, at + step]:
                step += 1
            at, rounds = at + step + 1, rounds + 1
        counts.append(rounds)
    assert expected_rounds(chance) == pytest.approx(np.mean(counts), abs=5 * np.std(counts) / 200)
    assert expected_rounds(np.ones((3, 8))) == pytest.approx(2)
    assert expected_rounds(np.zeros((3, 8))) == pytest.approx(8)


@pytest.mark.parametrize("kind", ["eagle", "reduced"])
def test_acceptance_is_one_minus_tv_and_batches_do_not_matter(kind):
    module, tensors = make_module(make_target(), kind)
    episodes = make_episodes(module.spec, prompt=3)
    whole = measure(module, tensors, episodes, 3)
    parts = measure(module, tensors, episodes, 3, batch_tokens=8)
    assert whole.tokens == parts.tokens == sum(len(e.tokens) - 3 for e in episodes[1:])
    assert whole.alpha == pytest.approx(parts.alpha, abs=1e-5) and whole.tau == pytest.approx(parts.tau)
    assert 1.0 < whole.tau_coupled <= whole.tau < 4.0
