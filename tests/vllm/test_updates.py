"""New weights for vLLM: target, drafter and version move together, or the engine says so and emits nothing wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_engines import DRAFTER, POLICY, perturbed, policy_prompts

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.contracts import WeightError
from rollout_spec.engine import EngineAsleep
from rollout_spec.integrations.vllm import compat_worker, weights
from rollout_spec.integrations.vllm.weights import HalfUpdated
from rollout_spec.integrations.vllm.worker import WorkerExtension

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PARAMS = SamplingParams(max_tokens=32, seed=3)
GREEDY = SamplingParams(max_tokens=32, temperature=0)
LAST = "model.norm.weight"


ALIVE = []  # an engine that is freed takes the process groups of every other in this process with it


def make_engine(path=POLICY, version=0, **options):
    given = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_bytes": 64 << 20,
        "speculation": {"drafter": DRAFTER, "draft_length": 4, "verifier": "coupled"},
        "vllm": {"enforce_eager": True},
    }
    ALIVE.append(RolloutEngine.from_pretrained(path, backend="vllm", version=version, **(given | options)))
    return ALIVE[-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five policies, each further from the shipped one."""
    root = tmp_path_factory.mktemp("policies")
    return [perturbed(POLICY, root / str(step), 0.04 * step) for step in range(1, 6)]


@pytest.fixture(scope="module")
def prompts():
    return policy_prompts(4)


@pytest.fixture(scope="module")
def engine():
    yield make_engine()
    ALIVE.clear()


@pytest.fixture
def intact(engine, prompts):
    """The engine with the shipped policy, a drafter in order, and recent contexts for the canary."""
    engine.update_weights(tensors(POLICY))
    outputs(engine, prompts)
    assert engine.stats().drafter == DRAFTER
    return engine


def tensors(folder):
    return list(load_file(f"{folder}/model.safetensors").items())


def outputs(engine, prompts):
    """Greedy and sampled tokens, under ids of their own."""
    return [
        completion.token_ids
        for params in (GREEDY, PARAMS)
        for completion in engine.generate(prompts, params, request_ids=[f"r{i}" for i in range(len(prompts))])
    ]


def runner(engine):
    return compat_worker.model_runner(engine.backend.engine)


def quantized(engine):
    """Every quantized tensor of the drafter, by name."""
    found = {}
    for layer, module in runner(engine).get_draft_model().named_modules():
        if hasattr(module, "quantized"):
            found |= {f"{layer}.{name}": tensor for name, tensor in module.quantized.tensors().items()}
    return found


def drafted(engine, prompts):
    """Draft tokens proposed for one run, and its outputs."""
    before = engine.stats().spec.drafted
    made = outputs(engine, prompts)
    return engine.stats().spec.drafted - before, made


def test_five_updates_equal_five_fresh_engines(engine, folders, prompts) -> None:
    previous = outputs(engine, prompts)
    start = engine.stats().version
    for step, folder in enumerate(folders, 1):
        report = engine.update_weights(tensors(folder), version=start + step)
        assert (
            report.version == start + step
            and report.tensors == 46
            and 0 < report.quantize_seconds < report.seconds
        )
        updated = outputs(engine, prompts)
        assert updated != previous
        previous = updated

        fresh = make_engine(folder, version=start + step)
        assert updated == outputs(fresh, prompts)
        ours, theirs = quantized(engine), quantized(fresh)
        assert len(ours) > 16 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

        state = weights.states(engine.backend.engine)[0]
        assert state["version"] == state["drafter_version"] == engine.stats().version == start + step
        assert engine.backend.engine.get_weight_version() == str(start + step)
        assert state["canary_acceptance"] > 0.9 and state["reports"] == []
        assert drafted(engine, prompts)[0] > 0


def test_a_tied_head_would_stay_behind_by_itself(engine, folders, prompts, monkeypatch) -> None:
    """Fails when vLLM's own reload has learnt to pack a tied head again: then `pack_tied_heads` can go."""
    engine.update_weights(tensors(POLICY))
    monkeypatch.setattr(compat_worker, "pack_tied_heads", lambda model: None)
    engine.update_weights(tensors(folders[4]))
    without = outputs(engine, prompts)[:4]
    monkeypatch.undo()
    engine.update_weights(tensors(folders[4]))
    assert outputs(engine, prompts)[:4] != without


