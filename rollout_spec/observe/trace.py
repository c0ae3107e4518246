"""Traces: every pass of a rollout, cheap to record, small to keep, and read back as it was.

A file is one JSON object of columns, gzipped if its name ends in `.gz`:

    {"format": "rollout-spec trace", "version": 1, "about": {...}, "steps": {"batch": [8, 8, 7], ...},
     "requests": {...}, "events": [[12.5, "weights updated"]]}

The columns are the fields of `TraceStep` and `TraceRequest`. Text that repeats is kept once, as
`{"names": ["plain", "int4"], "index": [0, 1, 1]}`. `gain` is null where it is NaN or infinite, and read as NaN.
"""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.policy.records import (
    PLAIN,
    Plan,
    StepOutcome,
    StepState,
    Trace,
    TraceRequest,
    TraceStep,
)

FORMAT, VERSION = "rollout-spec trace", 1
MISSED = "passes_not_recorded"  # in `Trace.about` if the recorder was full
NULLABLE = "gain"  # the only column that may hold NaN: nothing was predicted
GZIP_MAGIC = b"\x1f\x8b"
NANOSECONDS, GAIN_DIGITS = 9, 4  # digits kept by the recorder
_Row = TypeVar("_Row", TraceStep, TraceRequest)


class TraceError(RolloutSpecError, ValueError):
    """A trace that cannot be read or written; the message names the file, the field and what to do."""


