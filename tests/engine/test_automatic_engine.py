"""The engine with the automatic policy, its calibration, history and traces."""

import logging
import math
import time

import pytest

from rollout_spec import SamplingParams
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.observe.trace import read_trace, write_trace
from rollout_spec.policy import calibration
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.policy.records import HISTORY, Reason
from rollout_spec.torch_backend import calibrate
from rollout_spec.torch_backend import choose_policy as choosing
from rollout_spec.torch_backend.calibrate import BRIEF, calibration_key, measure

from .conftest import DRAFTER

AUTOMATIC = {"drafter": DRAFTER, "draft_length": None, "probe_share": 0.05, "explore_share": 0.05}
CHEAP = CostModel(
    {"target": PassCost(2e-3, 0.0, 1e-3, 1e-6, 0.0), DRAFTER: PassCost(3e-4, 0.0, 1e-4, 1e-6, 0.0)}
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    return tmp_path


def automatic(make_engine, **options):
    """An engine whose automatic policy believes drafting to be cheap, so that it speculates on a tiny model too."""
    engine = make_engine(speculation=AUTOMATIC, **options)
    engine.backend.policy = AutomaticPolicy(CHEAP, probe_share=0.05, explore_share=0.05)
    return engine


def generate(engine, prompts, tokens=40, **options):
    return engine.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True), n=2, **options)


def test_calibrates_once_says_so_and_finds_it_again(make_engine, prompts, cache, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "rollout_spec"):
        engine = make_engine(speculation=AUTOMATIC)
    assert "calibrated briefly" in caplog.text and "rollout-spec calibrate" in caplog.text
    assert engine.stats().calibration == "brief"
    assert isinstance(engine.backend.policy, AutomaticPolicy)
    kinds = {timing.kind for timing in engine.backend.calibration.timings}
    assert kinds == {"target", DRAFTER}
    found = calibration.read(calibration.cache_path(calibration_key(engine.backend)))
    assert found.cost_model == engine.backend.calibration.cost_model

    monkeypatch.setattr(choosing, "measure", lambda *_: pytest.fail("measured again"))
    again = make_engine(speculation=AUTOMATIC)
    assert again.backend.calibration.timings == engine.backend.calibration.timings
    generate(again, prompts)


def test_another_dtype_or_drafter_is_another_calibration(make_engine, cache):
    keys = [
        calibration_key(make_engine(speculation={"drafter": drafter}, dtype=dtype).backend)
        for drafter in (DRAFTER, "int8", "none")
        for dtype in ("float32", "bfloat16")
    ]
    assert len({str(calibration.cache_path(key)) for key in keys}) == len(keys)


def test_other_kernels_are_another_calibration(make_engine, cache, monkeypatch):
    backend = make_engine(dtype="bfloat16").backend
    own = calibration_key(backend)
    if (kernels := calibrate.kernels()) is None:
        assert "kernels" not in own
        return
    monkeypatch.setattr(kernels, "build", f"{kernels.variant}-of other sources")
    assert calibration.cache_path(calibration_key(backend)) != calibration.cache_path(own)


def test_a_damaged_calibration_is_made_anew(make_engine, cache):
    engine = make_engine(speculation=AUTOMATIC)
    path = calibration.cache_path(calibration_key(engine.backend))
    path.write_text(path.read_text()[:100])
    assert make_engine(speculation=AUTOMATIC).stats().calibration == "brief"
    path.write_text("{}")
    with pytest.raises(calibration.CalibrationError, match="rollout-spec calibrate"):
        calibration.read(path)


def test_measuring_leaves_no_trace(make_engine, prompts, cache):
    engine = make_engine(speculation=AUTOMATIC)
    generate(engine, prompts)
    backend, before = engine.backend, engine.stats()
    policy, guard, history = backend.policy, backend.guard, backend.history
    timings = measure(backend, BRIEF)
    after = engine.stats()
    assert {t.batch for t in timings} == {1, 4, 16}
    assert all(t.seconds > 0 and math.isfinite(t.seconds) for t in timings)
    assert (backend.policy, backend.guard, backend.history) == (policy, guard, history)
    assert (after.generated_tokens, after.spec) == (before.generated_tokens, before.spec)
    assert (after.live, after.waiting, after.kv_tokens_free) == (0, 0, after.kv_tokens)


def test_no_room_to_calibrate_is_said(make_engine, prompts, cache, caplog):
    with caplog.at_level(logging.WARNING, "rollout_spec"):
        engine = make_engine(speculation=AUTOMATIC, max_model_len=48)
    assert "decoding plainly: max_model_len=48" in caplog.text
    assert isinstance(engine.backend.policy, Off)
    assert engine.stats().calibration is None
    engine.generate([[3, 4, 5]], SamplingParams(max_tokens=8))