def test_small_chunks_give_the_same(engine, folders, prompts, monkeypatch) -> None:
    engine.update_weights(tensors(folders[0]))
    version, whole = engine.stats().version, quantized(engine)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 14)
    engine.update_weights(reversed(tensors(folders[1])))
    assert any(not torch.equal(whole[name], tensor) for name, tensor in quantized(engine).items())
    engine.update_weights(reversed(tensors(folders[0])))
    assert all(torch.equal(whole[name], tensor) for name, tensor in quantized(engine).items())
    assert engine.stats().version == version + 2


def test_requests_in_flight_go_on_under_the_new_policy(intact, folders, prompts) -> None:
    engine = intact
    old = engine.stats().version
    params = dataclasses.replace(PARAMS, ignore_eos=True)
    ids = [f"r{i}" for i in range(len(prompts))]
    before = engine.generate(prompts, params, request_ids=ids)
    groups = engine._submit(*engine._reader.read(prompts, params, None, None, ids))
    for _ in range(4):
        engine._advance()
    engine.update_weights(tensors(folders[4]))
    while any(group[0].finish_reason is None for group in groups):
        engine._advance()
    split = 0
    for (sample,), plain in zip(groups, before, strict=True):
        (_, first), *rest = sample.version_starts
        tokens = sample.output.tolist()
        assert first == old and [version for _, version in rest] == [old + 1]
        cut = rest[0][0]
        assert 0 < cut < 32 and tokens[:cut] == plain.token_ids[:cut]
        left = dataclasses.replace(params, max_tokens=32 - cut)
        prompt = plain.prompt_token_ids + tokens[:cut]
        (resumed,) = engine.generate([prompt], left, request_ids=[sample.request_id])
        assert resumed.token_ids == tokens[cut:]
        split += tokens[cut:] != plain.token_ids[cut:]
    assert split > 0  # the new policy does say something else


def test_a_prefix_cached_under_the_old_policy_is_not_read_again(intact, folders) -> None:
    engine, prompt = intact, [5 + i % 40 for i in range(200)]  # more than one block
    engine.generate(prompt, GREEDY)
    engine.update_weights(tensors(folders[4]))
    (after,) = engine.generate(prompt, GREEDY)
    scored = engine.logprobs(prompt + after.token_ids)[
        len(prompt) - 1 :
    ]  # logprobs of prompts are never cached
    assert max(abs(a - b) for a, b in zip(scored, after.logprobs, strict=True)) < 1e-4


# --- failures ----------------------------------------------------------------------------------------------


def failing(pairs, after):
    yield from pairs[:after]
    raise ConnectionError("the trainer went away")


def test_a_sender_that_fails_before_anything_was_overwritten_changes_nothing(
    intact, folders, prompts
) -> None:
    engine = intact
    version, before = engine.stats().version, outputs(engine, prompts)
    with pytest.raises(ConnectionError):
        engine.update_weights(failing(tensors(folders[0]), 20))
    assert engine.stats().version == version and outputs(engine, prompts) == before


def test_a_half_finished_update_leaves_no_policy_in_force(intact, folders, prompts, monkeypatch) -> None:
    engine = intact
    version, before = engine.stats().version, outputs(engine, prompts)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 14)
    with pytest.raises(HalfUpdated, match="trainer went away; the weights are now a mixture"):
        engine.update_weights(failing(tensors(folders[0]), 20))
    with pytest.raises(EngineAsleep, match="failed half-way"):
        engine.generate(prompts[0], PARAMS)
    assert not weights.states(engine.backend.engine)[0]["whole"]
    engine.update_weights(tensors(POLICY))
    assert engine.stats().version == version + 1
    assert outputs(engine, prompts)[:4] == before[:4]  # greedy: the noise of the others has the version in it
    assert drafted(engine, prompts)[0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"),
            r"incomplete in .*layers.1.self_attn.qkv_proj",
        ),
        (lambda w: w.pop(LAST), "incomplete in .*model.norm"),
        (lambda w: w.update({LAST: torch.ones(3)}), "mixture"),
        (lambda w: w.update({"model.nothing.weight": torch.ones(3)}), "named .nothing"),
    ],
    ids=["missing shard", "missing layer", "wrong shape", "unknown name"],
)
def test_weights_that_do_not_fit_are_found(intact, prompts, change, message) -> None:
    engine, given = intact, dict(tensors(POLICY))
    change(given)
    with pytest.raises(HalfUpdated, match=message):
        engine.update_weights(given.items())
    with pytest.raises(EngineAsleep):
        engine.generate(prompts[0], PARAMS)
    engine.update_weights(tensors(POLICY))
    assert len(engine.generate(prompts[0], PARAMS)) == 1


