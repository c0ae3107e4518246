"""Packed episodes compute what they compute alone; weights, cuts and the order of batches."""

import json
from dataclasses import replace

import pytest
import torch

from rollout_spec.adaptive.losses import Objective
from rollout_spec.adaptive.packing import EpisodeBatches, pack
from rollout_spec.adaptive.trainer import TrainConfig, unrolled_loss
from rollout_spec.contracts import InvalidRequest

from .training_toys import KINDS, make_episodes, make_module, make_target

CONFIG = TrainConfig(unroll=3, autocast=False, replay=2.0)


def loss_and_gradients(module, tensors, batch, config):
    module.zero_grad()
    loss, _ = unrolled_loss(module, tensors, batch, config)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_unpacked(kind):
    module, tensors = make_module(make_target(), kind)
    config = replace(CONFIG, objective=Objective(1.0 if kind == "eagle" else 0.0, 1.0, 0.5), unroll=1)
    episodes = make_episodes(module.spec)
    packed = pack(episodes, 64, replay=config.replay)
    assert len(packed.tokens) < len(episodes)
    loss, gradients = loss_and_gradients(module, tensors, packed, config)
    # One step: the average over all is that of the episodes' averages, by weight.
    total, expected, weight = 0.0, None, 0.0
    for episode in episodes:
        alone = pack([episode], 64, replay=config.replay)
        share = alone.weights.sum()
        mine, found = loss_and_gradients(module, tensors, alone, config)
        total, weight = total + mine * share, weight + share
        found = [share * g for g in found]
        expected = found if expected is None else [a + b for a, b in zip(expected, found)]
    torch.testing.assert_close(loss, total / weight)
    for got, want in zip(gradients, expected):
        torch.testing.assert_close(got, want / weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_states_are_unpacked_ones_in_every_step(kind):
    module, tensors = make_module(make_target(), kind)
    episodes = make_episodes(module.spec)
    packed = pack(episodes, 64)
    unrolled = list(module.unroll(tensors, packed, 4))
    seen = 0
    for episode in episodes:
        alone = pack([episode], 64)
        here = (packed.segments >= 0) & (packed.segments == segment_of(packed, episode))
        for step, states in enumerate(module.unroll(tensors, alone, 4)):
            counted = alone.drafts(step)[0]
            assert torch.equal(packed.drafts(step)[here], counted)
            torch.testing.assert_close(
                unrolled[step][here][counted], states[0][counted], rtol=1e-4, atol=1e-5
            )
            seen += int(counted.sum())
    assert seen > 100


def segment_of(batch, episode):
    at = (
        (batch.next_tokens == episode.tokens[2])
        & (batch.tokens == episode.tokens[1])
        & (batch.positions == 0)
    )
    at &= (batch.features[..., 0] == episode.features[0, 0]) & (batch.segments >= 0)
    (segment,) = batch.segments[at].tolist()
    return segment


def test_pairs_are_the_token_after_with_the_feature_before():
    module, _ = make_module(make_target(), "eagle")
    (episode,) = make_episodes(module.spec, (9,), prompt=4)
    batch = pack([episode], 64, replay=2.0)
    assert torch.equal(batch.tokens[0], episode.tokens[1:8])
    assert torch.equal(batch.next_tokens[0], episode.tokens[2:9])
    assert torch.equal(batch.features[0], episode.features[:7])
    assert torch.equal(batch.next_features[0], episode.features[1:8])
    assert batch.weights[0].tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
        3,
    ]  # tokens 4 .. 8 are the response; 8 was rejected
    assert batch.drafts(0)[0].tolist() == [False, False, True, True, True, True, True]
    assert batch.drafts(2)[0].tolist() == [False, False, False, False, True, True, True]


def test_a_long_episode_is_cut_and_its_parts_keep_their_positions():
    module, tensors = make_module(make_target(), "eagle")
    (episode,) = make_episodes(module.spec, (12,), prompt=2)
    batch = pack([episode], 6)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 0, 0]]
    assert batch.segments.tolist() == [[0] * 6, [1] * 4 + [-1] * 2]
    assert batch.drafts(1)[1].tolist() == [False, True, True, True, False, False]
    loss, _ = unrolled_loss(module, tensors, batch, CONFIG)
    assert torch.isfinite(loss)


def test_what_cannot_be_learnt_from_is_refused():
    module, _ = make_module(make_target(), "eagle")
    (episode,) = make_episodes(module.spec, (9,))
    with pytest.raises(InvalidRequest, match=r"features of e0='7 for 9 tokens'"):
        pack([replace(episode, features=episode.features[:7])], 64)
    with pytest.raises(InvalidRequest, match="three tokens"):
        pack([replace(episode, tokens=episode.tokens[:2])], 64)


def test_batches_come_in_an_order_that_can_be_resumed():
    module, _ = make_module(make_target(), "eagle")
    episodes = make_episodes(module.spec, (3, 4, 5, 6, 7, 8, 9))
    batches = EpisodeBatches(episodes, 12, seed=3)
    names = [[e.request_id for e in next(batches)] for _ in range(3)]
    state = json.loads(json.dumps(batches.state_dict()))
    rest = [[e.request_id for e in next(batches)] for _ in range(9)]
    resumed = EpisodeBatches(episodes, 12)
    resumed.load_state_dict(state)
    assert [[e.request_id for e in next(resumed)] for _ in range(9)] == rest
    assert sorted([name for batch in names for name in batch][:7]) == sorted(
        e.request_id for e in episodes
    )  # an epoch has each once