def test_a_fixed_draft_length_needs_no_calibration(make_engine, cache, monkeypatch):
    monkeypatch.setattr(choosing, "measure", lambda *_: pytest.fail("measured"))
    engine = make_engine(speculation={"drafter": DRAFTER, "draft_length": 3})
    assert isinstance(engine.backend.policy, Fixed)
    off = make_engine(speculation={"drafter": "none", "draft_length": None, "history": False})
    assert isinstance(off.backend.policy, Off)


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize("memory", [{}, {"max_num_seqs": 5, "kv_cache_tokens": 400}], ids=["room", "tight"])
def test_automatic_speculation_changes_no_token(make_engine, prompts, cache, verifier, memory):
    engine = automatic(make_engine, **memory)
    plain = make_engine(speculation="none")
    engine.backend.coupled = plain.backend.coupled = verifier == "coupled"
    for version in range(1, 4):
        ids = [f"{version}/{row}" for row in range(len(prompts))]
        found, expected = (generate(e, prompts, request_ids=ids) for e in (engine, plain))
        if verifier == "coupled":
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert engine.stats().spec.accepted > 0
    assert not engine.stats().reports


def test_history_helps_in_the_second_epoch_and_survives_an_update(make_engine, model, prompts, cache):
    engine = automatic(make_engine, max_num_seqs=4)
    engine.backend.policy = Fixed(6, drafter=HISTORY)
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.0)
    first = engine.generate(prompts, params)
    drafted = engine.stats().spec.accepted
    engine.update_weights(model.named_parameters())
    second = engine.generate(prompts, params)
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert sum(c.spec.accepted for c in second) > drafted


def test_a_drafter_that_fails_leaves_the_rest(make_engine, prompts, cache, monkeypatch, caplog):
    engine, plain = automatic(make_engine), make_engine(speculation="none")
    monkeypatch.setattr(engine.backend.weights.drafter, "propose", lambda round: 1 / 0)
    ids = [f"r{row}" for row in range(len(prompts))]
    found, expected = (generate(e, prompts, request_ids=ids) for e in (engine, plain))
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [report.cause for report in engine.stats().reports] == ["raised"]


def test_a_trace_tells_every_pass_and_every_sample(make_engine, model, prompts, cache, tmp_path):
    engine = automatic(make_engine)
    with pytest.raises(RolloutSpecError, match=r"start_trace\(\)"):
        engine.stop_trace()
    before = engine.stats()
    engine.start_trace({"what": "a test"})
    completions = generate(engine, prompts)
    engine.update_weights(model.named_parameters())
    trace = engine.stop_trace()
    after = engine.stats()
    assert sum(step.emitted for step in trace.steps) == sum(len(c.token_ids) for c in completions)
    assert sum(step.drafted for step in trace.steps) == after.spec.drafted - before.spec.drafted
    assert sum(step.accepted for step in trace.steps) == after.spec.accepted - before.spec.accepted
    assert {step.reason for step in trace.steps} <= {reason.value for reason in Reason}
    assert {DRAFTER} & {step.mode for step in trace.steps}
    assert len(trace.requests) == len(completions)
    assert all(request.finished > request.started >= 0 for request in trace.requests)
    assert trace.about["what"] == "a test" and trace.about["cpu"]
    assert [text for _, text in trace.events] == ["policy version 1"]
    path = tmp_path / "trace.json.gz"
    write_trace(trace, path)
    assert len(read_trace(path).steps) == len(trace.steps)


def test_an_aborted_sample_teaches_history_nothing(make_engine, prompts, cache):
    engine = automatic(make_engine)
    generate(engine, prompts[:1])
    held = engine.backend.history.stats().answers
    samples = engine._submit(
        *engine._reader.read(prompts[1:2], SamplingParams(max_tokens=60, ignore_eos=True), None, None, ["x"])
    )
    for _ in range(3):
        engine._advance()
    engine.abort(["x"])
    assert samples[0][0].finish_reason is not None
    assert engine.backend.history.stats().answers == held


def test_modes_of_the_trace_name_history(make_engine, prompts, cache):
    engine = make_engine(speculation=AUTOMATIC)
    engine.backend.policy = Fixed(6, drafter=HISTORY)
    engine.start_trace()
    generate(engine, prompts)
    assert {step.mode for step in engine.stop_trace().steps} == {"plain", HISTORY}


def test_verify_passes_are_measured_without_a_drafter_too(make_engine, prompts, cache):
    engine = make_engine(speculation={"drafter": "none", "draft_length": None})
    timings = engine.backend.calibration.timings
    assert {timing.kind for timing in timings} == {"target"}
    assert {timing.rows // timing.batch for timing in timings} == {1, 2, 6}
    generate(engine, prompts)


def test_a_sample_that_began_before_the_trace_counts_from_its_start(make_engine, prompts):
    """Also if another trace was being recorded when it began, or it has had its slot twice."""
    engine = make_engine(kv_cache_tokens=512)
    engine.start_trace()
    time.sleep(0.3)  # that trace's clock is ahead by this
    with engine._changed:
        engine._submit(
            *engine._reader.read(
                prompts[:2], SamplingParams(max_tokens=40, ignore_eos=True), None, None, None
            )
        )
        engine.backend.step()
        engine.backend.scheduler.preempt_all()
        began = time.perf_counter()
        engine.start_trace()
        while engine.backend.has_work:
            for sample in engine.backend.step():
                engine._forget(sample)
    trace, took = engine.stop_trace(), time.perf_counter() - began
    assert [request.started for request in trace.requests] == [0.0, 0.0]
    assert all(0 < request.finished < took for request in trace.requests)
