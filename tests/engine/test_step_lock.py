"""Steps and whoever has to do with the engine between them: each has its turn, and nobody sees half a sample."""

import asyncio
import logging
import threading

import pytest

from rollout_spec.contracts import FinishReason, InvalidRequest, SamplingParams
from rollout_spec.step_lock import StepLock

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


def in_a_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()), daemon=True)
    thread.start()
    return thread, found


def after_steps(engine, count, monkeypatch):
    """An event that is set once the engine has run so many steps."""
    reached, step, steps = threading.Event(), engine.backend.step, []

    def counted():
        steps.append(1)
        if len(steps) == count:
            reached.set()
        return step()

    monkeypatch.setattr(engine.backend, "step", counted)
    return reached


def test_what_comes_from_another_thread_does_not_wait_for_the_end_of_a_rollout(
    make_engine, prompts, monkeypatch
):
    engine = make_engine(speculation="none")
    for turn in range(3):
        reached = after_steps(engine, 5, monkeypatch)
        thread, found = in_a_thread(
            lambda turn=turn: engine.generate([prompts[0]], LONG, request_ids=[f"long{turn}"])
        )
        assert reached.wait(30)
        (short,) = engine.generate([prompts[1]], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(short.token_ids) == 3 and thread.is_alive(), "it has joined the batch"
        engine.abort([f"long{turn}"])
        thread.join(30)
        (completion,) = found[0]
        assert completion.finish_reason is FinishReason.ABORT and 0 < len(completion.token_ids) < 200


def test_a_stream_that_waits_for_a_step_does_not_hold_up_its_event_loop(engine, prompts):
    async def main():
        with engine._changed:
            task = asyncio.create_task(engine.generate_async(prompts[0], LONG))
            for _ in range(5):
                await asyncio.sleep(0.01)
            assert not engine._live
        return await task

    (completion,) = asyncio.run(main())
    assert len(completion.token_ids) == 200


def test_a_stream_that_is_given_up_before_it_began_leaves_nothing(engine, prompts):
    async def main():
        with engine._changed:
            tasks = [asyncio.create_task(engine.generate_async(prompts[0], LONG)) for _ in range(2)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        engine._stepper.submit(lambda: None).result()
        assert not engine._live

    asyncio.run(main())
    stats = engine.stats()
    assert stats.live == stats.waiting == 0 and stats.kv_tokens_free == stats.kv_tokens


def test_a_sample_is_done_when_nothing_of_it_changes_any_more(engine, prompts):
    seen = []
    engine.keep_features((1,), lambda sample, slot: seen.append((sample, sample.done, len(sample.output))))
    engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [state for _, *state in seen] == [[False, 0]] * len(prompts)
    assert all(sample.done and len(sample.output) == 5 for sample, *_ in seen)


def test_who_receives_samples_and_raises_costs_nobody_a_sample(make_engine, prompts, caplog):
    engine, params = make_engine(), SamplingParams(max_tokens=5, ignore_eos=True)
    ids = [str(row) for row in range(len(prompts))]
    expected = [c.token_ids for c in make_engine().generate(prompts, params, request_ids=ids)]
    engine.keep_features((1,), lambda sample, slot: 1 / 0)
    with caplog.at_level(logging.ERROR, logger="rollout_spec"):
        found = [c.token_ids for c in engine.generate(prompts, params, request_ids=ids)]
    assert found == expected
    assert caplog.text.count("is lost to it") == len(prompts)
    stats = engine.stats()
    assert stats.live == 0 and stats.kv_tokens_free == stats.kv_tokens


def test_one_receives_samples_at_a_time(engine, prompts):
    first = []
    engine.keep_features((1,), lambda sample, slot: first.append(sample))
    for layers in ((1,), (0,)):
        with pytest.raises(InvalidRequest, match=r"receive=.*stop it first"):
            engine.keep_features(layers, lambda sample, slot: None)
    engine.generate(prompts[:2], SamplingParams(max_tokens=3))
    assert len(first) == 2
    engine.keep_features((1,), None)
    with pytest.raises(InvalidRequest, match="layers"):
        engine.keep_features((0,), lambda sample, slot: None)
    assert engine.backend.on_finished is None


def test_no_step_begins_while_somebody_waits(engine, prompts, monkeypatch):
    steps, step = [], engine.backend.step
    monkeypatch.setattr(engine.backend, "step", lambda: steps.append(1) or step())
    engine._submit(*engine._reader.read([prompts[0]], LONG, None, None, None))
    engine._changed.make_way()
    engine._advance()
    assert not steps
    engine._changed.go_on()
    engine._advance()
    assert steps


def test_steps_make_way_until_told_to_go_on():
    lock = StepLock()
    with lock.step() as free:
        assert free
        with lock:
            pass
    lock.make_way()
    with lock.step() as free:
        assert not free
    with lock:
        pass
    with lock.step() as free:
        assert not free, "another has had his turn, not the first"
    lock.go_on()
    with lock.step() as free:
        assert free
