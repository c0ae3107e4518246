"""Every ablation runs, quickly, and leaves a valid report with its figures, and a plot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout_spec.observe.report import EvidenceLevel, Report

ABLATIONS = Path(__file__).parents[1] / "examples" / "ablations"
SPEEDUPS = {"median_ratio", "min_ratio", "max_ratio", "pairs", "baseline_seconds", "candidate_seconds", "tau"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Costs measured by one script serve the next; those of the user are left alone."""
    return tmp_path_factory.mktemp("cache")


def run(name: str, out: Path, cache: Path) -> Report:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ABLATIONS / f"{name}.py"), "--quick", "--out", str(out)]
    env = os.environ | {"ROLLOUT_SPEC_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    png = (out / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    report = Report.read(out / f"{name}.json")
    assert report.command == f"ablation {name}" and f"{name}.py --quick" in report.command_line
    assert report.results["quick"] is True and report.seed == 0
    return report


@pytest.mark.parametrize(
    ("name", "cases", "speculating"),
    [
        # The automatic policy decides there, and may find that nothing pays.
        ("drafter_kind", {"int8", "history only", "none (plain, again)"}, None),
        ("draft_length", {"B=1 K=1", "B=2 K=4", "B=1 automatic", "B=2 plain, again"}, "B=1 K=4"),
        (
            "toggle_rule",
            {"always on", "on while B ≤ 1", "EfficientRollout", "TLT bandit", "automatic"},
            "always on",
        ),
        ("verifier", {"coupled, noise 0.4", "rejection, noise 0.4"}, "rejection, noise 0.4"),
        ("history_sources", {"own text", "+ siblings", "+ earlier epochs"}, None),
        ("objective", {"makespan", "throughput", "plain, again"}, None),
    ],
)
def test_rollouts(name, cases, speculating, tmp_path, cache):
    report = run(name, tmp_path, cache)
    found = report.results["cases"]
    assert found.keys() >= cases
    assert all(
        row.keys() >= SPEEDUPS and row["median_ratio"] > 0 and row["pairs"] == 1 for row in found.values()
    )
    assert speculating is None or found[speculating]["tau"] > 1
    assert report.evidence_level is EvidenceLevel.L1
    assert [check.name for check in report.checks] == [
        "identical trajectories"
    ]  # the shipped policy is E2 on CPU
    if name == "drafter_kind":
        assert 0.9 < found["int8"]["acceptance"] <= 1
    if name == "verifier":
        assert 0 < found["coupled, noise 0.4"]["acceptance_per_token"] <= 1
    if name == "history_sources":
        right = {case: found[case]["share_of_tokens_history_had_right"] for case in sorted(cases)}
        assert (
            right["own text"]["siblings"] == right["own text"]["epochs"] == right["+ siblings"]["epochs"] == 0
        )
        assert right["+ earlier epochs"]["epochs"] > 0
    if name == "objective":
        assert found["makespan"]["mean_completion_ratio"]["median"] > 0


def test_graph_budget(tmp_path, cache):
    report = run("graph_budget", tmp_path, cache)
    planned = list(report.results["planned"].values())
    padding = [row["padding_of_rollout_planned_for"]["median"] for row in planned]
    assert padding == sorted(padding, reverse=True), "a larger budget never wastes more"
    assert all(row["graphs"]["median"] > 0 for row in (*planned, report.results["powers_of_two"]))
    assert report.evidence_level is EvidenceLevel.L3