@pytest.mark.parametrize(
    ("given", "version", "message"),
    [
        (lambda: tensors(POLICY), 0, "version=0: use an integer larger"),
        (lambda: [*tensors(POLICY), tensors(POLICY)[0]], None, "came twice"),
        (list, None, "nothing came"),
        (
            lambda: [*tensors(POLICY), ("lm_head.weight", torch.zeros(128, 256))],
            None,
            "differs from the embedding",
        ),
        (lambda: {"a": 1}, None, "pairs"),
    ],
    ids=["old version", "twice", "nothing", "untied head", "a mapping"],
)
def test_what_is_wrong_before_anything_is_sent_changes_nothing(
    intact, prompts, given, version, message
) -> None:
    engine = intact
    before, now = engine.stats().version, outputs(engine, prompts)
    with pytest.raises(WeightError, match=message):
        engine.update_weights(given(), version=version)
    assert engine.stats().version == before and outputs(engine, prompts) == now


def test_a_redundant_tied_head_is_accepted(intact, prompts) -> None:
    given = dict(tensors(POLICY))
    head = given["model.embed_tokens.weight"].clone()
    intact.update_weights([("lm_head.weight", head), *given.items()])
    assert intact.stats().reports == () and intact.stats().canary_acceptance > 0.9


def test_sleep_level_2_needs_new_weights(intact, prompts) -> None:
    """vLLM's sleep does nothing on a CPU: that the weights are gone is simulated, by overwriting them."""
    engine, before = intact, outputs(intact, prompts)[:4]
    engine.sleep(level=2)
    discard(engine)
    with pytest.raises(WeightError, match=r"call wake_up\(\) first"):
        engine.update_weights(tensors(POLICY))
    engine.wake_up()
    with pytest.raises(EngineAsleep, match="slept at level 2"):
        engine.generate(prompts[0], PARAMS)
    engine.update_weights(tensors(POLICY))
    assert outputs(engine, prompts)[:4] == before and engine.stats().reports == ()


def test_the_canary_waits_for_a_kv_cache_that_sleeps(intact, prompts, monkeypatch) -> None:
    """Trainers wake the weights, update them and wake the cache last. Only a GPU's cache sleeps: simulated here."""
    engine = intact
    worker = engine.backend.engine.model_executor.driver_worker.worker
    passes, compute = [], compat_worker.plain_pass
    monkeypatch.setattr(compat_worker, "plain_pass", lambda *given: passes.append(1) or compute(*given))

    class Worker:  # vLLM's, in so far as it sleeps; the touch is made on it as on vLLM's own
        def sleep(self, level=1):
            pass

        def wake_up(self, tags=None):
            pass

    compat_worker.watch_sleep(SimpleNamespace(Worker=Worker))
    Worker.sleep(worker)
    Worker.wake_up(worker, ["weights"])
    engine.update_weights(tensors(POLICY))
    state = weights.states(engine.backend.engine)[0]
    assert not passes and state["canary_due"] and state["version"] == state["drafter_version"]
    assert state["canary_acceptance"] is None, "that of the weights before says nothing"
    Worker.wake_up(worker, ["kv_cache"])
    state = weights.states(engine.backend.engine)[0]
    assert passes and not state["canary_due"] and state["canary_acceptance"] > 0.9
    passes.clear()
    Worker.wake_up(worker)
    assert not passes, "once is enough"
    engine.update_weights(tensors(POLICY))
    assert passes


def discard(engine):
    for model in (runner(engine).get_model(), runner(engine).get_draft_model()):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    for tensor in quantized(engine).values():
        tensor.zero_()


# --- the drafter is a guest --------------------------------------------------------------------------------


