from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rollout_spec.sampling.noise import Stream, _from_bits, exponential, fold, row_keys, uniform

SMALL = 1e-6
GOLDEN_FOLD = -859326071430289947
GOLDEN_KEY = -5733677949585325897
GOLDEN_NOISE = [0.9375422, 1.4325699, 0.30203757]
GOLDEN_UNIFORM = 0.6476462522223495


def make_keys(rows: int, base: int = 0, version: int = 1) -> torch.Tensor:
    return row_keys(torch.tensor([fold(11, base)]), version, torch.arange(rows)[None])


def test_fold_separates_order_sign_length_and_grouping():
    words = [
        (),
        (0,),
        (0, 0),
        (1, 2),
        (2, 1),
        (-1,),
        (2**64 - 1,),
        (2**63,),
        (-(2**63),),
        (1 + (2 << 64),),
        (2**200,),
    ]
    keys = [fold(*w) for w in words]
    assert len(set(keys)) == len(words)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    flips = [bin((fold(5, 7) ^ fold(5, 7 ^ (1 << bit))) & 2**64 - 1).count("1") for bit in range(64)]
    assert 30 < np.mean(flips) < 34


def test_noise_is_a_fixed_function_of_its_key():
    """A change of these numbers changes every trajectory that a user may want to replay."""
    assert fold(1, 2, 3) == GOLDEN_FOLD
    key = row_keys(torch.tensor([fold(1, 2, 3)]), 4, torch.tensor([[5]]))
    assert key.item() == GOLDEN_KEY
    torch.testing.assert_close(exponential(key, 64, Stream.TARGET)[0, 0, :3], torch.tensor(GOLDEN_NOISE))
    assert uniform(key, Stream.ACCEPT).item() == pytest.approx(GOLDEN_UNIFORM, rel=1e-12)


def test_row_keys_do_not_collide():
    bases = torch.tensor([fold(0, i) for i in range(300)])
    position = torch.cat([torch.arange(300), 2**31 + torch.arange(50)]).expand(300, -1)
    keys = torch.cat([row_keys(bases, version, position).reshape(-1) for version in (0, 1, 2, 2**30)])
    assert len(keys.unique()) == len(keys)


def test_a_version_per_sequence_equals_the_same_version_for_all():
    bases, position = torch.tensor([fold(1), fold(2)]), torch.arange(6).view(2, 3)
    both = row_keys(bases, torch.tensor([7, 2**31 - 1]), position)
    assert torch.equal(both[0], row_keys(bases, 7, position)[0])
    assert torch.equal(both[1], row_keys(bases, 2**31 - 1, position)[1])


@pytest.mark.parametrize("stream", list(Stream))
def test_marginal_distributions(stream):
    keys = make_keys(32, base=int(stream))
    e = exponential(keys, 8192, stream).double().flatten().numpy()
    assert stats.kstest(e, "expon").pvalue > SMALL
    u = uniform(make_keys(200_000), stream).flatten()
    assert u.dtype == torch.float64
    assert 0 < u.min() < u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > SMALL


def test_one_token_over_many_positions_is_exponential():
    e = exponential(make_keys(100_000), 64, Stream.TARGET)[0].double()
    for token in (0, 1, 33, 63):
        assert stats.kstest(e[:, token].numpy(), "expon").pvalue > SMALL
    winners = torch.bincount(e.argmin(-1), minlength=64).numpy()
    assert stats.chisquare(winners).pvalue > SMALL


def test_the_small_tail_has_the_right_weight_and_full_resolution():
    tail, number = [], 0
    for base in range(16):
        e = exponential(make_keys(4, base), 2**20, Stream.TARGET).flatten()
        assert e.isfinite().all()
        assert e.min() > 0
        tail.append(e[e < 2**-8])
        number += len(e)
    small = torch.cat(tail).double().numpy()
    for bits in (8, 12, 16, 20):
        chance = -math.expm1(-(2.0**-bits))
        assert stats.binomtest(int((small < 2.0**-bits).sum()), number, chance).pvalue > SMALL
    smallest = small[small < 2**-14]
    assert stats.kstest(-np.expm1(-smallest) / -math.expm1(-(2**-14)), "uniform").pvalue > SMALL
    off_grid = np.expm1(-smallest) * 2**32 % 1
    assert len(np.unique(off_grid)) > len(off_grid) * 0.9


