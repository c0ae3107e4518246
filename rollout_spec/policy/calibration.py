"""A calibration: measured passes of one model on one machine, the cost model they give, and where it is kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.policy.cost_model import CostModel, HeldOut, fit, held_out_error
from rollout_spec.policy.records import PassTiming


class CalibrationError(RolloutSpecError, ValueError):
    """A calibration file that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what follows.

    Attributes:
        key: What the costs depend on: machine, threads, model shape, dtype, drafters, versions.
        timings: Every measured pass.
        cost_model: Fitted to all of them.
        held_out: Relative error of predicted times on configurations left out of the fit, by kind and `overall`;
            empty where a kind was measured in one configuration only.
        brief: Whether it was made in passing by an engine that found none.
    """

    key: Mapping[str, Any]
    timings: Sequence[PassTiming]
    cost_model: CostModel
    held_out: Mapping[str, HeldOut]
    brief: bool

    @classmethod
    def of(cls, key: Mapping[str, Any], timings: Sequence[PassTiming], *, brief: bool) -> Calibration:
        """Fit the timings; ValueError if there are none."""
        shapes = {(t.kind, t.batch, t.rows, t.kv_tokens) for t in timings}
        kinds = [kind for kind, *_ in shapes]
        enough = all(kinds.count(kind) > 1 for kind in kinds)
        return cls(key, tuple(timings), fit(timings), held_out_error(timings) if enough else {}, brief)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` of them fits the same timings again."""
        return {"key": dict(self.key), "brief": self.brief, "timings": [asdict(t) for t in self.timings]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Raises KeyError, TypeError or ValueError if anything is amiss."""
        timings = [PassTiming(**timing) for timing in data["timings"]]
        return cls.of(data["key"], timings, brief=bool(data["brief"]))


def read(path: Path) -> Calibration:
    """Read a calibration file."""
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{path}: not a calibration ({error}); make one with `rollout-spec calibrate MODEL --out FILE`"
        ) from error


def write(calibration: Calibration, path: Path) -> None:
    """Write a calibration file; nobody ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(calibration.to_dict(), indent=1), encoding="utf-8")
    scratch.replace(path)


def cache_path(key: Mapping[str, Any]) -> Path:
    """Where the calibration of `key` is kept: $ROLLOUT_SPEC_CACHE, else ~/.cache/rollout-spec."""
    cache = Path(os.environ.get("ROLLOUT_SPEC_CACHE") or Path.home() / ".cache" / "rollout-spec")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "calibrations" / f"{digest}.json"


def cached(key: Mapping[str, Any]) -> Calibration | None:
    """The calibration kept for `key`, or None; one that cannot be read counts as none."""
    path = cache_path(key)
    try:
        found = read(path) if path.is_file() else None
    except CalibrationError:
        return None
    return found if found is not None and dict(found.key) == dict(key) else None