class TraceRecorder:
    """Collects a trace while a rollout runs: some microseconds and 104 bytes a pass.

    Args:
        about: Machine, versions, model, seed, command: JSON values.
        max_steps: Passes recorded at most. Then the recorder stops, with an event that says so and with the
            count of what it missed in `about["passes_not_recorded"]`.
        clock: Seconds, never falling; a simulator gives its own.

    Attributes:
        began: On that clock.
    """

    def __init__(
        self,
        about: Mapping[str, object] | None = None,
        max_steps: int = 1_000_000,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_steps < 1:
            raise TraceError(f"max_steps={max_steps}: use an integer >= 1")
        self.max_steps = max_steps
        self._about = dict(about or {})
        self._clock, self.began = clock, clock()
        self._names: dict[str, int] = {}  # modes and reasons
        self._rows = array("d")
        self._count, self._missed, self._last = 0, 0, 0.0
        self._requests: list[TraceRequest] = []
        self._events: list[tuple[float, str]] = []

    @property
    def now(self) -> float:
        """Seconds since the trace began: the clock of `TraceRequest` and of events."""
        return self._clock() - self.began

    def step(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        """Record a pass that has just ended."""
        if self._count == self.max_steps:
            if not self._missed:
                remedy = "raise max_steps to keep them"
                self.event(f"the trace is full: passes after {self._count:,} are not recorded; {remedy}")
            self._missed += 1
            return
        seconds = outcome.seconds
        self._last = max(self.now - seconds, self._last)
        names, add, mode = self._names, np.add.reduce, plan.mode
        drafts = mode != PLAIN
        row = (
            self._count,
            self._last,
            len(state.slots),
            add(state.lengths),
            names.setdefault(mode, len(names)),
            add(plan.draft_lengths) if drafts else 0,
            add(np.minimum(outcome.accepted, outcome.emitted)) if drafts else 0,
            add(outcome.emitted),
            np.maximum.reduce(plan.draft_lengths) if drafts else 0,
            outcome.draft_seconds,
            outcome.target_seconds + outcome.decision_seconds,
            names.setdefault(plan.reason.value, len(names)),
            plan.gain,
        )
        self._rows.extend(row)
        self._count += 1

    def request(self, request: TraceRequest) -> None:
        """Record a finished sample, its times on the clock of `now`."""
        if not self._missed:
            self._requests.append(request)

    def event(self, text: str) -> None:
        """Record that something happened now, such as a weight update."""
        if not self._missed:
            self._events.append((round(self.now, NANOSECONDS), text))

    def trace(self) -> Trace:
        """What was recorded so far."""
        rows = np.array(self._rows).reshape(-1, len(fields(TraceStep)))
        names = list(self._names)
        columns: list[list[Any]] = []
        for field, column in zip(fields(TraceStep), rows.T):
            if field.type == "float":
                digits = GAIN_DIGITS if field.name == "gain" else NANOSECONDS
                columns.append(np.round(column, digits).tolist())
            else:
                integers = column.astype(np.int64).tolist()
                columns.append([names[value] for value in integers] if field.type == "str" else integers)
        missed: dict[str, object] = {MISSED: self._missed} if self._missed else {}
        steps = tuple(map(TraceStep, *columns))
        return Trace({**self._about, **missed}, steps, tuple(self._requests), tuple(self._events))


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace, gzipped if the name ends in `.gz`.

    Raises:
        TraceError: A value is not finite or not JSON, or the file cannot be written.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "about": _finite(trace.about),
        "steps": _columns(path, "steps", TraceStep, trace.steps),
        "requests": _columns(path, "requests", TraceRequest, trace.requests),
        "events": [[float(when), text] for when, text in trace.events],
    }
    try:
        content = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}: about or events: {error}; use JSON values") from error
    try:
        path.write_bytes(gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be written ({error}); name a file in a folder that is writable"
        ) from error


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote.

    Raises:
        TraceError: There is no such file, or something in it is missing or wrong.
    """
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        document = json.loads(content, parse_constant=_refuse_constant)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TraceError(
            f"{path}: not a trace ({error}); give a whole file that write_trace wrote"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TraceError(f"{path}: format: not {FORMAT!r}; give a file that write_trace wrote")
    if document.get("version") != VERSION:
        remedy = f"this release reads version {VERSION}; use the release that wrote it, or record again"
        raise TraceError(f"{path}: version={document.get('version')!r}: {remedy}")
    for name, kind in (("about", dict), ("steps", dict), ("requests", dict), ("events", list)):
        if not isinstance(document.get(name), kind):
            raise TraceError(f"{path}: {name}: missing, or no JSON {'object' if kind is dict else 'list'}")
    steps = _rows(path, "steps", TraceStep, document["steps"])
    for index, (step, following) in enumerate(pairwise(steps), 1):
        if following.time < step.time:
            raise TraceError(f"{path}: steps.time[{index}]: earlier than the pass before; sort the passes")
    if any(step.batch == 0 for step in steps):
        raise TraceError(f"{path}: steps.batch: a pass without sequences; leave it out")
    requests = _rows(path, "requests", TraceRequest, document["requests"])
    events = []
    for index, event in enumerate(document["events"]):
        if not (isinstance(event, list) and len(event) == 2 and _is_number(event[0])):
            raise TraceError(f"{path}: events[{index}]: give [seconds, text]")
        events.append((float(event[0]), str(event[1])))
    return Trace(document["about"], steps, requests, tuple(events))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """`value` with None for every float that JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(path: Path, table: str, cls: type[_Row], rows: Sequence[_Row]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for field in fields(cls):
        values = [getattr(row, field.name) for row in rows]
        if field.type == "str":
            columns[field.name] = _shared(values)
        elif field.type == "int":
            columns[field.name] = [int(value) for value in values]
        else:
            finite = [float(value) if math.isfinite(value) else None for value in values]
            if field.name != NULLABLE and None in finite:
                index = finite.index(None)
                raise TraceError(
                    f"{path}: {table}.{field.name}[{index}]={values[index]}: give a finite number"
                )
            columns[field.name] = finite
    return columns


def _shared(values: list[str]) -> list[str] | dict[str, list[Any]]:
    """Text as it is, or, where it repeats, as names and indices."""
    names = {name: index for index, name in enumerate(dict.fromkeys(values))}
    if 2 * len(names) > len(values):
        return values
    return {"names": list(names), "index": [names[value] for value in values]}


def _rows(path: Path, table: str, cls: type[_Row], columns: Mapping[str, Any]) -> tuple[_Row, ...]:
    known: list[str] = [field.name for field in fields(cls)]
    for name in (*known, *columns):
        if name not in columns or name not in known:
            problem = "missing" if name in known else f"unknown; known here: {', '.join(known)}"
            raise TraceError(f"{path}: {table}.{name}: {problem}")
    lists = [
        _values(f"{path}: {table}.{field.name}", str(field.type), columns[field.name])
        for field in fields(cls)
    ]
    for name, values in zip(known, lists):
        if len(values) != len(lists[0]):
            raise TraceError(
                f"{path}: {table}.{name}: {len(values)} values where {known[0]} has {len(lists[0])}; "
                "the file was cut or edited, record again"
            )
    return tuple(map(cls, *lists))


def _values(where: str, kind: str, column: Any) -> list[Any]:
    """The values of one column, checked; `kind` is the type of the field."""
    if kind == "str" and isinstance(column, Mapping):
        names = _values(f"{where}.names", "str", column.get("names"))
        index = _values(f"{where}.index", "int", column.get("index"))
        if index and max(index) >= len(names):
            raise TraceError(f"{where}.index: {max(index)} is beyond its {len(names)} names; record again")
        return [names[value] for value in index]
    if not isinstance(column, list):
        raise TraceError(f"{where}: not a list; record again")
    nullable = where.endswith(f".{NULLABLE}")
    for row, value in enumerate(column):
        if kind == "str":
            fits = isinstance(value, str)
        elif kind == "int":
            fits = type(value) is int and value >= 0
        else:
            fits = value is None if nullable and not _is_number(value) else _is_number(value)
            fits = fits and (nullable or value >= 0)
        if not fits:
            wanted = {"str": "text", "int": "an integer >= 0", "float": "a number >= 0"}[kind]
            raise TraceError(f"{where}[{row}]={value!r}: {wanted} is needed; mend it or record again")
    if kind == "float":
        return [math.nan if value is None else float(value) for value in column]
    return column
