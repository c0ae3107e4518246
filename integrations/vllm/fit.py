"""Whether the installed vLLM has what the configured parts of the plugin touch; asked once, at start."""

from __future__ import annotations

from functools import cache
from typing import Any

from rollout_spec.integrations.vllm.compat import check_version
from rollout_spec.integrations.vllm.contracts import Source, require
from rollout_spec.integrations.vllm.options import is_self_drafter, options_of
from rollout_spec.integrations.vllm.touches import TOUCHES


def check_fit(vllm_config: Any) -> None:
    """Refuse, before anything is loaded, a vLLM in which a part in use would not work.

    Raises:
        UnsupportedVllm: The release is outside the supported range.
        RolloutSpecError: Names each part, and what of vLLM differs from what it needs.
    """
    release = check_version()
    parts = parts_in_use(vllm_config)
    if parts:
        _check(release, parts)


def parts_in_use(vllm_config: Any) -> frozenset[str]:
    """Of `touches.PARTS`, those that this engine's configuration asks for; none where the plugin is not configured.

    `weights` is asked for by the worker extension, `sampling_cpu` and `draws` where vLLM runs on CPU.
    """
    options = options_of(vllm_config)
    if options is None:
        return frozenset()
    parts = {"policy"}
    if options.verifier == "coupled":
        parts.add("draws")
    if vllm_config.speculative_config is not None:
        parts.add("sampling")
        if vllm_config.device_config.device_type == "cpu":
            parts |= {"sampling_cpu", "draws"}
        if is_self_drafter(vllm_config):
            parts.add("drafter_v2" if vllm_config.use_v2_model_runner else "drafter")
    extension = vllm_config.parallel_config.worker_extension_cls or ""
    if extension.startswith("rollout_spec."):
        parts.add("weights")
    return frozenset(parts)


@cache
def _check(release: str, parts: frozenset[str]) -> None:
    require(Source.installed(release), TOUCHES, parts)
