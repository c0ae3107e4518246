"""Parts that time passes: machine, decode, drafters, graphs, speculation, requantize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from figures import Measured, Part, figure_name
from lab import Lab, Scale, copy_rates, graph_shape, interleaved, matmul_rates, timed
from passes import Passes, Turns, buckets, roll
from predictions import speedups

from rollout_spec.drafters.quantize import QUANTIZERS
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.weights import Piece
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.devices import Device
from rollout_spec.policy.graph_plan import DECODE, DRAFT, GraphCost, Kind, plan_graphs, strategies

PREFERRED = ("int4", "nf4", "int8", "dense")  # until measured
IMPOSED = 0.9  # acceptance while passes are timed; a pass takes as long whatever is accepted


@dataclass
class Bench:
    """What all parts share.

    Attributes:
        device, scale, sizes, seed: What is measured, and where.
        datasheet: The device's peaks as published.
        copied: Its bandwidth as measured here, bytes/s.
        ratios: Measured cost ratios r of drafters at the smallest batch and context, by size and kind.
        labs: The policies made so far.
    """

    device: torch.device
    scale: Scale
    sizes: Sequence[str]
    seed: int
    datasheet: Device
    copied: float | None = None
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    labs: dict[str, Lab] = field(default_factory=dict)

    def lab(self, size: str) -> Lab:
        """The policy of this size, made when it is first wanted."""
        if size not in self.labs:
            self.labs[size] = Lab(size, self.scale, self.device, self.seed)
        return self.labs[size]

    def kind(self, size: str) -> str:
        """The kind of drafter to speculate with: the cheapest measured, else the first of `PREFERRED` there is."""
        ratios = {kind: r for kind, r in self.ratios.get(size, {}).items() if kind != "dense"}
        if ratios:
            return min(ratios, key=ratios.__getitem__)
        return next(kind for kind in PREFERRED if kind in self.lab(size).kinds)

    @property
    def grid(self) -> list[tuple[str, int, int]]:
        """(size, S, B), small before large."""
        return list(product(self.sizes, self.scale.contexts, self.scale.batches))


def machine(bench: Bench, part: Part) -> None:
    """What this device does at best: the ceilings that everything else is compared with."""
    copies = Measured.of(copy_rates(bench.device, bench.scale.rounds))
    bench.copied = copies.value
    part.figure("machine/copy", copies, "bytes/s", counted="bytes read and written")
    part.figure("machine/matmul", Measured.of(matmul_rates(bench.device, bench.scale.rounds)), "FLOP/s")


def decode(bench: Bench, part: Part) -> None:
    """A plain decode step, sampling included, against the time its bytes take to read."""
    for size, S, B in part.each(bench.grid):
        with part.attempt(f"{size}, B={B}, S={S}"):
            _decode_step(bench, part, bench.lab(size), B, S)


def _decode_step(bench: Bench, part: Part, lab: Lab, B: int, S: int) -> None:
    rows, known = lab.fill(B, S), S - lab.scale.room
    graph, eager = (Passes.of(lab, {Kind(DECODE, 1): (B,)}, S, capture=capture) for capture in (True, False))
    block, keys = graph.block(rows, np.zeros(B, np.int64))
    sides = {"graph": lambda: graph.verify(block, keys), "eager": lambda: eager.verify(block, keys)}
    found = interleaved(bench.device, sides, lab.scale.rounds)
    engine = Turns([0], lab.scale.rounds)
    roll(lab, engine, [known] * B, [S] * B, 0.0)
    seconds = found.median("graph")
    nbytes = lab.shape.weight_bytes + B * known * lab.shape.kv_bytes
    bound = nbytes / bench.datasheet.bandwidth
    part.figure(
        figure_name("decode", lab.size, B=B, S=S), seconds, "s", bytes=nbytes, bound_seconds=bound,
        share_of_bound=bound / seconds.value,
        share_of_copy=nbytes / bench.copied / seconds.value if bench.copied else None,
        eager_seconds=found.median("eager").value, eager_over_graph=found.ratio("eager", "graph").value,
        engine_seconds=Measured.of([total for _, total in engine.seconds[0]]).value,
        attended_tokens=block.tables.shape[1] * lab.backend.config.block_size,
    )  # fmt: skip


def drafters(bench: Bench, part: Part) -> None:
    """r = T_D / T_T of every kind of quantized linear that runs here; dense is the control."""
    for size in bench.sizes:
        lab = bench.lab(size)
        for kind, reason in lab.reasons.items():
            if reason is not None:
                part.note(f"{size}: {kind} is not available: {reason}")
        for kind in lab.kinds:
            with part.attempt(f"{size}, {kind}"):
                drafter = lab.use(kind)
                nbytes = sum(linear.nbytes for linear in drafter.linears.values())
                for S, B in part.each(list(product(bench.scale.contexts, bench.scale.batches))):
                    with part.attempt(f"{size}, {kind}, B={B}, S={S}"):
                        _drafter_ratio(bench, part, lab, kind, B, S, nbytes)


def _drafter_ratio(bench: Bench, part: Part, lab: Lab, kind: str, B: int, S: int, nbytes: int) -> None:
    passes = Passes.of(lab, {Kind(DECODE, 1): (B,), Kind(DRAFT, 1): (B,)}, S)
    rows = lab.fill(B, S)
    plain, drafting = (passes.block(rows, np.full(B, k)) for k in (0, 1))
    sides = {"target": lambda: passes.verify(*plain), "draft": lambda: passes.draft(*drafting)}
    found = interleaved(bench.device, sides, bench.scale.rounds)
    r = found.ratio("draft", "target")
    first = (bench.scale.batches[0], bench.scale.contexts[0]) == (B, S)
    if first:
        bench.ratios.setdefault(lab.size, {})[kind] = r.value
    part.figure(
        figure_name("drafters", lab.size, kind=kind, B=B, S=S), r, "T_D / T_T",
        draft_seconds=found.median("draft").value, target_seconds=found.median("target").value, drafter_bytes=nbytes,
    )  # fmt: skip


def graphs(bench: Bench, part: Part) -> None:
    """The whole draft loop in one graph, against one graph per token and against no graph; and what a pool takes."""
    for size, B in part.each(list(product(bench.sizes, bench.scale.batches[:2]))):
        with part.attempt(f"{size}, B={B}"):
            _draft_loop(bench, part, bench.lab(size), B)
    for size in part.each(list(bench.sizes)):
        with part.attempt(f"{size}, pool"):
            _pool_bytes(bench, part, bench.lab(size))


def _draft_loop(bench: Bench, part: Part, lab: Lab, B: int) -> None:
    S, K = lab.scale.contexts[0], max(lab.scale.draft_lengths)
    lab.use(bench.kind(lab.size))
    plan = {Kind(DECODE, 1): (B,), Kind(DRAFT, 1): (B,), Kind(DRAFT, K): (B,)}
    captured, eager = (Passes.of(lab, plan, S, capture=capture) for capture in (True, False))
    block, keys = captured.block(lab.fill(B, S), np.full(B, K))
    sides = {
        "loop": lambda: captured.draft(block, keys),
        "token": lambda: captured.draft_by_token(block, keys),
        "eager": lambda: eager.draft(block, keys),
    }
    drafts = [run().clone() for run in sides.values()]
    same = all(torch.equal(drafts[0], other) for other in drafts[1:])
    part.check(f"{lab.size}, B={B}: same drafts on graphs and without", same, "equal", same)
    found = interleaved(bench.device, sides, lab.scale.rounds)
    for how in ("token", "eager"):
        name = figure_name("graphs", lab.size, how=how, B=B, S=S, K=K)
        seconds = {"loop_seconds": found.median("loop").value, "seconds": found.median(how).value}
        part.figure(name, found.ratio(how, "loop"), "time over that of one graph", **seconds)


def _pool_bytes(bench: Bench, part: Part, lab: Lab) -> None:
    """A pool as `plan_graphs` lays it out, and what capturing it takes."""
    scale, drafter, shape = bench.scale, lab.use(bench.kind(lab.size)), graph_shape(lab.spec)
    cost = GraphCost(shape, shape, context=scale.contexts[0])
    most = scale.batches[min(2, len(scale.batches) - 1)]
    demand = {(B, k + 1): 1.0 for B in range(1, most + 1) for k in (0, *scale.draft_lengths)}
    plan = plan_graphs(strategies(scale.draft_lengths), most, demand, cost, scale.graph_bytes)
    found = Passes(lab.backend, drafter, plan, scale.contexts[0]).captured
    assert found is not None
    part.figure(
        figure_name("graphs", lab.size, what="pool"), float(found.nbytes), "bytes", planned_bytes=plan.nbytes,
        budget_bytes=plan.budget_bytes, graphs=len(found.captured), node_bytes=found.node_bytes,
        seconds=sum(one.seconds for one in found.captured), table=plan.table().splitlines(),
    )  # fmt: skip
    if bench.device.type == "cuda":
        ratio = found.nbytes / plan.nbytes
        part.check(f"{lab.size}: pool bytes over those planned", ratio, "<= 1.25", ratio <= 1.25)


def speculation(bench: Bench, part: Part) -> None:
    """A pass with K drafts against plain passes next to it, with graphs and in the engine as it is."""
    for (size, S, B), via in part.each(list(product(bench.grid, ("graphs", "engine")))):
        with part.attempt(f"{size}, {via}, B={B}, S={S}"):
            lab, Ks, kind = bench.lab(size), bench.scale.draft_lengths, bench.kind(size)
            lab.use(kind)
            passes = Passes.of(lab, buckets((B,), Ks), S) if via == "graphs" else None
            turns = Turns([0, *Ks], bench.scale.rounds)
            rolled = roll(lab, turns, [S - bench.scale.room] * B, [S] * B, IMPOSED, passes)
            plain = [seconds for _, seconds in turns.seconds[0]]
            for k in Ks:
                ratio = Measured.of([a / b for a, (_, b) in zip(plain, turns.seconds[k], strict=True)])
                part.figure(
                    figure_name("speculation", size, via=via, kind=kind, B=B, S=S, K=k), ratio, "T_T / (K T_D + T_V)",
                    acceptance="imposed by overwriting the verdict: timing only",
                    speedup_at_acceptance=speedups(ratio.value, k, bench.scale.alphas),
                    plain_seconds=Measured.of(plain).value, imposed_while_timed=IMPOSED,
                    accepted_share=rolled.accepted / max(1, rolled.drafted), **_phases(turns.seconds[k]),
                )  # fmt: skip


def _phases(passes: Sequence[tuple[float, float]]) -> dict[str, Any]:
    draft, total = (Measured.of(column).value for column in zip(*passes))
    return {"draft_seconds": draft, "pass_seconds": total}


def requantize(bench: Bench, part: Part) -> None:
    """Quantizing all linears for a new policy version, against the time to read them and to write the result."""
    for size in bench.sizes:
        lab = bench.lab(size)
        for kind in part.each([kind for kind in lab.kinds if kind != "dense"]):
            with part.attempt(f"{size}, {kind}"):
                lab.backend.weights.drafter = None
                pieces, drafter = lab.pieces(), QuantizedSelfDrafter(QUANTIZERS[kind])

                def update(drafter: QuantizedSelfDrafter = drafter, pieces: list[Piece] = pieces) -> None:
                    for piece in pieces:
                        drafter.stage(piece)

                update()
                drafter.commit(lab.backend.weights.target, 0)
                seconds = Measured.of([timed(bench.device, update) for _ in range(3)])
                read = sum(piece.weight.nbytes for piece in pieces)
                written = sum(linear.nbytes for linear in drafter.linears.values())
                floor = (read + written) / bench.datasheet.bandwidth
                part.figure(
                    figure_name("requantize", size, kind=kind), seconds, "s", bytes_moved=read + written,
                    floor_seconds=floor, over_floor=seconds.value / floor,
                )  # fmt: skip
                drafter.rollback()


def idle(bench: Bench) -> None:
    """Forget live batches; the next part starts from nothing."""
    for lab in bench.labs.values():
        lab.clear()
        lab.backend.policy = Off()