def test_a_drafter_left_behind_is_reported_and_not_used(intact, folders, prompts, monkeypatch) -> None:
    engine = intact
    every = WorkerExtension._rollout_spec_models
    monkeypatch.setattr(WorkerExtension, "_rollout_spec_models", lambda self: list(every(self))[:1])
    engine.update_weights(tensors(folders[2]))
    stats = engine.stats()
    assert stats.drafter is None and stats.reports[-1].cause == "stale"
    assert f"made from policy version {stats.version - 1}, not {stats.version}" in stats.reports[-1].message
    count, stale = drafted(engine, prompts)
    assert count == 0

    monkeypatch.undo()
    fresh = make_engine(folders[2], version=stats.version)
    assert stale == outputs(fresh, prompts)
    engine.update_weights(tensors(folders[2]))
    assert engine.stats().drafter == DRAFTER and drafted(engine, prompts)[0] > 0


def adapted(pairs, rank=8, strength=4.0):
    """The policy with a low-rank adapter merged into its matrices, the product four times as large as the matrix itself."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in pairs:
        if "proj" in name:
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            weight = (weight.float() + strength * weight.float().std() * (up @ down) / rank**0.5).to(
                weight.dtype
            )
        yield name, weight


def test_a_drafter_of_unmerged_weights_trips_the_canary(intact, prompts, monkeypatch) -> None:
    """The trainer sends an adapter merged into the policy, and the drafter gets the base: right version, other weights."""
    engine, base, merged = intact, dict(tensors(POLICY)), list(adapted(tensors(POLICY)))
    model = runner(engine).get_draft_model()
    load = type(model).load_weights
    monkeypatch.setattr(
        type(model),
        "load_weights",
        lambda self, pairs: load(self, ((n, base[n] if self is model else t) for n, t in pairs)),
    )
    engine.update_weights(merged)
    stats = engine.stats()
    assert stats.canary_acceptance < 0.3 and stats.drafter is None
    assert stats.reports[-1].cause == "low-acceptance" and "canary" in stats.reports[-1].message
    count, plain = drafted(engine, prompts)
    assert count == 0

    monkeypatch.undo()
    engine.update_weights(merged)  # merged for both: nothing is wrong with the adapter
    stats = engine.stats()
    assert stats.canary_acceptance > 0.5 and stats.drafter == DRAFTER
    count, speculating = drafted(engine, prompts)
    assert count > 0 and speculating[:4] == plain[:4]


def test_a_drafter_that_raises_costs_nothing_but_speed(intact, prompts, monkeypatch) -> None:
    engine, before = intact, outputs(intact, prompts)

    def broken(*args, **options):
        raise ZeroDivisionError("on purpose")

    drafter = type(runner(engine).drafter)
    monkeypatch.setattr(drafter, "propose", _after(2, drafter.propose, broken))
    count, after = drafted(engine, prompts)
    assert count > 0 and after == before
    assert engine.stats().drafter is None and engine.stats().reports[-1].cause == "raised"


def _after(calls, works, broken):
    left = iter(range(calls))

    def propose(*args, **options):
        return works(*args, **options) if next(left, None) is not None else broken()

    return propose


# --- a process of its own ----------------------------------------------------------------------------------


def test_updates_reach_a_vllm_in_a_process_of_its_own(engine, folders, prompts) -> None:
    engine.update_weights(tensors(folders[3]))
    version, expected = engine.stats().version, outputs(engine, prompts)
    script = Path(__file__).with_name("separate_process.py")
    run = subprocess.run(
        [sys.executable, str(script), folders[3], str(version)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(re.search("^SEEN (.*)$", run.stdout, re.M)[1])
    assert not seen["shares_process"] and seen["tensors"] == 46 and seen["quantize_seconds"] > 0
    assert seen["outputs"] == expected and seen["outputs"] != seen["first"]
    assert seen["lengths"] == [160] * 4
    for (start, old), (cut, new) in seen["starts"]:
        assert (start, old, new) == (0, 0, version) and 0 < cut < 160
    found, drafter, canary, accepted = seen["stats"]
    assert (found, drafter) == (version, DRAFTER) and canary > 0.9 and accepted > 100
    half, asleep = seen["refused"]
    assert half.startswith("HalfUpdated") and "incomplete in model.embed_tokens" in half
    assert asleep.startswith("EngineAsleep")
    engine.update_weights(tensors(POLICY))
    for tokens, logprobs in seen["logprobs"]:
        scored = engine.logprobs(tokens)[-len(logprobs) :]
        assert max(abs(a - b) for a, b in zip(scored, logprobs)) < 1e-4
