"""Grouping and placement, without Ray."""

from __future__ import annotations

import pytest

from rollout_spec.contracts import Completion, FinishReason, SamplingParams
from rollout_spec.integrations.ray.dispatch import UNKNOWN, Group, Lengths, Request, group_siblings, place


def completion(length: int) -> Completion:
    tokens, floats = [0] * length, [0.0] * length
    return Completion("", 0, [], tokens, "", floats, floats, floats, None, FinishReason.STOP, None, [])


def request(row: int, prompt: tuple[int, ...], n: int = 1, max_tokens: int | None = None) -> Request:
    return Request(row, prompt, SamplingParams(n=n, max_tokens=max_tokens), str(row))


def group(row: int, tokens: float, samples: int = 1) -> Group:
    return Group((request(row, (row,)),), samples, tokens, tokens)


def test_siblings_stay_together_however_they_were_asked_for() -> None:
    groups = group_siblings([request(0, (1,)), request(1, (2,), n=4), request(2, (1,), n=2)], Lengths())
    assert [[r.row for r in g.requests] for g in groups] == [[0, 2], [1]]
    assert [g.samples for g in groups] == [3, 4]
    assert [g.tokens for g in groups] == [3 * UNKNOWN, 4 * UNKNOWN]


def test_the_longest_seen_go_first_and_the_unseen_are_taken_for_average() -> None:
    lengths = Lengths()
    lengths.saw((1,), [completion(10), completion(30)])
    lengths.saw((2,), [completion(100), completion(300)])
    groups = group_siblings([request(row, (row,), n=2) for row in range(4)], lengths)
    assert [g.requests[0].row for g in groups] == [2, 0, 3, 1]
    assert [g.longest for g in groups] == [300, 165, 165, 30]
    assert [g.tokens for g in groups] == [400, 220, 220, 40]


def test_only_the_last_lengths_of_a_prompt_count() -> None:
    lengths = Lengths()
    lengths.saw((1,), [completion(500)])
    lengths.saw((1,), [completion(20)])
    assert lengths.expected((1,)) == (20, 20)


def test_what_was_seen_longest_ago_is_forgotten() -> None:
    lengths = Lengths(capacity=2)
    for prompt, length in ((1, 100), (2, 30), (1, 50), (3, 10)):
        lengths.saw((prompt,), [completion(length)])
    assert lengths.expected((1,)) == (50, 50) and lengths.expected((3,)) == (10, 10)
    assert lengths.expected((2,)) == lengths.expected((9,)) == (30, 30), "the average of those known"


def test_the_average_is_that_of_what_is_known_at_any_time() -> None:
    lengths, known = Lengths(capacity=8), dict[int, tuple[int, int]]()
    for turn in range(200):
        prompt, pair = turn * 7 % 13, (1 + turn % 5, 20 + turn % 31)
        lengths.saw((prompt,), [completion(length) for length in pair])
        known.pop(prompt, None)
        known[prompt] = pair
        if len(known) > 8:
            del known[next(iter(known))]
        mean = sum(map(sum, known.values())) / 2 / len(known)
        assert lengths.expected((-1,)) == pytest.approx((mean, sum(map(max, known.values())) / len(known)))


def test_a_limit_bounds_what_is_expected() -> None:
    lengths = Lengths()
    lengths.saw((1,), [completion(100), completion(300)])
    (limited,) = group_siblings(
        [request(0, (1,), n=2, max_tokens=150), request(1, (1,), max_tokens=50)], lengths
    )
    assert limited.longest == 150 and limited.tokens == 2 * 150 + 50


def test_groups_go_to_the_engine_with_the_fewest_outstanding_tokens() -> None:
    placed = place([group(0, 50), group(1, 40), group(2, 30)], {0: [group(9, 60)], 1: []}, capacity=8)
    assert [engine for engine, _ in placed] == [1, 1, 0]


def test_what_exceeds_the_capacity_waits_in_order() -> None:
    queue = [group(0, 50, samples=3), group(1, 40, samples=6), group(2, 30)]
    assert place(queue, {0: [group(9, 60, samples=4)]}, capacity=8) == [(0, queue[0])]


def test_an_idle_engine_takes_a_group_of_any_size() -> None:
    queue = [group(0, 50, samples=30)]
    assert place(queue, {0: [group(9, 10)], 1: []}, capacity=8) == [(1, queue[0])]
