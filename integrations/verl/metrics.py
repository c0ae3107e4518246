"""`rollout/spec_*` in the trainer's log."""

from __future__ import annotations

from typing import Any

import ray

from rollout_spec.engine import EngineStats
from rollout_spec.integrations.verl.conversions import COUNTS

_TOTALS = "_rollout_spec_totals"


def of_batch(batch: Any, queue: Any) -> dict[str, float]:
    """Sums over the samples trained on, and verl's own two means over them.

    Args:
        batch: verl's `KVBatchMeta`: the keys of the samples, with tags.
        queue: The module `transfer_queue`.
    """
    from verl.trainer.ppo.ray_trainer import compute_spec_decode_metrics

    data = queue.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
    )
    fields = [
        field
        for field, tag in zip(data.pop("extra_fields").tolist(), batch.tags)
        if not tag.get("is_padding", False) and "spec_num_draft_tokens" in field
    ]
    columns = {name: [field[name] for field in fields] for name in COUNTS}
    sums = {
        name.replace("spec_num_", "rollout/spec_"): float(sum(column)) for name, column in columns.items()
    }
    return {**sums, **compute_spec_decode_metrics(*list(columns.values())[:3])}


def of_engines(trainer: Any) -> dict[str, float]:
    """What all servers did since the last call, whoever trained on it, and how their drafters are."""
    replicas = [r for manager in trainer._rollout_server_managers() for r in manager.get_replicas()]
    now: list[EngineStats] = ray.get([server.stats.remote() for r in replicas for server in r.servers])
    totals = {
        "rollout/spec_engine_draft_tokens": float(sum(s.spec.drafted for s in now)),
        "rollout/spec_engine_accepted_tokens": float(sum(s.spec.accepted for s in now)),
        "rollout/spec_engine_tokens": float(sum(s.generated_tokens for s in now)),
    }
    before = getattr(trainer, _TOTALS, dict.fromkeys(totals, 0.0))
    setattr(trainer, _TOTALS, totals)
    metrics = {name: total - before[name] for name, total in totals.items()}
    metrics["rollout/spec_drafters_set_aside"] = float(sum(bool(s.reports) for s in now))
    metrics["rollout/spec_update_seconds"] = max(s.last_update.seconds for s in now)
    canaries = [s.canary_acceptance for s in now if s.canary_acceptance is not None]
    if canaries:
        metrics["rollout/spec_canary_acceptance"] = min(canaries)
    return metrics
