"""Captured features are those of a re-forward of the finished sequences, whatever happened while they were decoded."""

import numpy as np
import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.adaptive.buffer import EpisodeBuffer
from rollout_spec.adaptive.capture import FeatureCapture, VllmCapture
from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm.hidden_states import HiddenStates
from rollout_spec.policy.baselines import RandomLengths

from .serving_toys import make_engine, make_model, make_spec, make_weights, prompts, reference_features

PARAMS = SamplingParams(n=3, max_tokens=30, ignore_eos=True)
LAYERS = [(), (0, 2, 3)]
SHAPES = {
    "plenty": {},
    "preempted": {"max_num_seqs": 6, "kv_cache_tokens": 160, "prefill_chunk": 5, "max_model_len": 96},
    "small steps": {"prefill_chunk": 3, "max_num_seqs": 4},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.inference_mode()
def reforward(model, version, layers, tokens, **options):
    """Features [T, F] of a fresh engine's plain pass over all tokens at once."""
    engine = make_engine(model, version, speculation={"adaptive": False}, **options)
    backend, store = engine.backend, engine.keep_features(layers)
    blocks = backend.pool.allocate(-(-len(tokens) // 16))
    backend.runner.score(backend.weights.target, np.asarray(tokens), blocks)
    places = [blocks[at // 16] * 16 + at % 16 for at in range(len(tokens))]
    return store.at(torch.tensor(places))


def publish(engine, layers):
    """A random drafter that reads the same features: some of its drafts fall."""
    spec = make_spec(engine, "eagle3", feature_layers=layers) if layers else make_spec(engine)
    engine.publish_drafter(make_weights(spec).items(), spec=spec)


def captured(engine, layers=(), budget=1 << 24):
    buffer = EpisodeBuffer(budget)
    return FeatureCapture(engine, buffer.add, layers), buffer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", LAYERS, ids=["final", "three layers"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drafter", ["trained", "none"])
def test_bitwise_those_of_a_reforward(model, shape, layers, dtype, drafter):
    """With drafts accepted and rejected, ragged; shared prompts, chunked prefill, preemption."""
    engine = make_engine(model, dtype=dtype, **SHAPES[shape])
    if drafter == "trained":
        publish(engine, layers)
    assert engine.stats().exactness == "E2"
    capture, buffer = captured(engine, layers)
    engine.backend.policy = RandomLengths(seed=1, longest=4, off=0.3)
    completions = engine.generate(prompts(), PARAMS, request_ids=list("abcdef"))
    stats = engine.stats()
    assert (stats.preemptions > 0) == (shape == "preempted")
    assert (0 < stats.spec.accepted < stats.spec.drafted) == (drafter != "none")
    assert capture.captured == len(completions) and not capture.incomplete
    episodes = {episode.request_id: episode for episode in buffer.episodes()}
    for completion in completions[:: 1 if dtype == "float32" else 4]:
        episode = episodes[f"{completion.request_id}/{completion.index}"]
        sequence = completion.prompt_token_ids + completion.token_ids
        assert episode.tokens.tolist() == sequence and episode.version == 0
        assert episode.prompt_tokens == len(completion.prompt_token_ids)
        expected = reforward(model, 0, layers, sequence, dtype=dtype)[:-1]
        assert torch.equal(episode.features, expected)
    if dtype == "float32":
        independent = reference_features(model, sequence, layers)[:-1]
        assert torch.allclose(episode.features, independent, atol=1e-3, rtol=1e-3)


def test_rejected_positions_are_where_a_draft_fell(model):
    engine = make_engine(model)
    publish(engine, ())
    _, buffer = captured(engine)
    completions = engine.generate(prompts(), PARAMS)
    fell = 0
    for completion, episode in zip(
        sorted(completions, key=lambda c: (c.request_id, c.index)),
        sorted(buffer.episodes(), key=lambda e: e.request_id),
        strict=True,
    ):
        rejected = episode.rejected.tolist()
        assert rejected == sorted(set(rejected))
        assert all(episode.prompt_tokens <= at < len(episode.tokens) for at in rejected)
        # a verify pass either accepts all of its drafts or has one that is the first to fall
        assert len(rejected) <= completion.spec.verify_steps
        fell += len(rejected)
    assert fell > 0
    whole = make_engine(model, speculation={"drafter": "dense"})
    _, buffer = captured(whole)
    whole.generate(prompts(), PARAMS)
    assert not any(len(episode.rejected) for episode in buffer.episodes())


def test_after_an_update_in_flight_all_features_are_the_new_policys(model):
    new = make_model(1)
    engine = make_engine(model, speculation={"drafter": "int8"})
    capture, buffer = captured(engine, (0, 3))
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts(), PARAMS, None, None, list("abcdef")))
        for _ in range(8):
            engine.backend.step()
    engine.update_weights(new.named_parameters(), 5)
    samples = [sample for group in groups for sample in group]
    while any(sample.finish_reason is None for sample in samples):
        engine._advance()
    assert capture.captured == len(samples)
    mixed = 0
    for episode in buffer.episodes():
        request, index = episode.request_id.split("/")
        sample = groups["abcdef".index(request)][int(index)]
        mixed += len({version for _, version in sample.version_starts}) == 2
        policy = new if episode.version == 5 else model
        expected = reforward(policy, episode.version, (0, 3), episode.tokens.tolist())[:-1]
        assert torch.equal(episode.features, expected)
    assert mixed > 0


def test_sequences_under_way_when_it_begins_are_counted_and_left_out(model):
    engine = make_engine(model)
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts(), PARAMS, None, None, None))
        for _ in range(8):
            engine.backend.step()
    capture, buffer = captured(engine)
    samples = [sample for group in groups for sample in group]
    while any(sample.finish_reason is None for sample in samples):
        engine._advance()
    assert capture.incomplete > 0 and capture.captured + capture.incomplete == len(samples)
    for episode in buffer.episodes():
        expected = reforward(model, 0, (), episode.tokens.tolist())[:-1]
        assert torch.equal(episode.features, expected)


