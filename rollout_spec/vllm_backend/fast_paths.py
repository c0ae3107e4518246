"""What vLLM itself gives up beside speculation; said in the log at start and by `rollout-spec doctor`, never silently."""

from __future__ import annotations

from typing import Any

ASYNCHRONOUS = "asynchronous scheduling"
FULL_GRAPHS = "full CUDA graphs"
V2_DRAFTS_SINCE = "0.32"  # the first release whose V2 runner tells a draft model K

# Methods beside which vLLM schedules synchronously: they draft from tokens on the host.
_SYNCHRONOUS = ("ngram", "suffix", "medusa", "mlp_speculator", "custom_class")


def given_up(method: str, *, v2_runner: bool, varying: bool, graphs: bool = True) -> dict[str, str]:
    """By fast path that vLLM gives up: why, and what to do about it.

    Args:
        method: `speculative_config.method`.
        v2_runner: Whether vLLM's V2 model runner is used.
        varying: Whether `num_speculative_tokens_per_batch_size` is given, as it is wherever K varies.
        graphs: Whether CUDA graphs are captured at all.
    """
    found = {}
    if method in _SYNCHRONOUS:
        found[ASYNCHRONOUS] = (
            f"vLLM schedules synchronously beside {method}, whose drafts come from the host; "
            "draft_model, EAGLE and MTP keep it"
        )
    if graphs and varying and not v2_runner:
        found[FULL_GRAPHS] = (
            "vLLM's V1 runner captures piecewise graphs only while K varies, so plain decoding is slower than "
            f"without speculation; use the V2 runner (VLLM_USE_V2_MODEL_RUNNER=1, vLLM {V2_DRAFTS_SINCE} or newer)"
        )
    return found


def given_up_by(vllm_config: Any) -> dict[str, str]:
    """The same of an engine's configuration, after vLLM has adjusted it; empty on a CPU, where there is neither."""
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.device_config.device_type == "cpu":
        return {}
    found = given_up(
        speculative.method,
        v2_runner=bool(vllm_config.use_v2_model_runner),
        varying=bool(speculative.num_speculative_tokens_per_batch_size),
        graphs=not vllm_config.model_config.enforce_eager,
    )
    if vllm_config.scheduler_config.async_scheduling:
        found.pop(ASYNCHRONOUS, None)
    return found
