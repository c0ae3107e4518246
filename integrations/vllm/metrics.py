"""Prometheus metrics beside vLLM's own: what was decided and why, versions in force, what the drafter costs in KV cache.

They are counted where they arise: the scheduler's in the engine core, the versions in the workers. With vLLM in one
process that is the registry of `/metrics`. With several, Prometheus itself joins them where the environment variable
PROMETHEUS_MULTIPROC_DIR is set, as vLLM does by itself for several API servers. `rollout_spec_state` has them always.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

from rollout_spec.integrations.vllm.options import DRAFT_PREFIX
from rollout_spec.policy.records import Reason

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class SchedulerMetrics:
    """Counts decisions.

    Attributes:
        kv_blocks: Blocks of the KV cache that the target would have besides, if the drafter had none of its own.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._model = _model(vllm_config)
        self._pending: Counter[tuple[Reason, int, str | None]] = Counter()
        self.kv_blocks = drafter_kv_blocks(vllm_config, kv_cache_config)
        _metric("drafter_kv_blocks").labels(self._model).set(self.kv_blocks)
        has_drafter = vllm_config.speculative_config is not None
        set_versions(vllm_config, 0, 0 if has_drafter else None)  # as loaded; the workers know better later
        set_aside(vllm_config, "scheduler", False)
        set_aside(vllm_config, "worker", False)

    def decided(self, reason: Reason, draft_length: int, drafter: str | None) -> None:
        """A step was decided; Prometheus hears of it at the next `publish`."""
        self._pending[reason, draft_length, drafter] += 1

    def publish(self) -> None:
        """Let Prometheus know."""
        for (reason, draft_length, drafter), steps in self._pending.items():
            _metric("decisions").labels(self._model, reason.value).inc(steps)
            _metric("draft_lengths").labels(self._model, str(draft_length)).inc(steps)
            if drafter is not None:
                _metric("drafting_steps").labels(self._model, drafter).inc(steps)
        self._pending.clear()


def set_versions(vllm_config: Any, policy: int, drafter: int | None) -> None:
    """Policy version in force, and the one its drafter was made from, None without one."""
    model = _model(vllm_config)
    _metric("policy_version").labels(model).set(policy)
    if drafter is not None:
        _metric("drafter_version").labels(model).set(drafter)
        _metric("version_lag").labels(model).set(policy - drafter)


def set_aside(vllm_config: Any, by: str, is_set_aside: bool) -> None:
    """Whether the drafter is set aside `by` the scheduler (acceptance) or a worker (stale, broken, the canary)."""
    _metric("drafter_set_aside").labels(_model(vllm_config), by).set(is_set_aside)


def drafter_kv_blocks(vllm_config: Any, kv_cache_config: Any) -> int:
    """Blocks that the target alone would have besides; 0 where the drafter shares its cache.

    A block holds a stretch of a sequence for all layers, so a drafter's layers make every block larger. vLLM names them
    `draft_model.…`, or numbers them on from the target's last.
    """
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    sizes = {True: 0, False: 0}
    for group in kv_cache_config.kv_cache_groups:
        each = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            number = _LAYER.search(name)
            drafters = name.startswith(DRAFT_PREFIX) or (
                number is not None and int(number.group(1)) >= layers
            )
            sizes[drafters] += each.get(name, group.kv_cache_spec).page_size_bytes
    return round(kv_cache_config.num_blocks * sizes[True] / sizes[False]) if sizes[False] else 0


def _model(vllm_config: Any) -> str:
    name = vllm_config.model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name)


@cache
def _metric(name: str) -> Any:
    """Made once in a process: Prometheus refuses a second of the same name."""
    import prometheus_client

    counters = {
        "decisions": ("Steps decided, by reason.", "reason"),
        "draft_lengths": ("Steps decided, by the most draft tokens of a request (K).", "draft_length"),
        "drafting_steps": ("Steps decided in which something drafts, by what.", "drafter"),
    }
    gauges = {
        "policy_version": ("Policy version in force.",),
        "drafter_version": ("Policy version that the drafter was made from.",),
        "version_lag": ("Policy versions that the drafter is behind.",),
        "drafter_kv_blocks": ("KV blocks that the target would have besides, but for the drafter.",),
        "drafter_set_aside": ("1 where this part of the engine does not let the drafter draft.", "by"),
    }
    if name in counters:
        text, *labels = counters[name]
        return prometheus_client.Counter(f"rollout_spec:{name}", text, ["model_name", *labels])
    text, *labels = gauges[name]
    return prometheus_client.Gauge(
        f"rollout_spec:{name}", text, ["model_name", *labels], multiprocess_mode="mostrecent"
    )
