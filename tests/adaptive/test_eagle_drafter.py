"""The drafter that is served: what it computes, what it may touch, how it enters and how it is set aside."""

import logging
import time

import numpy as np
import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.contracts import InvalidRequest, WeightError
from rollout_spec.drafters.eagle import EagleDrafter, EagleModel
from rollout_spec.kernels.decoder_layer import LayersInOneCall
from rollout_spec.kernels.library import kernels
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, RandomLengths
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import Plan, Reason
from rollout_spec.sampling import verify
from rollout_spec.torch_backend import adaptive, following

from .serving_toys import (
    VOCAB,
    make_engine,
    make_model,
    make_spec,
    make_weights,
    prompts,
    reference_features,
    reference_states,
)

PARAMS = SamplingParams(n=3, max_tokens=40, ignore_eos=True)
IDS = list("abcdef")
SPECS = {
    "eagle": {"kind": "eagle"},
    "eagle3": {"kind": "eagle3", "feature_layers": (0, 2, 3)},
    "eagle3, 20 tokens": {"kind": "eagle3", "feature_layers": (1, 3), "draft_vocab_size": 20},
}
CHEAP = PassCost(2e-3, 0.0, 1e-3, 1e-6, 0.0)


@pytest.fixture(scope="module")
def model():
    return make_model()


def engine_with(model, kind="eagle", seed=0, **options):
    engine = make_engine(model, **options)
    spec = make_spec(engine, **SPECS[kind])
    engine.publish_drafter(make_weights(spec, seed).items(), spec=spec)
    return engine, spec


def tokens(completions):
    return [completion.token_ids for completion in completions]


def generate(engine, params=PARAMS):
    return engine.generate(prompts(), params, request_ids=IDS)


class Toggled(RandomLengths):
    """Long stretches of plain decoding between random ragged drafts."""

    def __init__(self, seed):
        super().__init__(seed, longest=5, off=0.0)
        self.switch = np.random.default_rng(seed)
        self.on = True

    def plan(self, state):
        if self.switch.random() < 0.2:
            self.on = not self.on
        return super().plan(state) if self.on else Plan.plain(len(state.slots), Reason.OFF)


class Watched:
    """Records what a drafter computes, with the tokens it computed it for."""

    def __init__(self, engine, monkeypatch):
        self.seen, slots = [], engine.backend.slots
        call = following.Following.__call__

        def watched(self_, model, drafted, states, step):
            found = call(self_, model, drafted, states, step)
            rows = self_._rows[: len(found)]
            if step == 0:
                self.chains = [([], slots.tokens[r, : slots.length[r]].tolist()) for r in rows]
            else:
                for (chain, _), token in zip(self.chains, drafted[:, 0].tolist(), strict=False):
                    chain.append(token)
            for row in range(len(found)):
                chain, known = self.chains[row]
                self.seen.append((known, list(chain[:step]), found[row].clone(), int(self_._context[row])))
            return found

        monkeypatch.setattr(following.Following, "__call__", watched)


