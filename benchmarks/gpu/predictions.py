"""What the datasheet and the simulator say, before anything is measured (evidence level L3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from figures import figure_name
from lab import PROMPT, Scale, cost_shape, graph_shape, hf_config, long_tail
from passes import as_captured

from rollout_spec.models.spec import ModelSpec
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Delegate, Fixed, Off, expected_emitted
from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.devices import DRAFTER_EFFICIENCY, NF4, NF4_BITS, Device, ModelShape, from_datasheet
from rollout_spec.policy.graph_plan import DRAFT, GraphCost, Kind
from rollout_spec.policy.records import Plan, SpeculationPolicy, StepState
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import Workload, from_lengths

BITS = {"nf4": NF4_BITS, "int4": 4 + 32 / 64, "int8": 8.0, "dense": 16.0}
"""Per weight, scales included."""
LAUNCH = 5e-6  # seconds to launch a kernel from the host, as `GraphCost.node_rows` assumes
TAIL_ALPHA = 0.9
LONGEST = 7  # largest K of the automatic policy


def costs_of(device: Device, shape: ModelShape, kind: str) -> CostModel:
    """Costs of the target and of a drafter of this kind, which goes by the name `nf4` whatever it is."""
    bits = BITS[kind] * shape.weight_bits / 16 if kind == "dense" else BITS[kind]
    efficiency = 1.0 if kind == "dense" else DRAFTER_EFFICIENCY
    return from_datasheet(device, shape, drafter_bits=bits, drafter_efficiency=efficiency)


def policies(costs: CostModel, fixed: int) -> dict[str, SpeculationPolicy]:
    """What is compared on the long tail."""
    automatic = AutomaticPolicy(costs, longest=LONGEST, ragged=False)
    return {"off": Off(), "fixed": Fixed(fixed), "automatic": automatic}


def predict(
    device: Device, scale: Scale, sizes: list[str], kind: str, seed: int, *, dry: bool
) -> dict[str, float]:
    """Predicted values of figures, by their names.

    Args:
        device: Datasheet.
        scale: What will be measured.
        sizes: Of which models.
        kind: The drafter that rollouts are predicted with.
        seed: Of the simulated luck.
        dry: Tiny models.
    """
    found = {"machine/copy": device.bandwidth, "machine/matmul": device.flops}
    for size in sizes:
        spec = ModelSpec.from_hf_config(hf_config(size, dry))
        found |= _passes(device, scale, size, spec)
        found |= _rollouts(costs_of(device, cost_shape(spec), kind), scale, size, seed)
    return found


def _passes(device: Device, scale: Scale, size: str, spec: ModelSpec) -> dict[str, float]:
    found, shape = {}, cost_shape(spec)
    for B in scale.batches:
        for S in scale.contexts:
            costs = costs_of(device, shape, "nf4")
            found[figure_name("decode", size, B=B, S=S)] = costs.target(B, B, B * S)
            for kind in BITS:
                costs = costs_of(device, shape, kind)
                r = costs.draft(NF4, B, B * S) / costs.target(B, B, B * S)
                found[figure_name("drafters", size, kind=kind, B=B, S=S)] = r
                for k in scale.draft_lengths:
                    name = figure_name("speculation", size, via="graphs", kind=kind, B=B, S=S, K=k)
                    found[name] = _plain_over_round(costs, B, S, k)
    S, k = scale.contexts[0], max(scale.draft_lengths)
    kernels = GraphCost(graph_shape(spec), graph_shape(spec)).kernels(Kind(DRAFT, 1))
    for B in scale.batches[:2]:
        step = costs_of(device, shape, "int4").draft(NF4, B, B * S)
        eager = max(1.0, kernels * LAUNCH / step)
        found[figure_name("graphs", size, how="eager", B=B, S=S, K=k)] = eager
    for kind, bits in BITS.items():
        moved = shape.parameters * (shape.weight_bits + bits) / 8
        found[figure_name("requantize", size, kind=kind)] = moved / device.bandwidth
    return found


def captured_lengths(scale: Scale) -> list[int]:
    """K of the draft loops that rollouts have graphs for."""
    return sorted({1, 2, *scale.draft_lengths})


def _plain_over_round(costs: CostModel, B: int, S: int, k: int) -> float:
    """T_T / (K T_D + T_V): speedup per token emitted."""
    return costs.target(B, B, B * S) / (k * costs.draft(NF4, B, B * S) + costs.target(B, B * (k + 1), B * S))


def speedups(plain_over_round: float, k: int, alphas: tuple[float, ...]) -> dict[str, float]:
    """tau T_T / (K T_D + T_V) at these acceptances (field notes, top)."""
    return {f"{alpha:g}": expected_emitted(alpha, k) * plain_over_round for alpha in alphas}


def _rollouts(costs: CostModel, scale: Scale, size: str, seed: int) -> dict[str, float]:
    found = {}
    fixed = max(scale.draft_lengths)
    outputs = long_tail(scale, seed)
    tail = _workload(outputs, TAIL_ALPHA)
    for name, inner in policies(costs, fixed).items():
        policy = _Captured(inner, captured_lengths(scale))
        found[figure_name("makespan", size, via="graphs", policy=name)] = makespan(
            simulate(tail, policy, costs)
        )
    for B in scale.batches:
        for alpha in (TAIL_ALPHA, 0.0):
            work = _workload(np.full(B, scale.lone_outputs), alpha)
            automatic = _Captured(policies(costs, fixed)["automatic"], captured_lengths(scale))
            simulate(work, automatic, costs)  # measured likewise: after a first rollout, from which it learns
            plain, settled = (makespan(simulate(work, policy, costs)) for policy in (Off(), automatic))
            found[figure_name("never_slower", size, via="graphs", B=B, alpha=alpha)] = plain / settled
    return found


class _Captured(Delegate):
    """A policy whose plans are carried out by graphs of these draft lengths."""

    def __init__(self, inner: SpeculationPolicy, draft_lengths: Sequence[int]) -> None:
        super().__init__(inner)
        self._draft_lengths = draft_lengths

    def plan(self, state: StepState) -> Plan:
        return as_captured(super().plan(state), self._draft_lengths)


def _workload(outputs: np.ndarray, alpha: float) -> Workload:
    """All samples start together."""
    return from_lengths(
        "bench", outputs, prompt=PROMPT, alpha=alpha, limit=int(outputs.max()), slots=len(outputs)
    )
