"""What a caller of `generate` relies on."""

import asyncio
import math
import threading

import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.contracts import FinishReason
from rollout_spec.policy.baselines import Off, RandomLengths

from .conftest import DRAFTER

EOS = 1


def tokens(completions):
    return [completion.token_ids for completion in completions]


def reforward(model, completion):
    """Full-vocabulary logprobs of a completion's tokens from transformers."""
    ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    start = len(completion.prompt_token_ids)
    return logits[start - 1 : -1]


def test_greedy_is_transformers_greedy(model, engine, prompts):
    completions = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(40):
            with torch.no_grad():
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        assert completion.token_ids == ids[0, len(prompt) :].tolist()


def test_completions_come_in_order_of_prompts_and_samples(engine, prompts):
    completions = engine.generate(prompts, SamplingParams(n=3, max_tokens=5))
    assert [completion.prompt_token_ids for completion in completions] == [
        p for p in prompts for _ in range(3)
    ]
    assert [completion.index for completion in completions] == [0, 1, 2] * len(prompts)


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_logprobs_equal_a_plain_reforward(model, make_engine, prompts, verifier):
    engine = make_engine(speculation={"drafter": DRAFTER, "verifier": verifier})
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=30, logprobs=3)
    for completion in engine.generate(prompts, params):
        logits = reforward(model, completion)
        chosen = torch.tensor(completion.token_ids)[:, None]
        full = logits.log_softmax(-1)
        assert torch.allclose(torch.tensor(completion.logprobs), full.gather(1, chosen)[:, 0], atol=1e-5)
        tempered = (logits / 0.8).softmax(-1)
        processed = torch.tensor(completion.processed_logprobs).exp()
        mass = torch.tensor(completion.mask_mass)
        assert torch.allclose(processed * mass, tempered.gather(1, chosen)[:, 0], atol=1e-5)
        assert ((mass >= 0.9 - 1e-5) & (mass <= 1)).all()
        values, ids = full.topk(3)
        for step, best in enumerate(completion.top_logprobs):
            assert list(best) == ids[step].tolist()
            assert list(best.values()) == pytest.approx(values[step].tolist(), abs=1e-5)


def test_siblings_steps_and_engines_differ_and_ids_replay(make_engine, model, prompts):
    """One constant seed for everything must not give one answer for everything (verl#6857)."""
    engine = make_engine()
    params = SamplingParams(n=4, seed=7, max_tokens=24, ignore_eos=True)
    first = tokens(engine.generate(prompts[:1], params))
    again = tokens(engine.generate(prompts[:1], params))
    twins = tokens(engine.generate([prompts[0], prompts[0]], params))
    engine.update_weights(model.named_parameters())
    updated = tokens(engine.generate(prompts[:1], params))
    samples = first + again + twins + updated
    assert len({tuple(sample) for sample in samples}) == len(samples)
    assert tokens(make_engine().generate(prompts[:1], params)) == first
    assert tokens(make_engine(seed=1).generate(prompts[:1], params)) != first
    replay = engine.generate(prompts[:1], params, request_ids=["a"])
    assert tokens(engine.generate(prompts[:1], params, request_ids=["a"])) == tokens(replay)
    assert tokens(engine.generate(prompts[:1], params, request_ids=["b"])) != tokens(replay)


def test_each_prompt_may_have_its_own_parameters(engine, prompts):
    params = [SamplingParams(max_tokens=row + 1, ignore_eos=True) for row in range(len(prompts))]
    completions = engine.generate(prompts, params)
    assert [len(completion.token_ids) for completion in completions] == [1, 2, 3, 4, 5, 6]
    assert {completion.finish_reason for completion in completions} == {FinishReason.LENGTH}


def test_end_tokens_and_minimum_length(engine, prompts):
    biased = SamplingParams(logit_bias={EOS: 100.0}, max_tokens=9, min_tokens=4)
    for completion in engine.generate(prompts, biased):
        assert len(completion.token_ids) == 5 and completion.token_ids[-1] == EOS
        assert completion.finish_reason is FinishReason.STOP and completion.stop_reason is None
    for completion in engine.generate(
        prompts, SamplingParams(logit_bias={EOS: 100.0}, max_tokens=9, ignore_eos=True)
    ):
        assert completion.token_ids == [EOS] * 9 and completion.finish_reason is FinishReason.LENGTH
    for completion in engine.generate(
        prompts, SamplingParams(logit_bias={5: 100.0}, stop_token_ids=[5], max_tokens=9)
    ):
        assert completion.token_ids == [5] and completion.stop_reason == 5


