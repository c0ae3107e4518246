"""`rollout/spec_*` in the trainer's log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rollout_spec.integrations.verl.conversions import COUNTS

_TOTALS = "_rollout_spec_totals"


@dataclass(frozen=True)
class ServerFigures:
    """What one server says of itself.

    Attributes:
        drafted, accepted, tokens: Draft tokens verified, of these accepted, and tokens sampled, since its start.
        set_aside: Whether a drafter has been set aside.
        update_seconds: What the last weight update took.
        canary_acceptance: Found after it; None without a canary.
        idle_seconds, used_seconds: Without a request while awake, and of this spent on training a drafter; None where
            none is trained.
        adaptive_version: Of the trained drafter in force; None where none is trained.
    """

    drafted: int
    accepted: int
    tokens: int
    set_aside: bool
    update_seconds: float
    canary_acceptance: float | None = None
    idle_seconds: float | None = None
    used_seconds: float | None = None
    adaptive_version: int | None = None


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
    import ray

    replicas = [r for manager in trainer._rollout_server_managers() for r in manager.get_replicas()]
    now = ray.get([server.rollout_spec_figures.remote() for r in replicas for server in r.servers])
    totals, metrics = combine(now)
    before = getattr(trainer, _TOTALS, {})
    setattr(trainer, _TOTALS, totals)
    return metrics | {name: total - before.get(name, 0.0) for name, total in totals.items()}


def combine(servers: list[ServerFigures]) -> tuple[dict[str, float], dict[str, float]]:
    """Sums that grow from start to end, and how things stand."""
    totals = {
        "rollout/spec_engine_draft_tokens": float(sum(s.drafted for s in servers)),
        "rollout/spec_engine_accepted_tokens": float(sum(s.accepted for s in servers)),
        "rollout/spec_engine_tokens": float(sum(s.tokens for s in servers)),
    }
    state = {
        "rollout/spec_drafters_set_aside": float(sum(s.set_aside for s in servers)),
        "rollout/spec_update_seconds": max(s.update_seconds for s in servers),
    }
    canaries = [s.canary_acceptance for s in servers if s.canary_acceptance is not None]
    if canaries:
        state["rollout/spec_canary_acceptance"] = min(canaries)
    training = [s for s in servers if s.idle_seconds is not None]
    if training:
        totals["rollout/spec_idle_seconds"] = sum(s.idle_seconds or 0.0 for s in training)
        totals["rollout/spec_idle_used_seconds"] = sum(s.used_seconds or 0.0 for s in training)
        state["rollout/spec_adaptive_version"] = float(min(s.adaptive_version or 0 for s in training))
    return totals, state