def test_episodes_can_be_trained_on_and_capture_can_end(model):
    engine = make_engine(model)
    capture, buffer = captured(engine)
    engine.generate(prompts()[2], PARAMS)
    (episode, *_) = buffer.episodes()
    weight = torch.ones(64, requires_grad=True)
    (episode.features * weight).sum().backward()  # an inference tensor could not be saved for this
    capture.stop()
    engine.generate(prompts()[2], PARAMS)
    assert capture.captured == 3
    with pytest.raises(InvalidRequest, match=r"layers=\(2,\).*use the same"):
        engine.keep_features((2,))


# --- vLLM's hook -----------------------------------------------------------------------------------------


def step(rows):
    """What the hook reports of one step: rows (request, position, token, value)."""
    ids = tuple(dict.fromkeys(request for request, *_ in rows))
    counts = torch.tensor([sum(r[0] == request for r in rows) for request in ids])
    _, positions, tokens, values = zip(*rows, strict=True)
    states = torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 4)
    return HiddenStates(ids, counts, torch.tensor(tokens), torch.tensor(positions), states)


def test_vllms_rows_become_episodes():
    version, buffer = [3], EpisodeBuffer(1 << 20)
    capture = VllmCapture(buffer, lambda: version[0])
    capture(step([("a", 0, 10, 0.0), ("a", 1, 11, 1.0), ("b", 0, 20, 5.0)]))
    capture(step([("a", 2, 12, 2.0), ("b", 1, 21, 6.0), ("b", 2, 99, 7.0)]))  # 99: beyond the end, cut
    a = capture.finished("a", [10, 11, 12, 13], prompt_tokens=2)
    assert a.tokens.tolist() == [10, 11, 12, 13] and a.features[:, 0].tolist() == [0, 1, 2]
    assert a.version == 3 and a.prompt_tokens == 2
    b = capture.finished("b", [20, 21, 22], prompt_tokens=1)
    assert b.features[:, 0].tolist() == [5, 6] and b.tokens.tolist() == [20, 21, 22]
    assert [x.request_id for x in buffer.episodes()] == ["a", "b"]
    assert capture.finished("never seen", [1, 2], 1) is None


def test_vllms_rows_of_an_older_policy_are_left_out():
    version, buffer = [3], EpisodeBuffer(1 << 20)
    capture = VllmCapture(buffer, lambda: version[0])
    capture(step([("a", at, 10 + at, float(at)) for at in range(4)]))
    version[0] = 4
    capture(
        step([("a", at, 10 + at, 100.0 + at) for at in range(2, 6)])
    )  # the first two came from a prefix cache
    episode = capture.finished("a", [10, 11, 12, 13, 14, 15, 16], prompt_tokens=3)
    assert episode.version == 4 and episode.tokens.tolist() == [12, 13, 14, 15, 16]
    assert episode.features[:, 0].tolist() == [102, 103, 104, 105] and episode.prompt_tokens == 1


def test_vllms_rows_keep_to_the_budget():
    capture = VllmCapture(EpisodeBuffer(1 << 20), lambda: 0, budget_bytes=16 * 6)
    capture(step([("long", at, at, 0.0) for at in range(5)] + [("short", 0, 0, 0.0)]))
    capture(step([("long", 5, 5, 0.0), ("short", 1, 1, 0.0)]))
    capture(step([("short", 2, 2, 0.0)]))
    assert capture.given_up == 1
    assert capture.finished("short", [0, 1, 2, 3], 1) is None
    assert len(capture.finished("long", list(range(7)), 1).features) == 6
