"""Exact speculative-decoding rollouts for RL: faster samples from the current policy, and only from it.

Importing the package is cheap: what needs torch is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout_spec.config import EngineConfig, SpeculationConfig
    from rollout_spec.contracts import Completion, SamplingParams
    from rollout_spec.engine import RolloutEngine

__version__ = "0.1.0"
__all__ = ["Completion", "EngineConfig", "RolloutEngine", "SamplingParams", "SpeculationConfig"]

_HOME = {
    "Completion": "rollout_spec.contracts",
    "EngineConfig": "rollout_spec.config",
    "RolloutEngine": "rollout_spec.engine",
    "SamplingParams": "rollout_spec.contracts",
    "SpeculationConfig": "rollout_spec.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