def test_stop_strings_leave_no_token_behind(make_engine, prompts):
    engine = make_engine()
    plain = engine.generate(
        prompts, SamplingParams(max_tokens=60, ignore_eos=True), request_ids=list("abcdef")
    )
    for completion, letter in zip(plain, "abcdef", strict=True):
        stop = completion.text[17:20]
        params = SamplingParams(max_tokens=60, ignore_eos=True, stop=[stop])
        (stopped,) = engine.generate([completion.prompt_token_ids], params, request_ids=[letter])
        cut = completion.text.index(stop)
        assert stopped.text == completion.text[:cut]
        assert stopped.token_ids == completion.token_ids[: cut + 3]
        assert len(stopped.logprobs) == len(stopped.token_ids)
        assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)


def test_text_prompts_and_context_end(engine):
    (completion,) = engine.generate("HELLO", SamplingParams(ignore_eos=True))
    assert len(completion.prompt_token_ids) == 5
    assert len(completion.token_ids) == 256 - 5 and completion.finish_reason is FinishReason.LENGTH


def test_one_token_prompt(engine):
    (completion,) = engine.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(completion.token_ids) == 3


def test_counts_and_stats_add_up(engine, prompts):
    completions = engine.generate(prompts, SamplingParams(n=2, max_tokens=40, ignore_eos=True))
    stats = engine.stats()
    assert stats.finished == 12 and stats.generated_tokens == 12 * 40
    assert stats.spec == sum((c.spec for c in completions[1:]), completions[0].spec)
    assert 0 < stats.spec.accepted < stats.spec.drafted
    for completion in completions:
        spec = completion.spec
        assert spec.accepted + spec.verify_steps + spec.plain_steps == 40
    assert 1 < stats.spec.tau < 5 and 0 < stats.spec.acceptance < 1
    assert stats.live == stats.waiting == 0 and stats.kv_tokens_free == stats.kv_tokens
    assert stats.times.draft > 0 and stats.times.target > 0 and stats.times.prefill > 0
    engine.backend.policy = Off()
    (plain,) = engine.generate(prompts[:1], SamplingParams(max_tokens=8, ignore_eos=True))
    assert plain.spec.plain_steps == 8 and math.isnan(plain.spec.tau) and math.isnan(plain.spec.acceptance)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, temperature=0.7, top_k=9, top_p=0.8, min_p=0.02),
        SamplingParams(max_tokens=30, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
        SamplingParams(max_tokens=30, min_tokens=12, logit_bias={4: 2.0, EOS: 3.0}, stop_token_ids=[7]),
        SamplingParams(max_tokens=30, temperature=0, frequency_penalty=0.8),
    ],
    ids=["plain", "cuts", "penalties", "bias", "greedy"],
)
def test_speculation_batching_memory_and_chunks_do_not_change_a_token(make_engine, prompts, params):
    ids = list("abcdef")
    reference = tokens(make_engine(speculation="none").generate(prompts, params, n=4, request_ids=ids))
    engines = {
        "on": make_engine(),
        "another drafter": make_engine(speculation="int8"),
        "K=8": make_engine(speculation={"drafter": "int4", "draft_length": 8}),
        "few slots": make_engine(max_num_seqs=3),
        "short chunks": make_engine(prefill_chunk=5),
        "little memory": make_engine(kv_cache_tokens=128),
    }
    for name, engine in engines.items():
        assert tokens(engine.generate(prompts, params, n=4, request_ids=ids)) == reference, name
        engine.backend.policy = RandomLengths(seed=3)
        assert tokens(engine.generate(prompts, params, n=4, request_ids=ids)) == reference, (
            f"{name}, K at random"
        )
    assert engines["little memory"].stats().preemptions > 0


