"""Traces are cheap to record, come back as they went, and say what is wrong with a file that does not."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rollout_spec.observe.trace import TraceError, TraceRecorder, read_trace, write_trace
from rollout_spec.policy.records import Plan, Reason, StepOutcome, StepState, Trace, TraceRequest, TraceStep


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


STATE = StepState(int64(0, 1), int64(10, 20), int64(2, 3), int64(5, 5), ("int4",))
PLAIN = Plan.plain(2, Reason.NOT_WORTH)
BOTH = Plan(int64(3, 4), int64(0, 2), "int4", Reason.PAYS, 1.25, 0.02)
PLAIN_OUTCOME = StepOutcome(int64(0, 0), int64(1, 1), np.zeros(2, bool), 0.0, 0.5)
BOTH_OUTCOME = StepOutcome(int64(1, 4), int64(2, 5), np.zeros(2, bool), 0.25, 0.5)


def recorded(max_steps: int = 10) -> tuple[TraceRecorder, Clock]:
    clock = Clock()
    recorder = TraceRecorder({"model": "toy", "seed": 3}, max_steps, clock)
    clock.now += 1.0
    recorder.step(STATE, PLAIN, PLAIN_OUTCOME)
    recorder.event("weights updated")
    clock.now += 1.0
    recorder.step(STATE, BOTH, BOTH_OUTCOME)
    recorder.request(TraceRequest("a/0", 8, 4, 0.0, recorder.now, 3, 1))
    return recorder, clock


def test_the_recorder_writes_down_what_happened() -> None:
    trace = recorded()[0].trace()
    assert trace.about == {"model": "toy", "seed": 3}
    plain, both = trace.steps
    assert math.isnan(plain.gain) is False and plain.gain == 1.0
    assert plain == TraceStep(0, 0.5, 2, 30, "plain", 0, 0, 2, 0, 0.0, 0.5, "not-worth", 1.0)
    assert both == TraceStep(1, 1.25, 2, 30, "history+int4", 7, 5, 7, 4, 0.25, 0.5, "pays", 1.25)
    assert trace.requests == (TraceRequest("a/0", 8, 4, 0.0, 2.0, 3, 1),)
    assert trace.events == ((1.0, "weights updated"),)
    assert all(type(value) in (int, float, str) for step in trace.steps for value in vars(step).values())


@pytest.mark.parametrize(
    ("drafter", "history", "mode"),
    [
        ("int4", (0, 0), "int4"),
        (None, (2, 2), "history"),
        ("int4", (1, 0), "history+int4"),
        ("int4", (2, 2), "history"),
    ],
)
def test_modes_are_named(drafter: str | None, history: tuple[int, int], mode: str) -> None:
    recorder = TraceRecorder()
    recorder.step(STATE, Plan(int64(2, 2), int64(*history), drafter, Reason.FIXED), BOTH_OUTCOME)
    assert recorder.trace().steps[0].mode == mode


def test_a_full_recorder_says_so_and_stops() -> None:
    recorder, clock = recorded(max_steps=2)
    for _ in range(3):
        clock.now += 1.0
        recorder.step(STATE, BOTH, BOTH_OUTCOME)
        recorder.event("later")
        recorder.request(TraceRequest("late/0", 8, 4, 0.0, recorder.now, 3, 1))
    trace = recorder.trace()
    assert len(trace.steps) == 2 and len(trace.requests) == 1
    assert trace.about["passes_not_recorded"] == 3
    (_, (when, text)) = trace.events
    assert when == 3.0 and text.startswith("the trace is full: passes after 2 are not recorded")


def test_the_recorder_goes_on_after_a_look() -> None:
    recorder, clock = recorded()
    assert len(recorder.trace().steps) == 2
    clock.now += 1.0
    recorder.step(STATE, PLAIN, PLAIN_OUTCOME)
    assert [step.step for step in recorder.trace().steps] == [0, 1, 2]


def test_nothing_recorded_is_an_empty_trace() -> None:
    assert TraceRecorder().trace() == Trace({}, ())


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_trace_survives_the_round_trip(tmp_path: Path, name: str) -> None:
    trace = recorded()[0].trace()
    write_trace(trace, tmp_path / name)
    assert read_trace(tmp_path / name) == trace
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


def test_an_empty_trace_survives_the_round_trip(tmp_path: Path) -> None:
    write_trace(Trace({}, ()), tmp_path / "t.json")
    assert read_trace(tmp_path / "t.json") == Trace({}, ())


@pytest.mark.parametrize("gain", [math.nan, math.inf])
def test_a_gain_that_is_no_number_is_null_and_comes_back_as_nan(tmp_path: Path, gain: float) -> None:
    step = TraceStep(0, 0.1, 1, 5, "plain", 0, 0, 1, 0, 0.0, 1 / 3, "off", gain)
    write_trace(Trace({"x": [math.nan]}, (step,)), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["steps"]["gain"] == [None]
    trace = read_trace(tmp_path / "t.json")
    assert math.isnan(trace.steps[0].gain) and trace.about == {"x": [None]}
    assert trace.steps[0].target_seconds == 1 / 3


def test_a_long_trace_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    recorder, _ = recorded(max_steps=100_000)
    for _ in range(20_000):
        outcome = StepOutcome(
            int64(1, 4), int64(2, 5), np.zeros(2, bool), rng.random() / 100, rng.random() / 100
        )
        recorder.step(STATE, BOTH, outcome)
    write_trace(recorder.trace(), tmp_path / "t.json.gz")
    assert (tmp_path / "t.json.gz").stat().st_size < 20_000 * 20


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    step = TraceStep(0, math.nan, 1, 5, "plain", 0, 0, 1, 0, 0.0, 0.1, "off", 1.0)
    with pytest.raises(TraceError, match=r"steps\.time\[0\]=nan: give a finite number"):
        write_trace(Trace({}, (step,)), tmp_path / "t.json")
    with pytest.raises(TraceError, match=r"about or events: .*use JSON values"):
        write_trace(Trace({"path": tmp_path}, ()), tmp_path / "t.json")
    with pytest.raises(TraceError, match=r"no/t\.json: cannot be written"):
        write_trace(Trace({}, ()), tmp_path / "no" / "t.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("format"), "format: not"),
        (lambda d: d.update(version=2), "version=2: this release reads version 1"),
        (lambda d: d.update(events=3), "events: missing, or no JSON list"),
        (lambda d: d.update(events=[["now", "x"]]), r"events\[0\]: give \[seconds, text\]"),
        (lambda d: d["steps"].pop("batch"), r"steps\.batch: missing"),
        (lambda d: d["steps"].update(speed=[]), r"steps\.speed: unknown; known here: step, time"),
        (lambda d: d["steps"].update(batch=[1]), r"steps\.batch: 1 values where step has 2"),
        (lambda d: d["steps"].update(batch=[1, 0]), r"steps\.batch: a pass without sequences"),
        (lambda d: d["steps"].update(batch=[1, 2.5]), r"steps\.batch\[1\]=2\.5: an integer >= 0"),
        (lambda d: d["steps"].update(batch=[None, 2]), r"steps\.batch\[0\]=None: an integer"),
        (lambda d: d["steps"].update(time=[2, 1]), r"steps\.time\[1\]: earlier"),
        (lambda d: d["steps"].update(time=[True, 1]), r"steps\.time\[0\]=True: a number"),
        (lambda d: d["steps"].update(gain=["x", 1]), r"steps\.gain\[0\]='x'"),
        (
            lambda d: d["steps"].update(mode={"names": ["a"], "index": [0, 7]}),
            r"steps\.mode\.index: 7 is beyond",
        ),
        (lambda d: d["steps"].update(mode=7), r"steps\.mode: not a list"),
        (lambda d: d["requests"].update(request=[4]), r"requests\.request\[0\]=4: text"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(
    tmp_path: Path, edit: Callable[[dict], object], message: str
) -> None:
    path = tmp_path / "t.json"
    write_trace(recorded()[0].trace(), path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(TraceError, match=rf"t\.json: {message}"):
        read_trace(path)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"format": "rollout-spec trace"}')
    for content in (b"", b"\xff\xfe", b"[1]", b'{"format": NaN}', whole[:-9], whole[:10]):
        (tmp_path / "t.json.gz").write_bytes(content)
        with pytest.raises(TraceError, match=r"t\.json\.gz: "):
            read_trace(tmp_path / "t.json.gz")
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.json")
