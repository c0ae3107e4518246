"""`rollout-spec verify --backend vllm` passes on the shipped policy, and fails when a part is broken on purpose."""

from __future__ import annotations

import gc
import json

import pytest
import small_engines
import torch

from rollout_spec.commands.verify import command
from rollout_spec.integrations.vllm import coupled
from rollout_spec.integrations.vllm.worker import WorkerExtension
from rollout_spec.vllm_backend.samples import InFlight

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SMALL = ["--dtype", "float32", "--requests", "4", "--seeds", "2", "--max-tokens", "40", "--samples", "1000"]


@pytest.fixture
def verify(tmp_path):
    """Exit code, exactness shown, and the names of the checks that failed."""

    def run():
        gc.collect()  # an engine that is freed later would take the next one's process groups with it
        file = tmp_path / "report.json"
        given = [small_engines.POLICY, "--backend", "vllm", *SMALL, "--json", str(file)]
        with pytest.raises(SystemExit) as ended:
            command.main(given)
        report = json.loads(file.read_text())
        assert report["results"]["backend"] == "vllm" and len(report["checks"]) == 14
        failed = {check["name"] for check in report["checks"] if not check["passed"]}
        return ended.value.code, report["results"]["exactness"], failed

    return run


def test_the_shipped_policy_passes(verify) -> None:
    assert verify() == (0, "E1", set())


def test_wrong_logprobs_are_found(verify, monkeypatch) -> None:
    end = InFlight.end

    def off(self, reason):
        self.logprobs = [x - 1e-3 for x in self.logprobs]
        return end(self, reason)

    monkeypatch.setattr(InFlight, "end", off)
    code, _, failed = verify()
    assert code != 0 and {"logprobs, coupled", "logprobs, rejection"} <= failed


def test_a_verifier_that_favours_drafts_is_found(verify, monkeypatch) -> None:
    exact = coupled.verify

    def lenient(noise, drafts, target_logits, *rest):
        rows = torch.arange(len(drafts))
        target_logits = target_logits.clone()
        target_logits[rows, drafts.long()] += 3.0
        return exact(noise, drafts, target_logits, *rest)

    monkeypatch.setattr(coupled, "verify", lenient)
    code, level, failed = verify()
    assert code != 0 and level is None
    assert {"chi-square, coupled", "noise, recomputed", "trajectory, on"} <= failed
    assert "chi-square, rejection" not in failed


def test_a_drafter_that_does_not_follow_is_found(verify, monkeypatch) -> None:
    every = WorkerExtension._rollout_spec_models
    monkeypatch.setattr(WorkerExtension, "_rollout_spec_models", lambda self: list(every(self))[:1])
    code, level, failed = verify()
    assert code != 0 and level == "E1" and "weight update" in failed
