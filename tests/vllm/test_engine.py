"""`RolloutEngine(backend="vllm")`: the torch engine's interface, and its samples, from vLLM."""

from __future__ import annotations

import asyncio
import math

import pytest
from small_engines import DRAFTER, POLICY, policy_prompts

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.contracts import FinishReason, InvalidRequest, VersionSpan
from rollout_spec.engine import EngineAsleep

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32}
COUPLED = {"drafter": DRAFTER, "draft_length": 4, "verifier": "coupled", "canary_min_acceptance": 0.0}


def vllm_engine(**options):
    given = {"speculation": COUPLED, "kv_cache_bytes": 64 << 20, "vllm": {"enforce_eager": True}}
    return RolloutEngine.from_pretrained(POLICY, backend="vllm", **(OPTIONS | given | options))


@pytest.fixture(scope="module")
def engine():
    return vllm_engine()


@pytest.fixture(scope="module")
def reference():
    """The torch backend, decoding plainly with the same noise."""
    speculation = {"drafter": "none", "history": False, "verifier": "coupled"}
    return RolloutEngine.from_pretrained(POLICY, **OPTIONS, speculation=speculation)


@pytest.fixture(scope="module")
def prompts():
    return policy_prompts(6)


@pytest.fixture(scope="module")
def drawn(engine, prompts):
    params = SamplingParams(max_tokens=48, seed=3)
    return engine.generate(prompts, params, n=4, request_ids=[f"r{row}" for row in range(len(prompts))])


def test_completions_are_complete(drawn, prompts) -> None:
    assert [(c.request_id, c.index) for c in drawn] == [(f"r{row}", i) for row in range(6) for i in range(4)]
    for row, completion in enumerate(drawn):
        count = len(completion.token_ids)
        assert completion.prompt_token_ids == prompts[row // 4] and 0 < count <= 48
        assert len(completion.logprobs) == len(completion.processed_logprobs) == count
        assert completion.mask_mass == [1.0] * count
        assert completion.version_spans == [VersionSpan(0, count, 0)]
        ended = completion.token_ids[-1] == 3
        assert completion.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert completion.stop_reason is None and bool(completion.text)
    assert {c.finish_reason for c in drawn} == {FinishReason.STOP, FinishReason.LENGTH} or all(
        c.finish_reason is FinishReason.STOP for c in drawn
    )


def test_drafts_were_accepted_and_every_token_accounted_for(drawn, engine) -> None:
    for completion in drawn:
        spec = completion.spec
        assert 0 <= spec.accepted <= spec.drafted
        # Tokens behind an end token were accepted, and cut.
        assert spec.accepted + spec.verify_steps + spec.plain_steps >= len(completion.token_ids)
    assert sum(c.spec.accepted for c in drawn) > sum(c.spec.verify_steps for c in drawn)
    assert engine.stats().spec.accepted >= sum(c.spec.accepted for c in drawn)


def test_logprobs_are_those_of_the_torch_backends_plain_pass(drawn, reference) -> None:
    worst = 0.0
    for completion in drawn:
        scored = reference.logprobs(completion.prompt_token_ids + completion.token_ids)
        answer = scored[len(completion.prompt_token_ids) - 1 :]
        worst = max(worst, *(abs(a - b) for a, b in zip(answer, completion.logprobs, strict=True)))
    assert worst < 1e-4


def test_samples_are_the_torch_backends(drawn, reference, prompts) -> None:
    """Coupled noise: two engines with nothing in common but the weights draw the same tokens."""
    params = SamplingParams(max_tokens=48, seed=3)
    plain = reference.generate(prompts, params, n=4, request_ids=[f"r{row}" for row in range(len(prompts))])
    assert [c.token_ids for c in plain] == [c.token_ids for c in drawn]


def test_greedy_is_the_torch_backends(engine, reference, prompts) -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    ours, plain = engine.generate(prompts, params), reference.generate(prompts, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
    assert all(c.processed_logprobs == [0.0] * len(c.token_ids) for c in ours)
    assert max(abs(a - b) for x, y in zip(ours, plain) for a, b in zip(x.logprobs, y.logprobs)) < 1e-4


def test_cut_distributions_report_what_is_known(engine, reference, prompts) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, seed=1)
    ids = [f"cut{row}" for row in range(len(prompts))]
    ours = engine.generate(prompts, params, request_ids=ids)
    plain = reference.generate(prompts, params, request_ids=ids)
    assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
    for x, y in zip(ours, plain):
        assert all(map(math.isnan, x.logprobs)) and all(map(math.isnan, x.mask_mass))
        assert max(abs(a - b) for a, b in zip(x.processed_logprobs, y.processed_logprobs)) < 1e-4


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.005}, r"temperature=0.005: .*use that, 0 for greedy"),
        ({"temperature": 0.5, "logprobs": 3}, r"logprobs=3: .*backend='torch'"),
        ({"min_tokens": 2, "logprobs": 3}, "logprobs=3"),
    ],
)
def test_what_vllm_would_change_is_refused(engine, prompts, params, message) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.generate(prompts[:1], SamplingParams(max_tokens=4, **params))
    assert not engine.backend.has_work


def test_top_logprobs(engine, reference, prompts) -> None:
    params = SamplingParams(max_tokens=8, logprobs=3, seed=0)
    (ours,) = engine.generate(prompts[:1], params, request_ids=["top"])
    (plain,) = reference.generate(prompts[:1], params, request_ids=["top"])
    assert ours.token_ids == plain.token_ids
    for a, b in zip(ours.top_logprobs, plain.top_logprobs, strict=True):
        assert list(a) == list(b) and max(abs(a[token] - b[token]) for token in a) < 1e-4