SHAPES = {
    "plenty": {},
    "preempted": {"max_num_seqs": 6, "kv_cache_tokens": 160, "prefill_chunk": 5, "max_model_len": 96},
    "small steps": {"prefill_chunk": 3, "max_num_seqs": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_whatever_came_before_it_computes_what_a_dense_forward_over_all_pairs_does(
    model, monkeypatch, kind, shape
):
    """Through toggling, ragged drafts, rejections, shared prompts, chunked prefill and preemption."""
    engine, spec = engine_with(model, kind, **SHAPES[shape])
    watched = Watched(engine, monkeypatch)
    engine.backend.policy = Toggled(3)
    engine.generate(prompts(), SamplingParams(n=3, max_tokens=24, ignore_eos=True))
    assert (engine.stats().preemptions > 0) == (shape == "preempted")
    weights, embed = make_weights(spec), model.model.embed_tokens.weight.detach()
    checked = 0
    for known, chain, state, context in watched.seen[:: max(1, len(watched.seen) // 60)]:
        if len(known) < 2:
            continue
        assert context == 0
        features = reference_features(model, known, spec.feature_layers)[:-1]
        expected = reference_states(spec, weights, embed, known, features, chain)[-1]
        assert torch.allclose(state, expected, atol=2e-3, rtol=1e-3), (len(known), len(chain))
        checked += len(chain) > 0
    assert checked > 10


@pytest.mark.skipif(kernels() is None, reason="this machine has none of the CPU kernels")
@pytest.mark.parametrize("kind", SPECS)
def test_its_layer_in_one_call_changes_no_bit(model, kind, monkeypatch):
    """Without the call it runs kernel by kernel."""
    engine, _ = engine_with(model, kind, speculation={"adaptive_quantizer": "int8"})
    layer, calls, run = engine.backend.adaptive.drafter.model.weights, [], LayersInOneCall.__call__

    def counted(self, *span):
        calls.append(self._layers)
        run(self, *span)

    monkeypatch.setattr(LayersInOneCall, "__call__", counted)
    watched = Watched(engine, monkeypatch)
    engine.backend.policy = Toggled(3)
    generate(engine)
    states = [state for *_, state, _ in watched.seen]
    assert len(states) > 100 and calls.count(layer.for_kernels) > 30
    monkeypatch.setitem(vars(layer), "for_kernels", None)
    calls.clear()
    watched.seen.clear()
    engine.backend.policy = Toggled(3)
    generate(engine)
    assert not calls
    for (*_, state, _), expected in zip(watched.seen, states, strict=True):
        assert torch.equal(state, expected)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("quantizer", ["none", "int8"])
def test_the_features_it_reads_stay_as_they_are(model, kind, quantizer, monkeypatch):
    engine, _ = engine_with(model, kind, speculation={"adaptive_quantizer": quantizer})
    engine.backend.policy, compute, own_ones = Fixed(3), EagleModel.hidden, []

    def watched(self, tokens, positions, features, attend, *, own):
        before = features.clone()
        states = compute(self, tokens, positions, features, attend, own=own)
        assert torch.equal(features, before)
        own_ones.append(own)
        return states

    monkeypatch.setattr(EagleModel, "hidden", watched)
    generate(engine)
    assert {True, False} == set(own_ones)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("speculation", [{}, {"adaptive_quantizer": "int8"}], ids=["plain", "int8"])
def test_coupled_trajectories_do_not_depend_on_it(model, kind, speculation):
    plain = tokens(generate(make_engine(model)))
    for shape in ("plenty", "preempted"):
        engine, _ = engine_with(model, kind, speculation=speculation, **SHAPES[shape])
        for policy in (Fixed(4), Toggled(1)):
            before = engine.stats().spec.accepted
            engine.backend.policy = policy
            assert tokens(generate(engine)) == plain
            assert engine.stats().spec.accepted > before
        assert engine.stats().adaptive == 0 and not engine.stats().reports


def test_published_while_decoding_it_sees_what_comes_after(model, monkeypatch):
    """No features were kept of the first tokens: less context, and the states that follow from that context."""
    engine = make_engine(model)
    plain = tokens(generate(engine))
    spec = make_spec(engine)
    watched = Watched(engine, monkeypatch)
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts(), PARAMS, None, None, IDS))
        for _ in range(12):
            engine.backend.step()
    weights = make_weights(spec)
    engine.publish_drafter(weights.items(), spec=spec)
    samples = [sample for group in groups for sample in group]
    while any(sample.finish_reason is None for sample in samples):
        engine._advance()
    assert [sample.output.tolist() for sample in samples] == plain
    late = [x for x in watched.seen if x[3] > 0 and len(x[0]) - x[3] > 5]
    embed = model.model.embed_tokens.weight.detach()
    for known, chain, state, context in late[:: len(late) // 10]:
        features = reference_features(model, known, ())[context:-1]
        expected = reference_states(spec, weights, embed, known[context:], features, chain)[-1]
        assert torch.allclose(state, expected, atol=2e-3, rtol=1e-3)  # rotary positions are relative


def test_more_unread_pairs_than_it_reads_at_once_are_dropped(model, monkeypatch):
    monkeypatch.setattr(following, "MOST_UNREAD", 8)
    engine, spec = engine_with(model)
    plain = tokens(generate(make_engine(model)))
    watched = Watched(engine, monkeypatch)
    engine.backend.policy = Toggled(5)
    assert tokens(generate(engine)) == plain
    cut = [x for x in watched.seen if x[3] > 0 and not x[1]]
    assert len(cut) > 10
    weights, embed = make_weights(spec), model.model.embed_tokens.weight.detach()
    for known, _, state, context in cut[:: len(cut) // 10]:
        features = reference_features(model, known, ())[context:-1]
        expected = reference_states(spec, weights, embed, known[context:], features)[-1]
        assert torch.allclose(state, expected, atol=2e-3, rtol=1e-3)


def test_a_pass_reads_only_what_the_one_before_has_not(model, monkeypatch):
    engine, _ = engine_with(model, max_num_seqs=1)
    read = []
    rows_of = adaptive.Adaptive.propose

    def counted(self, round, rows, lengths):
        slots = engine.backend.slots
        read.append(
            (slots.samples[rows[0]].index, int(slots.length[rows[0]] - 1 - slots.features[rows[0], 2]))
        )
        return rows_of(self, round, rows, lengths)

    monkeypatch.setattr(adaptive.Adaptive, "propose", counted)
    engine.generate([list(range(2, 42))], PARAMS)
    first = dict(reversed(read))
    assert first == {0: 39, 1: 39, 2: 39}  # the prompt
    assert max(sorted(unread for _, unread in read)[:-3]) <= 5  # what a pass can emit


# --- weights ---------------------------------------------------------------------------------------------


def all_tensors(value, seen):
    """Every tensor reachable from weights, packed ones as dense copies."""
    if isinstance(value, torch.Tensor):
        seen.append(value.to_dense() if value.is_mkldnn else value.clone())
    elif isinstance(value, (tuple, list)):
        for item in value:
            all_tensors(item, seen)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            all_tensors(item, seen)
    return seen


def test_the_target_is_bitwise_unchanged_by_a_thousand_publications(model):
    engine, spec = engine_with(model, "eagle3, 20 tokens", speculation={"shadow": True})
    before = all_tensors(engine.backend.weights.target.weights, [])
    assert len(before) > 10
    sets = [make_weights(spec, seed) for seed in range(4)]
    for version in range(1, 1001):
        engine.publish_drafter(sets[version % 4].items(), version)
        if version % 100 == 0:
            engine.generate(prompts()[1], SamplingParams(max_tokens=8))
    after = all_tensors(engine.backend.weights.target.weights, [])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert engine.backend.adaptive.drafter.version == 1000


def wrong_name(weights):
    return {**weights, "embed_tokens.weight": torch.zeros(VOCAB, 64)}


def wrong_shape(weights):
    return {**weights, "norm.weight": torch.zeros(3)}


def missing(weights):
    return {name: x for name, x in weights.items() if name != "fc.weight"}


def wrong_dtype(weights):
    return {**weights, "norm.weight": torch.zeros(64, dtype=torch.int64)}


def colliding(weights):
    return {**weights, "d2t": torch.zeros(20, dtype=torch.int64).index_fill_(0, torch.tensor([3]), -1)}


def inconsistent(weights):
    return {**weights, "t2d": torch.ones(VOCAB, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (wrong_name, "embed_tokens.weight: not a tensor"),
        (wrong_shape, r"norm.weight: shape \(3,\)"),
        (missing, "1 tensors are missing, among them fc.weight"),
        (wrong_dtype, "norm.weight: dtype"),
        (colliding, "distinct target tokens"),
        (inconsistent, "t2d: does not mark"),
    ],
)
def test_what_does_not_fit_leaves_the_old_one_in_force(model, fault, words):
    engine, spec = engine_with(model, "eagle3, 20 tokens")
    drafter = engine.backend.adaptive.drafter
    with pytest.raises(WeightError, match=words):
        engine.publish_drafter(fault(make_weights(spec, 1)).items())
    with pytest.raises(WeightError, match="version=0: use an integer larger"):
        engine.publish_drafter(make_weights(spec, 1).items(), 0)
    assert engine.backend.adaptive.drafter is drafter
    generate(engine)
    assert engine.stats().spec.accepted > 0 and engine.stats().adaptive == 0


def test_a_drafter_for_another_policy_or_an_engine_without_a_place_for_one_is_refused(model):
    engine = make_engine(model)
    other = make_spec(engine).to_dict() | {"hidden_size": 32}
    spec = type(make_spec(engine)).from_dict(other)
    with pytest.raises(InvalidRequest, match=r"spec.hidden_size=32.*the policy has 64"):
        engine.publish_drafter(make_weights(spec).items(), spec=spec)
    with pytest.raises(InvalidRequest, match="give the EagleSpec"):
        engine.publish_drafter([])
    for options in ({"adaptive": False}, {"draft_length": None, "kv_cache_tokens": 16}):
        tokens = {"kv_cache_tokens": options.pop("kv_cache_tokens")} if "kv_cache_tokens" in options else {}
        plain = make_engine(model, speculation=options, **tokens)
        with pytest.raises(InvalidRequest, match=r"speculation.adaptive="):
            plain.publish_drafter([], spec=make_spec(plain))


def test_weights_are_copied_and_versions_count_up(model):
    engine, spec = engine_with(model)
    expected = tokens(generate(engine))
    weights = make_weights(spec, 1)
    engine.publish_drafter(weights.items())
    for tensor in weights.values():
        tensor.fill_(torch.nan)
    assert tokens(generate(engine)) == expected
    assert engine.stats().adaptive == 1 and not engine.stats().reports
    engine.publish_drafter(make_weights(spec, 2).items(), 7)
    assert engine.stats().adaptive == 7


def test_a_new_version_takes_over_in_flight_and_reads_everything_again(model, monkeypatch):
    engine, spec = engine_with(model)
    plain = tokens(generate(make_engine(model)))
    with engine._changed:
        groups = engine._submit(*engine._reader.read(prompts(), PARAMS, None, None, IDS))
        for _ in range(8):
            engine.backend.step()
    weights = make_weights(spec, 5)
    engine.publish_drafter(weights.items(), 3)
    watched = Watched(engine, monkeypatch)
    samples = [sample for group in groups for sample in group]
    while any(sample.finish_reason is None for sample in samples):
        engine._advance()
    assert [sample.output.tolist() for sample in samples] == plain
    embed = model.model.embed_tokens.weight.detach()
    for known, chain, state, _ in watched.seen[::50]:
        if len(known) > 1:
            features = reference_features(model, known, ())[:-1]
            expected = reference_states(spec, weights, embed, known, features, chain)[-1]
            assert torch.allclose(state, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("speculation", [{}, {"adaptive_quantizer": "int8"}], ids=["plain", "int8"])
def test_it_outlives_a_weight_update_and_reads_the_new_policy(model, speculation, monkeypatch):
    new = make_model(1)
    plain = make_engine(new, version=1)
    expected = tokens(generate(plain))
    engine, spec = engine_with(model, speculation=speculation)
    generate(engine)
    engine.update_weights(new.named_parameters())
    watched = Watched(engine, monkeypatch)
    drafted = engine.stats().spec.drafted
    assert tokens(generate(engine)) == expected
    stats = engine.stats()
    assert stats.version == 1 and stats.adaptive == 0 and not stats.reports and stats.spec.drafted > drafted
    drafter = engine.backend.adaptive.drafter
    if not speculation:
        embed, weights = new.model.embed_tokens.weight.detach(), make_weights(spec)
        for known, chain, state, _ in watched.seen[::80]:
            if len(known) > 1:
                features = reference_features(new, known, ())[:-1]
                wanted = reference_states(spec, weights, embed, known, features, chain)[-1]
                assert torch.allclose(state, wanted, atol=2e-3, rtol=1e-3)
    with torch.inference_mode():
        states = torch.randn(5, 64)
        exact = states @ new.lm_head.weight.t()
        assert (drafter.logits(states)[:, :VOCAB] - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_its_memory_back_and_waking_goes_on(model, level):
    engine, _ = engine_with(model)
    expected = tokens(generate(engine))
    backend = engine.backend
    engine.sleep(level)
    assert not backend.runner.features.nbytes and not backend.adaptive.follower.cache.nbytes
    if level == 2:
        with pytest.raises(RuntimeError, match="update_weights"):
            engine.publish_drafter([])
        engine.update_weights(model.named_parameters())
        plain = make_engine(model, version=1)
        expected = tokens(generate(plain))
    engine.wake_up()
    accepted = engine.stats().spec.accepted
    assert tokens(generate(engine)) == expected
    assert engine.stats().spec.accepted > accepted


def test_a_copy_of_the_policys_head_goes_with_the_policys_weights(model):
    engine, _ = engine_with(model, speculation={"adaptive_quantizer": "int8"})
    drafter = engine.backend.adaptive.drafter
    assert drafter._lent_head is not None
    engine.sleep(2)
    assert drafter._lent_head is None
    engine.update_weights(model.named_parameters())
    engine.wake_up()
    assert drafter._lent_head is not None
    generate(engine)
    assert engine.stats().spec.accepted > 0 and not engine.stats().reports


def test_published_asleep_it_takes_no_memory_before_the_engine_wakes(model):
    engine = make_engine(model)
    spec = make_spec(engine)
    engine.sleep()
    engine.publish_drafter(make_weights(spec).items(), spec=spec)
    assert not engine.backend.runner.features.nbytes
    engine.wake_up()
    generate(engine)
    assert engine.stats().spec.accepted > 0


# --- faults ----------------------------------------------------------------------------------------------


def raising(engine, spec, monkeypatch):
    monkeypatch.setattr(EagleDrafter, "propose", lambda self, round: 1 / 0)


def not_a_number(engine, spec, monkeypatch):
    weights = make_weights(spec)
    weights["fc.weight"].fill_(torch.nan)
    engine.publish_drafter(weights.items())


def useless(engine, spec, monkeypatch):
    """Accepted less than the 0.9 that is asked for, like every random one."""


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize(
    ("fault", "cause"), [(raising, "raised"), (not_a_number, "nan"), (useless, "low-acceptance")]
)
def test_a_broken_one_is_set_aside_once_and_a_good_one_comes_back(
    model, monkeypatch, caplog, fault, cause, verifier
):
    options = {"verifier": verifier, "canary_min_acceptance": 0.9}
    plain = make_engine(model, speculation={"verifier": verifier})
    engine, spec = engine_with(model, speculation=options)
    with caplog.at_level(logging.ERROR, "rollout_spec"), monkeypatch.context() as patch:
        fault(engine, spec, patch)
        outputs = [tokens(generate(engine)) for _ in range(3)]
    if verifier == "coupled":
        assert all(output == tokens(generate(plain)) for output in outputs)
    (report,) = engine.stats().reports
    assert report.cause == cause and "until the next is published" in report.message
    assert len(caplog.records) == 1 and engine.stats().adaptive is None
    drafted = engine.stats().spec.drafted
    generate(engine)
    assert engine.stats().spec.drafted == drafted
    engine.publish_drafter(make_weights(spec).items())
    generate(engine, SamplingParams(max_tokens=8))
    assert engine.stats().spec.drafted > drafted and len(engine.stats().reports) == 1


# --- beside others ---------------------------------------------------------------------------------------


def test_it_drafts_beside_the_self_drafter_as_the_plan_says(model):
    plain = tokens(generate(make_engine(model)))
    engine, _ = engine_with(model, speculation={"drafter": "int8"})
    used = []

    class Alternating(Fixed):
        def plan(self, state):
            assert state.drafters == ("int8", "adaptive")
            self.drafter = state.drafters[len(used) % 2]
            used.append(self.drafter)
            return super().plan(state)

    engine.backend.policy = Alternating(3)
    assert tokens(generate(engine)) == plain
    assert set(used) == {"int8", "adaptive"}


def test_behind_history_it_stands_back(model):
    """A plan that asks it to draft behind history's tokens gets history's alone, for those sequences."""
    from rollout_spec.drafters.history import History

    plain = tokens(generate(make_engine(model)))
    engine, _ = engine_with(model)
    engine.backend.history = History(3000, orders=(1, 2))
    engine.backend.policy = RandomLengths(seed=2, longest=5, off=0.1)
    assert tokens(generate(engine)) == plain
    assert engine.stats().spec.accepted > 0 and not engine.stats().reports


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_new_it_drafts_in_shadow_until_its_acceptance_is_known(model, verifier, monkeypatch):
    monkeypatch.setattr(adaptive, "SHADOW_TOKENS", 120)
    # On a busy machine a decision takes longer than these passes.
    monkeypatch.setattr(
        AutomaticPolicy, "deciding", property(lambda self: 0.0, lambda self, seconds: None), raising=False
    )
    plain = tokens(generate(make_engine(model, speculation={"verifier": verifier})))
    engine = make_engine(model, speculation={"verifier": verifier, "shadow": True})
    spec = make_spec(engine)
    policy = engine.backend.policy = AutomaticPolicy(
        CostModel({"target": CHEAP, "other": CHEAP}), probe_share=0
    )
    engine.publish_drafter(make_weights(spec).items(), spec=spec)
    assert policy.acceptance["adaptive"].tried == 0 and engine.stats().adaptive is None
    first = generate(engine, SamplingParams(n=3, max_tokens=20, ignore_eos=True))
    assert sum(completion.spec.drafted for completion in first) == 0
    tried = policy.acceptance["adaptive"].tried
    assert tried > 0 and engine.backend.adaptive.shadow_left < 120
    for completion, expected in zip(first, plain, strict=True):
        assert completion.token_ids == expected[:20]
    while engine.stats().adaptive is None:
        generate(engine)
    policy.costs.add("adaptive", PassCost(1e-6, 0.0, 1e-7, 1e-9, 0.0))
    last = generate(engine)
    assert sum(completion.spec.drafted for completion in last) > 0
    if verifier == "coupled":
        assert tokens(last) == plain


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_acceptance_in_shadow_is_acceptance(model, verifier, monkeypatch):
    """One token drafted in shadow is accepted as often as one that is verified."""
    monkeypatch.setattr(adaptive, "_SHADOW_EVERY", 1)
    monkeypatch.setattr(adaptive, "SHADOW_TOKENS", 10**9)
    params = SamplingParams(n=16, max_tokens=100, ignore_eos=True)
    rates = []
    for shadow in (True, False):
        engine = make_engine(
            model, max_num_seqs=64, speculation={"verifier": verifier, "shadow": shadow, "draft_length": 1}
        )
        spec = make_spec(engine)
        seen = []
        engine.backend.policy.observe_shadow = lambda name, slots, accepted, seen=seen: seen.extend(accepted)
        engine.publish_drafter(make_weights(spec).items(), spec=spec)
        generate(engine, params)
        spec_counts = engine.stats().spec
        rates.append(np.mean(seen) if shadow else spec_counts.acceptance)
        assert shadow == bool(seen)
    assert rates[0] == pytest.approx(rates[1], abs=0.02)


def test_the_automatic_policy_takes_it_in(model, tmp_path, monkeypatch):
    """With no other drafter: costs are measured at start, its own when it is published, and it is chosen when it pays."""
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    engine = make_engine(model, speculation={"draft_length": None, "history": False}, max_model_len=200)
    policy = engine.backend.policy
    assert isinstance(policy, AutomaticPolicy)
    plain = tokens(generate(engine))
    spec = make_spec(engine)
    engine.publish_drafter(make_weights(spec).items(), spec=spec)
    assert 0 < policy.costs.draft("adaptive", 4, 200) < 1
    assert "adaptive" in policy.arbiter.arms
    policy.costs.add("adaptive", PassCost(1e-7, 0.0, 0.0, 0.0, 0.0))
    assert tokens(generate(engine)) == plain
    assert engine.stats().spec.drafted > 0


# --- a reduced vocabulary --------------------------------------------------------------------------------


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_its_price_has_the_draw_in_it(model, verifier, monkeypatch):
    engine, _ = engine_with(model, speculation={"verifier": verifier})
    name = f"lead_{verifier}"
    draw = getattr(verify, name)
    monkeypatch.setattr(verify, name, lambda *inputs: (time.sleep(0.02), draw(*inputs))[1])
    cost = engine.backend.adaptive.costs().passes["adaptive"]
    assert all(cost.seconds(batch, batch, 100 * batch) > 0.018 for batch in (1, 4, 16))


def test_logits_are_the_heads_on_its_tokens_and_nothing_elsewhere(model):
    engine, spec = engine_with(model, "eagle3, 20 tokens")
    weights = make_weights(spec)
    drafter = engine.backend.adaptive.drafter
    ids = torch.arange(20) + weights["d2t"]
    states = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = drafter.logits(states)
    normed = (
        states
        * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps)
        * weights["norm.weight"]
    )
    expected = normed @ weights["lm_head.weight"].t()
    assert found.shape == (7, engine.backend.spec.padded_vocab_size)
    assert torch.allclose(found[:, ids], expected, atol=1e-4)
    outside = torch.ones(found.shape[1], dtype=torch.bool)
    outside[ids] = False
    assert (found[:, outside] == -torch.inf).all()


def test_rejection_with_a_reduced_vocabulary_keeps_the_targets_distribution(model):
    """The verifier, given q that is zero outside 20 tokens, against p: brute force over many draws."""
    generator = torch.Generator().manual_seed(1)
    p = (torch.randn(VOCAB, generator=generator) * 1.5).log_softmax(-1)
    q = torch.full((VOCAB,), -torch.inf)
    q[10:30] = torch.randn(20, generator=generator) * 1.5
    draws = 40_000
    keys = torch.randint(0, 2**60, (draws, 2), generator=generator)
    q_rows = q.expand(draws, 1, VOCAB)
    drafts = verify.draft_rejection(q_rows, keys[:, :1])
    assert ((drafts >= 10) & (drafts < 30)).all()
    found = verify.verify_rejection(p.expand(draws, 2, VOCAB), drafts, None, q_rows, keys)
    counts = torch.bincount(found.tokens[:, 0], minlength=VOCAB) / draws
    assert (counts - p.exp()).abs().max() < 5 * 0.5 / draws**0.5
    overlap = torch.minimum(p.exp(), q.softmax(-1)).sum()
    assert found.accepted.float().mean() == pytest.approx(overlap.item(), abs=0.015)


def test_the_engine_samples_the_policy_with_a_reduced_vocabulary(model):
    """First two tokens of many samples, rejection verifier: their joint frequencies are the policy's."""
    engine, _ = engine_with(
        model, "eagle3, 20 tokens", speculation={"verifier": "rejection", "draft_length": 2}, max_num_seqs=64
    )
    prompt, count = prompts()[2], 4000
    params = SamplingParams(n=count, max_tokens=3, ignore_eos=True)
    completions = engine.generate([prompt], params)
    assert engine.stats().spec.accepted > 200
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        after = [*prompt, int(first.argmax())]
        second = model(torch.tensor([after])).logits[0, -1].softmax(-1)
    got = torch.tensor([c.token_ids[:2] for c in completions])
    counts = torch.bincount(got[:, 0], minlength=VOCAB) / count
    assert (counts - first).abs().max() < 5 * 0.5 / count**0.5
    given = got[got[:, 0] == first.argmax(), 1]
    counts = torch.bincount(given, minlength=VOCAB) / len(given)
    assert (counts - second).abs().max() < 5 * 0.5 / len(given) ** 0.5
    for completion in completions[:20]:
        row = (
            model(torch.tensor([prompt + completion.token_ids]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )
        expected = row.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_an_engine_is_not_asked_for_features_nobody_wants(model):
    assert make_engine(model).backend.runner.features is None
