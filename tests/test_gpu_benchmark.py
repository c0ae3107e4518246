"""The GPU benchmark's dry run: every part gives its figures, and none can take the others along."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rollout_spec.kernels.library import kernels
from rollout_spec.observe.report import Report
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.records import Plan, Reason

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
PARTS = (
    "machine", "correctness", "decode", "drafters", "graphs", "speculation", "requantize", "makespan", "never_slower",
)  # fmt: skip
PER_SIZE = {"decode": 4, "graphs": 5, "speculation": 8, "makespan": 6, "never_slower": 8}


def dry_run(out: Path, *options: str, before: str = "", status: int = 0) -> tuple[Report, str]:
    """The report of a dry run, and what it printed; `before` is run first, with `run` imported by its name."""
    code = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n{before}\nimport run\nsys.exit(run.main())"
    start = [sys.executable, "-c", code] if before else [sys.executable, str(FOLDER / "run.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ROLLOUT_SPEC_CACHE": str(out / "cache")}
    command = [*start, "--dry-run", "--out", str(out), *options]
    done = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    (path,) = out.glob("report*.json")
    return Report.read(path), done.stdout


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("gpu")
    return dry_run(out)[0], out


def test_every_part_gives_its_figures(everything):
    report, _ = everything
    parts, figures = report.results["parts"], report.results["figures"]
    for size in ("1.5b", "7b"):  # or a policy that asks for K = 1 would get K = 0
        assert 1 in figures[f"makespan/{size}/via=graphs/policy=automatic"]["draft_lengths"]
    assert [parts[name]["status"] for name in PARTS] == ["done"] * len(PARTS) and len(parts) == len(PARTS)
    assert report.passed and not any(
        note for part in parts.values() for note in part["notes"] if "out of time" in note
    )
    for part, count in PER_SIZE.items():
        for size in ("1.5b", "7b"):
            found = [name for name in figures if name.startswith(f"{part}/{size}/")]
            assert len(found) == count, found
    kinds = {name.split("/")[2] for name in figures if name.startswith("drafters/7b/")}
    assert {"kind=dense", "kind=int8"} <= kinds
    assert len([name for name in figures if name.startswith("requantize/7b/")]) == len(kinds) - 1
    assert all(figure["value"] > 0 for name, figure in figures.items() if not name.startswith("correctness/"))


def test_the_first_part_proves_what_it_says(everything):
    report, _ = everything
    names = {check.name.removeprefix("correctness: ") for check in report.checks}
    assert {
        "total variation from float32 on the CPU",
        "verify: trajectory, on",
        "verify: chi-square, rejection",
        "history and ragged drafts, run 1",
        "graph replay equals eager",
    } <= names
    passes = report.results["parts"]["correctness"]
    assert passes["exactness"] == "E2"
    assert passes["graph_passes_eager"] == {"not captured": 2} and passes["graph_passes_same_size"] == {
        "graph": 2
    }


def test_predictions_come_first_and_are_compared(everything):
    report, out = everything
    predictions = Report.read(out / "predictions.json")
    assert predictions.created <= report.created
    predicted, figures = predictions.results["predicted"], report.results["figures"]
    for name, figure in figures.items():
        if name.startswith(("decode/", "drafters/", "requantize/")) or "/via=graphs/" in name:
            assert figure["predicted"] == pytest.approx(predicted[name], rel=1e-5)
            # Figures are kept to six digits: an error of nearly 0 has fewer that mean something.
            relative_error = predicted[name] / figure["value"] - 1
            assert figure["relative_error"] == pytest.approx(relative_error, rel=1e-3, abs=1e-5)
    assert report.results["prediction_error"]["decode"]["figures"] == 8


def test_a_dry_run_claims_no_evidence(everything):
    report, out = everything
    assert report.results["dry_run"] and report.evidence_level is None
    assert {figure["level"] for figure in report.results["figures"].values()} == {None}
    assert Report.read(out / "predictions.json").evidence_level is None


def test_imposed_acceptance_is_the_one_imposed(everything):
    """Over the rollouts with a fixed K = 2 and acceptance 0.9: (0.9 + 0.81) / 2 of the drafts."""
    figures = everything[0].results["figures"]
    for via in ("graphs", "engine"):
        fixed = figures[f"makespan/7b/via={via}/policy=fixed"]
        assert 0.6 < fixed["accepted_share"] <= 1.0
        assert fixed["passes"] < figures[f"makespan/7b/via={via}/policy=off"]["passes"]
    useless = [figure["accepted_share"] for name, figure in figures.items() if "policy=off" in name]
    assert useless == [0.0] * 4


def test_a_part_that_raises_is_a_failed_check(tmp_path):
    before = (
        "import run, timings\n"
        "def broken(*_): raise RuntimeError('out of luck')\n"
        "run.PARTS['requantize'] = (5, broken)\n"
        "timings._draft_loop = broken"
    )
    report, _ = dry_run(
        tmp_path, "--parts", "graphs,requantize,makespan", "--sizes", "7b", before=before, status=1
    )
    failed = {check.name: check.value for check in report.checks if not check.passed}
    assert set(failed) == {"graphs: 7b, B=1", "graphs: 7b, B=2", "requantize: runs to its end"}
    assert set(failed.values()) == {"RuntimeError: out of luck"}
    parts = report.results["parts"]
    assert [parts[name]["status"] for name in ("graphs", "requantize", "makespan")] == [
        "done",
        "failed",
        "done",
    ]
    assert {name.split("/")[0] for name in report.results["figures"]} == {"graphs", "makespan"}


def test_what_only_helps_may_be_missing(tmp_path):
    before = "for name in ('click', 'numba', 'rich', 'psutil', 'scipy', 'bitsandbytes'):\n    sys.modules[name] = None"
    report, printed = dry_run(
        tmp_path, "--parts", "drafters,makespan", "--sizes", "7b", before=before
    )  # fmt: skip
    assert report.results["stood_in_for"] == ["click", "numba", "psutil", "rich"]
    assert "click is not installed" in printed
    notes = [note for part in report.results["parts"].values() for note in part["notes"]]
    assert kernels() is not None or any("nf4 is not available" in note for note in notes)
    assert any("not fitted" in note for note in notes)
    assert report.machine.memory_gib > 0


# --- vLLM's cells: they need vLLM on a GPU, what judges them does not ------------------------------------------------


class Judged:
    """A `Part` that keeps verdicts only."""

    def __init__(self) -> None:
        self.verdicts: list[bool] = []

    def check(self, name: str, value: object, target: str, passed: bool) -> None:
        self.verdicts.append(passed)


class Draws:
    """An engine whose answers come from one distribution plainly and from another when drafting."""

    def __init__(self, plain: dict[tuple[int, ...], float], drafted: dict[tuple[int, ...], float]) -> None:
        self.scheduler = SimpleNamespace(decisions=SimpleNamespace(policy=None))
        self._answers, self._drafts, self._rng = {"Off": plain, "Fixed": drafted}, 0, random.Random(0)

    def counters(self) -> tuple[int, int]:
        return self._drafts, 0

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        return self._drafts - before[0], 0

    def generate(self, prompts, tokens, **params):
        kind = type(self.scheduler.decisions.policy).__name__
        self._drafts += len(prompts) * 2 * (kind == "Fixed")
        answers = self._answers[kind]
        drawn = self._rng.choices(list(answers), list(answers.values()), k=len(prompts))
        return [SimpleNamespace(token_ids=answer) for answer in drawn]


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("vllm_cells")


def test_a_plan_is_carried_out_by_the_longest_loop_it_fills_and_learnt_from(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    predictions = importlib.import_module("predictions")
    zeros, forecast = np.zeros(2, np.int64), object()

    class Plans(Off):
        def plan(self, state):
            return Plan(np.array([5, 2]), zeros, "nf4", Reason.PAYS, forecast=forecast)

    plan = predictions._Captured(Plans(), [1, 3, 7]).plan(None)
    assert plan.draft_lengths.tolist() == [3, 2] and plan.forecast is forecast
    assert not predictions._Captured(Plans(), [7]).plan(None).speculates


def test_vllm_cells_tell_a_near_tie_from_a_fault(cells):
    def answer(tokens, gap):
        two = {0: SimpleNamespace(logprob=-0.5), 1: SimpleNamespace(logprob=-0.5 - gap)}
        return SimpleNamespace(token_ids=tokens, logprobs=[two] * len(tokens))

    part = Judged()
    for other, gap in (([1, 2, 3], 1.0), ([1, 5, 3], 1e-6), ([1, 5, 3], 0.01)):
        cells._same(part, "greedy", [answer([1, 2, 3], gap)], [answer(other, gap)])
    assert part.verdicts == [True, True, False]


def test_vllm_cells_see_another_distribution(cells):
    honest, liar = {(1,): 0.6, (2,): 0.4}, {(1,): 0.7, (2,): 0.3}
    part = Judged()
    cells._distribution(part, "same", Draws(honest, honest), [1], {})
    cells._distribution(part, "other", Draws(honest, liar), [1], {})
    cells._distribution(part, "other, as it should be", Draws(honest, liar), [1], {}, fits=False)
    assert part.verdicts == [True, False, True]


def test_an_unknown_cell_is_refused():
    command = [sys.executable, str(FOLDER / "vllm_cells.py"), "--cells", "exact-v3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "unknown exact-v3" in done.stderr
