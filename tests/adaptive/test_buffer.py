"""Properties of the episode buffer: its bounds, its versions, and whom it draws."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_spec.adaptive.buffer import EpisodeBuffer
from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import InvalidRequest


def episode(length, version=0, name="x"):
    return Episode(name, torch.arange(length), torch.zeros(length - 1, 2), prompt_tokens=1, version=version)


arrivals = st.lists(st.tuples(st.integers(2, 60), st.integers(0, 6)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(50, 4000))
def test_bounds_and_versions_hold_after_every_arrival(arrived, budget):
    buffer, newest, second = EpisodeBuffer(budget), -1, -1
    taken = refused = 0
    for count, (length, version) in enumerate(arrived):
        mine = episode(length, version, str(count))
        if buffer.add(mine):
            taken += 1
            assert mine in buffer.episodes()
        else:
            refused += 1
            assert mine not in buffer.episodes()
        if version > newest:
            newest, second = version, newest
        elif second < version < newest:
            second = version
        stats = buffer.stats()
        assert stats.nbytes == sum(x.nbytes for x in buffer.episodes()) <= budget
        assert set(stats.versions) <= {newest, second} and len(buffer) == stats.episodes
        assert all(x.version >= second for x in buffer.episodes())
        assert stats.added == taken
        assert stats.added - stats.episodes + refused == stats.evicted + stats.outdated + stats.refused


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 80), min_size=1, max_size=40), st.integers(300, 3000))
def test_of_one_version_what_is_thrown_out_is_never_longer_than_what_is_kept(lengths, budget):
    buffer = EpisodeBuffer(budget)
    everyone = [episode(length, 0, str(place)) for place, length in enumerate(lengths)]
    fits = [x for x in everyone if x.nbytes <= budget]
    for x in everyone:
        buffer.add(x)
    kept = buffer.episodes()
    assert bool(kept) == bool(fits)
    if kept and not buffer.stats().refused:
        gone = [len(x.tokens) for x in everyone if x not in kept]
        assert not gone or max(gone) <= min(len(x.tokens) for x in kept)


def test_the_older_policys_episodes_make_room_first():
    long, short = episode(50, 1, "old"), episode(10, 2, "new")
    buffer = EpisodeBuffer(long.nbytes + short.nbytes)
    assert buffer.add(long) and buffer.add(short) and buffer.add(episode(11, 2, "newer"))
    assert [x.request_id for x in buffer.episodes()] == ["new", "newer"]
    assert buffer.stats().evicted == 1
    assert not buffer.add(episode(2000, 2)) and buffer.stats().refused == 1  # larger than the budget
    assert len(buffer) == 2


def test_two_policies_are_kept_and_late_comers_of_older_ones_are_not():
    buffer = EpisodeBuffer(1 << 20)
    assert buffer.add(episode(5, 1)) and buffer.add(episode(5, 4)) and buffer.add(episode(5, 3))
    assert buffer.stats().versions == (3, 4)  # 3 lies between: it is the one before 4
    assert not buffer.add(episode(5, 1))
    buffer.advance(6)
    assert buffer.stats().versions == (4,) and buffer.stats().outdated == 3
    assert not buffer.add(episode(5, 3)) and buffer.add(episode(5, 6))


def test_the_tail_comes_most_often_and_every_length_comes():
    buffer = EpisodeBuffer(1 << 24, strata=4, tail=2.0, seed=1)
    for place in range(64):
        buffer.add(episode(2 + place, 0, str(place)))
    drawn = Counter(int(x.request_id) // 16 for x in buffer.sample(15_000))
    assert [round(drawn[stratum] / 1000) for stratum in range(4)] == [1, 2, 4, 8]
    within = Counter(x.request_id for x in buffer.sample(16_000))
    assert len(within) == 64
    even = EpisodeBuffer(1 << 24, strata=4, tail=1.0)
    for place in range(64):
        even.add(episode(2 + place, 0, str(place)))
    drawn = Counter(int(x.request_id) // 16 for x in even.sample(16_000))
    assert all(3700 < count < 4300 for count in drawn.values())


@settings(max_examples=40, deadline=None)
@given(arrivals.filter(bool), st.integers(0, 2**32))
def test_the_same_seed_and_arrivals_give_the_same_samples(arrived, seed):
    def names(buffer):
        return [x.request_id for x in buffer.sample(7)] + [x.request_id for x in buffer.sample(5)]

    buffers = [EpisodeBuffer(3000, seed=seed) for _ in range(2)]
    for buffer in buffers:
        for place, (length, version) in enumerate(arrived):
            buffer.add(episode(length, version, str(place)))
    assert names(buffers[0]) == names(buffers[1])


def test_batches_hold_about_as_many_tokens_as_asked_for():
    buffer = EpisodeBuffer(1 << 20)
    assert buffer.sample(3) == [] and list(buffer.batches(10)) == []
    for length in (10, 20, 30):
        buffer.add(episode(length))
    for _, batch in zip(range(5), buffer.batches(100), strict=False):
        total = sum(len(x.tokens) for x in batch)
        assert 100 <= total < 130


def test_filled_and_sampled_at_once():
    buffer, errors = EpisodeBuffer(20_000), []

    def fill():
        for place in range(400):
            buffer.add(episode(2 + place % 50, place // 100, str(place)))

    def draw():
        try:
            for _ in range(200):
                for x in buffer.sample(4):
                    assert len(x.tokens) >= 2
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=target) for target in (fill, draw, draw)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and buffer.stats().nbytes <= 20_000


@pytest.mark.parametrize(("options", "words"), [
    ({"budget_bytes": 0}, "budget_bytes=0"), ({"budget_bytes": 1, "strata": 0}, "strata=0"),
    ({"budget_bytes": 1, "tail": 0.5}, "tail=0.5"),
])  # fmt: skip
def test_wrong_options_are_named(options, words):
    with pytest.raises(InvalidRequest, match=words):
        EpisodeBuffer(**options)
