"""Options that would be ignored are errors; no vLLM runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_spec.config import SpeculationConfig
from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm.refusals import refuse_ignored


def engine(quantization: str | None = "rollout_spec_nf4", drafts: int = 8) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(quantization=quantization, num_speculative_tokens=drafts)
    )


PLAIN = SimpleNamespace(speculative_config=None)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            engine(),
            {"drafter": "int8"},
            r"speculation\.drafter='int8': .*\"quantization\": \"rollout_spec_int8\"",
        ),
        (engine(), {"drafter": "none"}, r"speculation\.drafter='none': .*without rollout_spec_nf4"),
        (engine(None), {"drafter": "nf4"}, r"speculation\.drafter='nf4'"),
        (PLAIN, {"drafter": "nf4"}, r"speculation\.drafter='nf4'"),
        (engine(), {"draft_length": 9}, r"draft_length=9: use at most .*num_speculative_tokens=8"),
        (PLAIN, {"adaptive": True}, r"speculation\.adaptive=True: .*backend=.torch."),
    ],
)
def test_what_would_be_ignored_is_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        refuse_ignored(config, SpeculationConfig(**options))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (engine(), {}),
        (engine(), {"drafter": "nf4", "draft_length": 8, "longest_draft": 16}),
        (engine(None), {}),
        (engine(None), {"drafter": "none", "draft_length": 3}),
        (PLAIN, {"drafter": "none", "draft_length": 9}),
    ],
)
def test_what_is_carried_out_is_not(config: Any, options: dict[str, Any]) -> None:
    refuse_ignored(config, SpeculationConfig(**options))


@pytest.mark.integration
def test_the_scheduler_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from rollout_spec.integrations.vllm import scheduler

    monkeypatch.setattr(scheduler, "check_fit", lambda config: None)
    config = engine()
    config.additional_config = {"rollout_spec": {"drafter": "int4"}}
    config.parallel_config = SimpleNamespace(data_parallel_size=1)
    config.scheduler_config = SimpleNamespace(async_scheduling=False)
    with pytest.raises(InvalidRequest, match="drafter='int4'"):
        scheduler.PolicyScheduler(config)
