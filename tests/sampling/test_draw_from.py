"""Tokens are drawn as often as they weigh, by one uniform number each."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from rollout_spec.sampling.verify import draw_from

SAMPLES = 40_000


def test_tokens_are_drawn_as_often_as_they_weigh() -> None:
    weights = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.45, 0.2, 0.0])
    u = torch.rand(SAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw_from(weights.expand(SAMPLES, -1), u), minlength=7)
    assert counts[weights == 0].sum() == 0
    some = weights > 0
    assert chisquare(counts[some], weights[some].double() / weights.double().sum() * SAMPLES).pvalue > 1e-3
    assert chisquare(counts[some], torch.full((4,), SAMPLES / 4)).pvalue < 1e-9  # it would see


@pytest.mark.parametrize("last", [0, 4])
def test_the_ends_of_a_row_can_be_drawn_and_nothing_behind_them(last: int) -> None:
    weights = torch.zeros(1000, 5)
    weights[:, last] = 0.3  # sums need not be one
    assert (draw_from(weights, torch.rand(1000, dtype=torch.float64)) == last).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_numbers_stay_within_what_weighs(number: float) -> None:
    weights = torch.tensor(
        [[0.0, 0.25, 0.5, 0.25, 0.0], [0.0, 0.1, 0.1, 0.1, 0.0], [0.0, 0.7, 0.7, 0.7, 0.0]]
    )
    u = torch.full((3,), number, dtype=torch.float64)
    assert draw_from(weights, u).tolist() == [1 if number == 0 else 3] * 3


def test_a_number_that_rounds_to_the_whole_row_draws_the_heaviest() -> None:
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    assert draw_from(weights, torch.ones(1, dtype=torch.float64)).tolist() == [2]


def test_many_rows_are_drawn_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(50, 32_000, generator=generator)
    u = torch.rand(50, dtype=torch.float64, generator=generator)
    alone = [draw_from(weights[i : i + 1], u[i : i + 1]).item() for i in range(50)]
    assert draw_from(weights, u).tolist() == alone
    assert draw_from(weights[:0], u[:0]).shape == (0,)
