"""Trainers, coordinators and workers killed in fifty rollouts: a proof whose result is committed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from spot_chaos import CONFIG, chaos, check, left_after, make_group, summary

from rollout_spec.observe.report import Check, EvidenceLevel, Report

pytest.importorskip("ray", reason="needs requirements/full.txt")
RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu" / "spot-chaos.json"
ROUNDS, SEED = 50, 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fifty_rollouts_with_random_deaths(cluster: None, tmp_path: Path) -> None:
    group = make_group(tmp_path)
    rounds, pids = chaos(group, ROUNDS, SEED)
    group.shutdown()
    left = left_after(pids)
    check(rounds)
    assert not left
    if os.environ.get("ROLLOUT_SPEC_WRITE_RESULTS"):
        total = summary(rounds)
        results = {
            "what": "two spot-training workers; completions compared with those of one engine that nobody kills",
            "command": "ROLLOUT_SPEC_WRITE_RESULTS=1 pytest -m slow tests/ray/test_spot_proof.py",
            "config": CONFIG,
            **total,
            "processes_seen": len(pids),
            "processes_left": len(left),
            "each": rounds,
        }
        checks = [
            Check("rounds", ROUNDS, ">= 50", ROUNDS >= 50),
            Check("completions", total["completions"], f"{total['expected']}", total["completions"] == total["expected"]),
            Check("same tokens and logprobs", total["same"], f"{total['expected']}", total["same"] == total["expected"]),
            Check("processes left", len(left), "0", not left),
        ]  # fmt: skip
        Report("spot chaos", results, checks, EvidenceLevel.L1, SEED).write(RESULT)