def test_stop_strings_and_tokens(engine, reference, drawn) -> None:
    long = max(drawn, key=lambda c: len(c.text))
    stop = long.text[4:6]
    params = SamplingParams(max_tokens=48, seed=3, stop=(stop,))
    same = {"request_ids": [long.request_id], "n": 4}
    ours = engine.generate([long.prompt_token_ids], params, **same)
    plain = reference.generate([long.prompt_token_ids], params, **same)
    assert [(c.token_ids, c.text, c.stop_reason) for c in ours] == [
        (c.token_ids, c.text, c.stop_reason) for c in plain
    ]
    assert ours[long.index].stop_reason == stop and stop not in ours[long.index].text
    token = long.token_ids[5]
    params = SamplingParams(max_tokens=48, seed=3, stop_token_ids=(token,))
    ours = engine.generate([long.prompt_token_ids], params, **same)[long.index]
    assert ours.stop_reason == token and ours.token_ids == long.token_ids[: long.token_ids.index(token) + 1]


def test_ids_replay_their_samples(engine, prompts) -> None:
    first = engine.generate(prompts[:2], SamplingParams(max_tokens=16), n=2)
    ids = list(dict.fromkeys(c.request_id for c in first))
    again = engine.generate(prompts[:2], SamplingParams(max_tokens=16), n=2, request_ids=ids)
    assert [c.token_ids for c in again] == [c.token_ids for c in first]


def test_streams_share_the_batch_and_an_aborted_one_can_be_resumed(engine, drawn) -> None:
    long = max((c for c in drawn if c.index == 0), key=lambda c: len(c.token_ids))
    params = SamplingParams(max_tokens=48, seed=3)

    async def run():
        others = asyncio.gather(
            *(engine.generate_async(c.prompt_token_ids, params, request_id=c.request_id) for c in drawn[4::4])
        )
        first = [c async for c in engine.stream(drawn[0].prompt_token_ids, params, request_id="r0")]
        return first, await others

    first, others = asyncio.run(run())
    assert [c.token_ids for c in first] == [drawn[0].token_ids]
    assert [group[0].token_ids for group in others] == [c.token_ids for c in drawn[4::4]]

    (group,) = engine._submit(
        *engine._reader.read([long.prompt_token_ids], params, None, None, [long.request_id])
    )
    for _ in range(3):
        engine._advance()
    engine.abort([long.request_id])
    partial = group[0].output.tolist()
    assert group[0].finish_reason is FinishReason.ABORT and 0 < len(partial) < len(long.token_ids)
    rest = SamplingParams(max_tokens=48 - len(partial), seed=3)
    (resumed,) = engine.generate([long.prompt_token_ids + partial], rest, request_ids=[long.request_id])
    assert partial + resumed.token_ids == long.token_ids
    assert not engine.backend.has_work


def test_scores_of_the_engine_are_the_torch_backends(engine, reference, drawn) -> None:
    text = drawn[0].prompt_token_ids + drawn[0].token_ids
    ours, plain = engine.logprobs(text), reference.logprobs(text)
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-4


def test_statistics(engine, drawn) -> None:
    stats = engine.stats()
    assert (stats.version, stats.verifier, stats.exactness, stats.drafter) == (0, "coupled", "E1", DRAFTER)
    assert stats.reports == () and stats.live == stats.waiting == 0
    assert stats.finished >= len(drawn) and stats.generated_tokens >= sum(len(c.token_ids) for c in drawn)
    assert stats.kv_tokens >= 256 and stats.kv_tokens_free <= stats.kv_tokens and stats.times.steps > 0


def test_sleep_pauses_and_keeps_what_is_in_flight(engine, drawn, prompts) -> None:
    params = SamplingParams(max_tokens=48, seed=3)
    (group,) = engine._submit(*engine._reader.read(prompts[:1], params, None, None, ["r0"]))
    engine._advance()
    engine.sleep(level=1)
    with pytest.raises(EngineAsleep):
        engine.generate(prompts[:1], params)
    engine.wake_up()
    while group[0].finish_reason is None:
        engine._advance()
    assert group[0].output.tolist() == drawn[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph_bytes": 1}, "graph_bytes=1: vLLM sizes its graphs"),
        ({"device": "cuda:1"}, "device='cuda:1': .*CUDA_VISIBLE_DEVICES"),
        ({"vllm": {"seed": 1}}, "vllm.seed=1: is set by seed"),
    ],
)
def test_options_that_vllm_cannot_honour_are_refused(options, message) -> None:
    with pytest.raises(InvalidRequest, match=message):
        vllm_engine(**options)


def test_a_drafter_set_aside_is_reported(engine, prompts) -> None:
    """By the scheduler, for low acceptance, and by the drafter itself."""
    from rollout_spec.integrations.vllm.compat_worker import model_runner, scheduler

    served = engine.backend.engine
    before, decisions = engine.stats(), scheduler(served).decisions
    assert before.drafter == DRAFTER and before.reports == ()
    decisions.least_acceptance, kept = 1.0, decisions.least_acceptance
    sampled = SamplingParams(max_tokens=48, temperature=2.0, ignore_eos=True)
    try:
        for _ in range(6):
            engine.generate(prompts, sampled, n=4)
        stats = engine.stats()
        assert stats.drafter is None and [x.cause for x in stats.reports] == ["low-acceptance"]
        assert "canary_min_acceptance=1.0" in stats.reports[0].message
    finally:
        decisions.least_acceptance = kept
        decisions.after_update()
    drafter = model_runner(served).drafter
    drafter._fail("its logits were not finite")
    stats = engine.stats()
    assert stats.drafter is None and [x.cause for x in stats.reports] == ["nan"]
    drafter.revive()
    assert engine.stats().drafter == DRAFTER and engine.stats().reports == ()
