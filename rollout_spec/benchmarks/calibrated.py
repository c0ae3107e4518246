"""Costs for a benchmark, measured in the run itself."""

from __future__ import annotations

from rich.console import Console

from rollout_spec.engine import RolloutEngine
from rollout_spec.policy.calibration import Calibration
from rollout_spec.torch_backend.calibrate import FULL, calibration_key, measure


def calibrated(engine: RolloutEngine, console: Console) -> Calibration:
    """A full calibration of `engine`, as `rollout-spec calibrate` would make it; nothing is written to the cache."""
    with console.status("calibrating") as status:
        timings = measure(engine.backend, FULL, lambda text: status.update(f"calibrating: {text}"))
    return Calibration.of(calibration_key(engine.backend), timings, brief=False)
