"""What was found so far: figures, checks, and how far each part came; written to disk after every one of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from rollout_spec.observe.report import Check, EvidenceLevel, Machine, Report, git_commit, installed_versions

_DIGITS = 6
_Item = TypeVar("_Item")


def figure_name(part: str, size: str, **where: object) -> str:
    """`part/size/B=8/S=512`: the key of a figure, and of the prediction it is compared with."""
    return "/".join([part, size, *(f"{name}={value}" for name, value in where.items())])


@dataclass(frozen=True)
class Measured:
    """The median of several runs, or of several ratios of neighbouring runs.

    Attributes:
        value: Median.
        low, high: Smallest and largest.
        runs: How many there were.
    """

    value: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        return cls(statistics.median(values), min(values), max(values), len(values))


class ReportFile:
    """A report that is written again and again, whole every time.

    Args:
        path: The JSON file.
        command: As in `Report`.
        level: Evidence level of its figures.
        seed: Seed of everything random.
    """

    def __init__(self, path: Path, command: str, level: EvidenceLevel | None, seed: int) -> None:
        self.path, self._command, self._level, self._seed = path, command, level, seed
        self._fixed: dict[str, Any] = {
            "machine": Machine.here(),
            "versions": installed_versions(),
            "commit": git_commit(),
        }

    def write(self, results: Mapping[str, Any], checks: Sequence[Check] = ()) -> None:
        report = Report(self._command, clean(results), checks, self._level, self._seed, **self._fixed)
        self._fixed |= {"command_line": report.command_line, "created": report.created}
        scratch = self.path.with_suffix(".partial")
        report.write(scratch)
        scratch.replace(self.path)


def clean(value: Any) -> Any:
    """JSON values: floats to six digits, what is not finite to None, tuples to lists."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


class Record:
    """Everything found in this run.

    Attributes:
        figures: By name, see `Part.figure`.
        checks: What had to hold.
        parts: By name: status, seconds and what was left out.
    """

    def __init__(
        self, file: ReportFile, about: Mapping[str, Any], predicted: Mapping[str, float], level: str | None
    ) -> None:
        self._file, self._about, self._predicted, self.level = file, about, predicted, level
        self.figures: dict[str, dict[str, Any]] = {}
        self.checks: list[Check] = []
        self.parts: dict[str, dict[str, Any]] = {}

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """Keep a figure, beside what was predicted for it."""
        predicted = self._predicted.get(name)
        if predicted is not None:
            figure["predicted"] = predicted
            figure["relative_error"] = predicted / figure["value"] - 1 if figure["value"] else None
        self.figures[name] = figure
        self.write()

    def write(self) -> None:
        errors: dict[str, list[float]] = {}
        for name, figure in self.figures.items():
            if figure.get("relative_error") is not None:
                errors.setdefault(name.partition("/")[0], []).append(abs(figure["relative_error"]))
        results = {
            **self._about,
            "parts": self.parts,
            "prediction_error": {
                part: {"median": statistics.median(all_), "largest": max(all_), "figures": len(all_)}
                for part, all_ in errors.items()
            },
            "figures": self.figures,
        }
        self._file.write(results, self.checks)


class Part:
    """One part of the benchmark while it runs: its budget, and where its findings go.

    Args:
        record: Where they go.
        name: The part.
        deadline: `time.monotonic()` from which on nothing new is started.
    """

    def __init__(self, record: Record, name: str, deadline: float) -> None:
        self.name, self._record, self._deadline = name, record, deadline
        self._notes: list[str] = []
        record.parts[name] = {"status": "running", "notes": self._notes}

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return time.monotonic() > self._deadline

    def figure(self, name: str, value: Measured | float, unit: str, **extra: Any) -> None:
        """Record a figure and print it; `extra` are figures and words that belong to it (a `level` of its own, too)."""
        found = value if isinstance(value, Measured) else Measured(value, value, value, 1)
        figure = {"value": found.value, "unit": unit, "level": self._record.level}
        if found.runs > 1:
            figure |= {"low": found.low, "high": found.high, "runs": found.runs}
        figure |= extra
        self._record.add(name, figure)
        predicted = figure.get("predicted")
        beside = "" if predicted is None else f"   predicted {predicted:.4g}"
        print(f"  {name}: {found.value:.4g} {unit} ({found.low:.4g} to {found.high:.4g}){beside}", flush=True)

    def check(self, name: str, value: float | str | bool | None, target: str, passed: bool) -> None:
        """Record something that had to hold."""
        check = Check(f"{self.name}: {name}", clean(value), target, bool(passed))
        self._record.checks.append(check)
        self._record.write()
        print(f"  {'ok' if passed else 'FAILED'}: {name}: {value} (asked for: {target})", flush=True)

    def note(self, text: str) -> None:
        """Record what was left out, and why."""
        self._notes.append(text)
        self._record.write()
        print(f"  note: {text}", flush=True)

    def keep(self, **values: Any) -> None:
        """Record details that are no figures."""
        self._record.parts[self.name] |= values
        self._record.write()

    def each(self, items: Sequence[_Item]) -> Iterator[_Item]:
        """The items, as long as the budget lasts; what is left out is noted."""
        for index, item in enumerate(items):
            if self.spent:
                self.note(f"out of time: {len(items) - index} of {len(items)} left out, from {item}")
                return
            yield item

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Whatever fails inside is recorded as a failed check, and the part goes on."""
        try:
            yield
        except Exception as error:
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """Record an exception, and let go of the memory it holds."""
        message = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        traceback.print_exception(error)
        error.__traceback__ = None
        gc.collect()
        with suppress(Exception):  # after an illegal access the device answers nothing any more
            torch.cuda.empty_cache()
        self.check(what, message, "no exception", False)

    def end(self, seconds: float, status: str) -> None:
        """The part is over."""
        self._record.parts[self.name] |= {"status": status, "seconds": round(seconds, 1)}
        self._record.write()
