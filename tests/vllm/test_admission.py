"""Which requests vLLM goes on refusing beside speculation; no vLLM runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_spec.integrations.vllm.sampling import admit


def processor(enable_trace_replay: bool | None, plugin: bool = True) -> Any:
    """As vLLM makes it; it reads `speculative_config` to refuse requests. Older releases know no traces."""

    class InputProcessor:
        def __init__(self, vllm_config: Any) -> None:
            self.speculative_config = vllm_config.speculative_config

    model = SimpleNamespace(use_fp64_gumbel=False)
    if enable_trace_replay is not None:
        model.enable_trace_replay = enable_trace_replay
    config = SimpleNamespace(
        additional_config={"rollout_spec": {}} if plugin else {},
        speculative_config="speculates",
        model_config=model,
    )
    admit(SimpleNamespace(InputProcessor=InputProcessor))  # type: ignore[arg-type]
    return InputProcessor(config)


@pytest.mark.parametrize("enable_trace_replay", [None, False])
def test_min_p_and_logit_bias_are_admitted(enable_trace_replay: bool | None) -> None:
    assert processor(enable_trace_replay).speculative_config is None
    assert processor(enable_trace_replay, plugin=False).speculative_config == "speculates"


def test_traces_stay_refused() -> None:
    """In a pass with drafts of anybody, the V2 runner's verifier samples every request, and ignores traces."""
    assert processor(enable_trace_replay=True).speculative_config == "speculates"


@pytest.mark.integration
def test_vllm_still_refuses_traces() -> None:
    """Where this fails, vLLM replays traces beside speculation: `admit` need not make the exception."""
    import inspect

    vllm = pytest.importorskip("vllm")
    assert "not supported with speculative decoding" in inspect.getsource(
        vllm.SamplingParams._validate_trace_replay
    )
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    assert "trace_replay" not in inspect.getsource(rejection_sampler)
