"""The noise and the coupled choice: to the bit what torch's operations give."""

import pytest
import torch

from rollout_spec.sampling import noise, verify
from rollout_spec.sampling.noise import Stream, exponential, row_keys
from rollout_spec.sampling.verify import draft_coupled, lead_coupled


def make_keys(rows, base=7):
    return row_keys(torch.tensor([base]), 3, torch.arange(rows)[None])


def make_logits(rows, vocab_size, scale=3.0):
    return scale * torch.randn(1, rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))


@pytest.fixture
def both(kernels, monkeypatch):
    """What a function gives with the kernels, and in torch's operations."""

    def run(function, *arguments):
        found = []
        for own in (kernels, None):
            for module in (noise, verify):
                monkeypatch.setattr(module, "kernels", lambda own=own: own)
            found.append(function(*arguments))
        return found

    return run


@pytest.mark.parametrize("stream", [Stream.TARGET, Stream.RESIDUAL])
@pytest.mark.parametrize("vocab_size", [64, 32_064])
def test_noise(both, threads, stream, vocab_size):
    own, expected = both(exponential, make_keys(20), vocab_size, stream)
    assert torch.equal(own, expected)


def test_noise_where_it_is_to_be_written(both):
    def inside(keys):
        out = torch.zeros(1, 3, 128)
        exponential(keys, 64, Stream.TARGET, out=out[..., :64])  # not in one piece
        return out

    own, expected = both(inside, make_keys(3))
    assert torch.equal(own, expected)
    assert (own[..., :64] > 0).all()
    assert (own[..., 64:] == 0).all()


@pytest.mark.parametrize("vocab_size", [64, 1056, 32_000])
@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_choice_and_lead(both, threads, vocab_size, scale):
    logits, keys = make_logits(20, vocab_size, scale), make_keys(20)
    (own, leads), (expected, expected_leads) = both(lead_coupled, logits, keys)
    assert torch.equal(own, expected)
    assert torch.equal(leads, expected_leads)
    own, expected_again = both(draft_coupled, logits, keys)
    assert torch.equal(own, expected_again)
    assert torch.equal(own, expected)


def test_rows_do_not_depend_on_each_other(both, threads):
    logits, keys = make_logits(33, 4096), make_keys(33)
    together, _ = both(lead_coupled, logits, keys)
    for rows in (slice(1), slice(1, 3), slice(16, 33)):
        alone, _ = both(lead_coupled, logits[:, rows], keys[:, rows])
        assert torch.equal(alone[0], together[0][:, rows])
        assert torch.equal(alone[1], together[1][:, rows])


def test_ties_go_to_the_first(kernels):
    p, even = torch.zeros(3, 128), torch.ones(3, 64)
    p[0], p[1, 5], p[1, 21], p[2, 126], p[2, 127] = 1.0, 0.5, 0.5, 0.25, 0.25
    tokens, leads = kernels.race(p, even)
    assert tokens.tolist() == [0, 5, 126]  # 5 and 21 are of one group, 126 and 127 of two
    assert leads.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [1, 16, 128])
def test_what_is_not_a_number_stays_in_its_row(both, value, count):
    logits, keys = make_logits(5, 128), make_keys(5)
    clean, _ = both(draft_coupled, logits, keys)
    logits[0, 2, 128 - count :] = value
    (own, leads), (expected, expected_leads) = both(lead_coupled, logits, keys)
    assert torch.equal(own, expected)
    torch.testing.assert_close(leads, expected_leads, rtol=0, atol=0, equal_nan=True)
    others = [0, 1, 3, 4]
    assert torch.equal(own[:, others], clean[:, others])
    assert own[0, 2] in range(128)
