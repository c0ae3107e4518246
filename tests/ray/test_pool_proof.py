"""Twenty engines killed, one per rollout: a proof whose result is committed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pool_kills import CONFIG, check, kill_in_mid_rollout

from rollout_spec.observe.machine import cpu_model, installed_versions

pytest.importorskip("ray", reason="needs requirements/full.txt")
RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu" / "pool.json"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_engines_killed_in_mid_rollout_change_nothing(pool: Any) -> None:
    rounds = kill_in_mid_rollout(pool, rounds=20)
    check(rounds)
    if os.environ.get("ROLLOUT_SPEC_WRITE_RESULTS"):
        figures = {
            "what": "one of two engines killed in each of 20 rollouts; completions compared with one engine's",
            "evidence": "L1",
            "command": "ROLLOUT_SPEC_WRITE_RESULTS=1 pytest -m slow tests/ray",
            "machine": {"cpu": cpu_model()[0], "versions": installed_versions()},
            "config": CONFIG,
            "exactness": pool.report().exactness,
            "killed": sum(round_["replaced"] for round_ in rounds),
            "completions": sum(round_["completions"] for round_ in rounds),
            "same_as_undisturbed": sum(round_["same"] for round_ in rounds),
            "replayed_samples": sum(round_["replayed_samples"] for round_ in rounds),
            "tokens": sum(round_["tokens"] for round_ in rounds),
            "rounds": rounds,
        }
        RESULT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