def test_the_extreme_words_give_finite_positive_noise():
    low, high = -(2**31), 2**31 - 1
    whole = torch.tensor([low, low, low, high, high, 0, 0, -1, -1, -1], dtype=torch.int32)
    fraction = torch.tensor([low, 0, high, low, high, low, high, low, 0, high], dtype=torch.int32)
    e = _from_bits(whole, fraction, torch.empty(10))
    assert e.min() > 2.0**-53
    assert e.max() < 16.7
    assert (-e.log()).isfinite().all()


def pairs():
    def e(keys, stream=Stream.TARGET):
        return exponential(keys, 4096, stream)[0]

    base = e(make_keys(65))
    yield "adjacent positions", base[:-1], base[1:]
    yield "positions 64 apart", base[:1], base[64:]
    yield "adjacent tokens", base[:, :-1], base[:, 1:]
    yield "tokens 64 apart", base[:, :-64], base[:, 64:]
    yield "tokens 2048 apart", base[:, :2048], base[:, 2048:]
    yield "siblings", base, e(make_keys(65, base=1))
    yield "versions", base, e(make_keys(65, version=2))
    for stream in (Stream.DRAFT, Stream.ACCEPT, Stream.RESIDUAL):
        yield f"target and {stream.name}", base, e(make_keys(65), stream)


@pytest.mark.parametrize(("name", "a", "b"), list(pairs()))
def test_no_dependence(name, a, b):
    """Correlation of uniforms and of extremes, and an 8 x 8 contingency table."""
    u, w = (-torch.expm1(-x.double().flatten()) for x in (a, b))
    n = len(u)
    for f in (lambda x: x, torch.log, lambda x: (x < 0.01).double()):
        r = torch.corrcoef(torch.stack([f(u), f(w)]))[0, 1].item()
        assert abs(r) * math.sqrt(n) < 5.5, name
    table = torch.bincount((u * 8).long() * 8 + (w * 8).long(), minlength=64).numpy()
    assert stats.chisquare(table).pvalue > SMALL, name


@pytest.mark.parametrize("stream_pair", [(Stream.DRAFT, Stream.RESIDUAL), (Stream.DRAFT, Stream.ACCEPT)])
def test_streams_of_uniforms_are_independent(stream_pair):
    u, w = (uniform(make_keys(200_000), stream).flatten() for stream in stream_pair)
    table = torch.bincount((u * 16).long() * 16 + (w * 16).long(), minlength=256).numpy()
    assert stats.chisquare(table).pvalue > SMALL


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab_size", [64, 576, 4160])
def test_a_row_does_not_depend_on_the_rows_beside_it(threads, vocab_size):
    torch.set_num_threads(1)
    keys = make_keys(64)
    alone = torch.cat([exponential(keys[:, i : i + 1], vocab_size, Stream.TARGET) for i in range(64)], 1)
    torch.set_num_threads(threads)
    for rows in range(1, 65):
        assert torch.equal(exponential(keys[:, :rows], vocab_size, Stream.TARGET), alone[:, :rows])
        assert torch.equal(uniform(keys[:, :rows], Stream.ACCEPT), uniform(keys, Stream.ACCEPT)[:, :rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_large_vocabulary_does_not_depend_on_threads(threads):
    keys = make_keys(3)
    alone = torch.cat([exponential(keys[:, i : i + 1], 152_064, Stream.TARGET) for i in range(3)], 1)
    torch.set_num_threads(threads)
    out = torch.empty(1, 3, 152_064)
    assert exponential(keys, 152_064, Stream.TARGET, out=out) is out
    assert torch.equal(out, alone)