def test_streams_threads_and_generate_share_the_engine(make_engine, prompts):
    params = SamplingParams(n=2, max_tokens=20, ignore_eos=True)
    ids = list("abcdef")
    reference = tokens(make_engine().generate(prompts, params, request_ids=ids))
    engine = make_engine()
    results = {}

    def work(row):
        results[row] = engine.generate([prompts[row]], params, request_ids=[ids[row]])

    threads = [threading.Thread(target=work, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()

    async def streams():
        calls = (engine.generate_async(prompts[row], params, request_id=ids[row]) for row in range(3, 6))
        return await asyncio.gather(*calls)

    streamed = asyncio.run(streams())
    for thread in threads:
        thread.join()
    found = [c for row in range(3) for c in results[row]] + [c for group in streamed for c in group]
    assert tokens(found) == reference


def test_a_stream_sees_its_answer_one_step_after_the_last(make_engine, prompts, monkeypatch):
    """Streams wait for the same step; each with steps of its own would be told after as many as there are streams."""
    engine = make_engine()
    steps, step = [0], engine.backend.step
    ended = {}

    def counted():
        steps[0] += 1
        finished = step()
        ended.update({sample.request_id: steps[0] for sample in finished})
        return finished

    monkeypatch.setattr(engine.backend, "step", counted)
    told = {}

    async def ask(row):
        name = str(row)
        params = SamplingParams(max_tokens=2 + 3 * row, ignore_eos=True)
        await engine.generate_async(prompts[row % len(prompts)], params, request_id=name)
        told[name] = steps[0]

    async def ask_all():
        await asyncio.gather(*(ask(row) for row in range(12)))

    asyncio.run(ask_all())
    asyncio.run(ask_all())  # another event loop
    assert max(told[name] - ended[name] for name in told) <= 1


def test_abort_returns_what_there_is_and_a_longer_prompt_resumes_it(make_engine, prompts):
    engine = make_engine()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    whole = engine.generate(prompts[:2], params, request_ids=["a", "b"])

    async def interrupted():
        stream = asyncio.create_task(engine.generate_async(prompts[0], params, request_id="a"))
        while not any(s and s.request_id == "a" for s in engine.backend.slots.samples):
            await asyncio.sleep(0)
        with engine._changed:
            for _ in range(3):
                engine.backend.step()
            engine.abort(["a"])
        return await stream

    (partial,) = asyncio.run(interrupted())
    assert partial.finish_reason is FinishReason.ABORT and 0 < len(partial.token_ids) < 60
    rest = SamplingParams(max_tokens=60 - len(partial.token_ids), ignore_eos=True)
    (resumed,) = engine.generate([partial.prompt_token_ids + partial.token_ids], rest, request_ids=["a"])
    assert partial.token_ids + resumed.token_ids == whole[0].token_ids
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens


def test_closing_a_stream_frees_its_requests(engine, prompts):
    async def first_only():
        params = [SamplingParams(n=4, max_tokens=100)]
        stream = engine.stream(prompts[0], params[0])
        completion = await anext(stream)
        await stream.aclose()
        return completion

    assert asyncio.run(first_only()).token_ids
    stats = engine.stats()
    assert stats.live == stats.waiting == 0 and stats.kv_tokens_free == stats.kv_tokens


def test_an_engine_without_weights_says_so(engine, model, prompts):
    engine.sleep(level=2)
    engine.wake_up()
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.generate(prompts)
    engine.update_weights(model.named_parameters())
    assert len(engine.generate(prompts, SamplingParams(max_tokens=4))) == len(prompts)


def test_sleep_wakes_up_to_the_same_answers(make_engine, model, prompts):
    engine = make_engine()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    before = tokens(engine.generate(prompts, params, request_ids=list("abcdef")))
    for level in (1, 2):
        engine.sleep(level)
        assert engine.backend.cache.nbytes == 0
        with pytest.raises(RuntimeError, match="wake_up"):
            engine.generate(prompts)
        if level == 2:
            engine.update_weights(model.named_parameters(), version=5)
            assert engine.backend.cache.nbytes == 0 and engine.stats().canary_acceptance is None
        engine.wake_up()
        if level == 2:
            stats = engine.stats()
            assert stats.version == 5 and stats.canary_acceptance > 0 and stats.drafter == DRAFTER
            assert len(engine.generate(prompts, params)) == len(prompts)
        else:
            assert tokens(engine.generate(prompts, params, request_ids=list("abcdef"))) == before


def test_drafts_behind_an_end_are_not_counted_as_accepted(make_engine, prompts):
    """All of a draft may be accepted though its first token ends the sample."""
    engine, free = make_engine(), SamplingParams(max_tokens=40, ignore_eos=True)
    (whole,) = engine.generate(prompts[:1], free, request_ids=["a"])
    counted = []
    for token in dict.fromkeys(whole.token_ids[:12]):
        params = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(token,))
        (cut,) = engine.generate(prompts[:1], params, request_ids=["a"])
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and cut.token_ids[-1] == token
        passes = cut.spec.verify_steps + cut.spec.plain_steps
        assert cut.spec.accepted <= len(cut.token_ids) <= cut.spec.accepted + passes
        counted.append(cut.spec.accepted == len(cut.token_ids) - passes + 1)
    assert any(counted), "an end within a draft"


def test_logprobs_of_a_long_text_are_computed_piece_by_piece(make_engine, prompts):
    text = (prompts[5] * 6)[:150]
    whole = make_engine(prefill_chunk=512).logprobs(text)
    engine = make_engine(prefill_chunk=16)
    rows, score = [], engine.backend.runner.score
    engine.backend.runner.score = lambda *args: rows.append(score(*args)) or rows[-1]
    assert engine.logprobs(text) == pytest.approx(whole, abs=1e-5)
    assert len(rows) == 10 and max(len(logits) for logits in rows) == 16
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens
