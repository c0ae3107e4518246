"""Decode passes as programs of a `GraphPool`, and rollouts made of them or of the engine's own steps.

A pass is: draft (the whole loop of K drafter steps with sampling), verify (the target over K + 1 rows, sampling and
the verdict), one read of the verdict. The same programs run captured or eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from lab import Lab, accept, graph_shape, imposed
from torch import Tensor

from rollout_spec.drafters.base import DraftRound
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.policy.cost_model import TARGET
from rollout_spec.policy.graph_plan import DECODE, DRAFT, VERIFY, GraphCost, GraphPlan, Kind
from rollout_spec.policy.records import PassTiming, Plan, Reason, SpeculationPolicy, StepOutcome, StepState
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.verify import Verdict, verify_coupled
from rollout_spec.torch_backend.attention import padded_blocks
from rollout_spec.torch_backend.backend import TorchBackend
from rollout_spec.torch_backend.graphs import (
    BLOCK_INPUTS,
    CaptureReport,
    Field,
    GraphPool,
    Program,
    block_fields,
    block_inputs,
    block_of,
)
from rollout_spec.torch_backend.runner import Block


class Passes:
    """Decode passes over what is live in a backend.

    Args:
        backend: Idle but for its live batch; weights and cache must stay where they are.
        drafter: Who drafts; None if nobody does.
        plan: What to capture.
        context: Tokens that attention may read.
        capture: False runs everything eagerly.
    """

    def __init__(
        self,
        backend: TorchBackend,
        drafter: QuantizedSelfDrafter | None,
        plan: GraphPlan,
        context: int,
        *,
        capture: bool = True,
    ) -> None:
        self.backend, self.drafter, self.runner = backend, drafter, backend.runner
        block_size = backend.config.block_size
        fields = block_fields(backend.cache, padded_blocks(-(-context // block_size)))
        fields |= {name: Field((), torch.int64, per_row=True) for name in ("tokens", "keys")}
        self.pool = GraphPool(plan, fields, self._program, backend.device)
        self.captured: CaptureReport | None = self.pool.capture() if capture else None

    @classmethod
    def of(
        cls, lab: Lab, buckets: Mapping[Kind, Sequence[int]], context: int, *, capture: bool = True
    ) -> Passes:
        """Passes of these kinds at these batch sizes, whatever they cost."""
        shape = graph_shape(lab.spec)
        cost = GraphCost(shape, shape, context=context)
        plan = GraphPlan({kind: tuple(sizes) for kind, sizes in buckets.items()}, cost, 1 << 40, 0.0)
        drafter = lab.backend.weights.drafter
        assert drafter is None or isinstance(drafter, QuantizedSelfDrafter)
        return cls(lab.backend, drafter, plan, context, capture=capture)

    # --- programs --------------------------------------------------------------------------------------

    def _program(self, kind: Kind) -> Program:
        if kind.mode == DRAFT:
            return Program((*BLOCK_INPUTS, "keys"), lambda inputs: self._draft(inputs, kind.width), (True,))
        return Program((*BLOCK_INPUTS, "tokens", "keys"), self._verify, (True, False, False))

    def _draft(self, inputs: Mapping[str, Tensor], steps: int) -> tuple[Tensor, ...]:
        assert self.drafter is not None, "nobody drafts"
        block, keys = block_of(inputs), inputs["keys"]

        def forward(model, tokens: Tensor | None, step: int) -> Tensor:  # type: ignore[no-untyped-def]
            fed = block.last_tokens[:, None] if tokens is None else tokens
            return self.runner.forward(model, block, fed, step)

        round = DraftRound(
            active=(len(block.last_tokens),) * steps,
            coupled=True,
            forward=forward,
            process=lambda logits, step, drafted: logits,
            keys=lambda step: keys[:, step : step + 1],
        )
        return (torch.cat(self.drafter.propose(round).tokens, 1),)

    def _verify(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        block, tokens = block_of(inputs), inputs["tokens"]
        logits = self.runner.forward(self.runner.target, block, tokens)
        drafts = tokens[:, 1:] if tokens.shape[1] > 1 else None
        return tuple(verify_coupled(logits, drafts, block.draft_lengths, inputs["keys"]))

    # --- passes ----------------------------------------------------------------------------------------

    def block(self, rows: np.ndarray, draft_lengths: np.ndarray) -> tuple[Block, Tensor]:
        """Layout and noise keys of a pass over `rows`."""
        block = self.runner.block(self.backend.slots, rows, draft_lengths)
        samples = [self.backend.slots.samples[row] for row in rows.tolist()]
        base = torch.tensor(
            [sample.noise_key for sample in samples if sample is not None], device=self.backend.device
        )
        return block, row_keys(base, self.backend.weights.version, block.positions + 1)

    def draft(self, block: Block, keys: Tensor) -> Tensor:
        """Drafts [B, K] of a whole loop."""
        batch, steps = block.shape[0], block.shape[1] - 1
        inputs = {"keys": keys[:, :steps], **block_inputs(block, steps)}
        return self.pool.run(DRAFT, batch, steps, inputs)[0]

    def draft_by_token(self, block: Block, keys: Tensor) -> Tensor:
        """The same drafts, one pass per token."""
        drafted, fed = [], block.last_tokens
        for step in range(block.shape[1] - 1):
            at = slice(step, step + 1)
            inputs = {
                "last_tokens": fed,
                "draft_lengths": block.draft_lengths,
                "tables": block.tables,
                "positions": block.positions[:, at],
                "kv_rows": block.kv_rows[:, at],
                "keys": keys[:, at],
            }
            tokens = self.pool.run(DRAFT, block.shape[0], 1, inputs)[0].clone()
            drafted.append(tokens)
            fed = tokens[:, 0]
        return torch.cat(drafted, 1)

    def verify(self, block: Block, keys: Tensor, drafts: Tensor | None = None) -> Verdict:
        """The target's pass and its verdict, on the device."""
        tokens = block.last_tokens[:, None]
        if drafts is not None:
            tokens = torch.cat((tokens, drafts), 1)
        batch, width = tokens.shape
        inputs = {"tokens": tokens, "keys": keys, **block_inputs(block)}
        return Verdict(*self.pool.run(VERIFY if width > 1 else DECODE, batch, width, inputs))

    @property
    def draft_lengths(self) -> list[int]:
        """K of the planned draft loops, rising."""
        return sorted(
            kind.width for kind, sizes in self.pool.plan.buckets.items() if kind.mode == DRAFT and sizes
        )


def buckets(batches: Sequence[int], draft_lengths: Sequence[int]) -> dict[Kind, tuple[int, ...]]:
    """Plain decoding and every K at the given batch sizes."""
    kinds = [Kind(DECODE, 1)]
    for k in draft_lengths:
        kinds += [Kind(DRAFT, k), Kind(VERIFY, k + 1)]
    return dict.fromkeys(kinds, tuple(batches))


class Turns:
    """A policy that drafts the given lengths in turn, all sequences alike, and keeps what each pass took.

    Attributes:
        seconds: By draft length: drafting, and the whole pass, of every one but the first.
        timings: The same for `cost_model.fit`.
    """

    def __init__(self, draft_lengths: Sequence[int], rounds: int) -> None:
        self._order = [k for turn in range(rounds + 1) for k in draft_lengths[:: 1 if turn % 2 == 0 else -1]]
        self._warmup, self._next = len(draft_lengths), 0
        self.seconds: dict[int, list[tuple[float, float]]] = {k: [] for k in draft_lengths}
        self.timings: list[PassTiming] = []
        self.emitted: dict[int, list[float]] = {k: [] for k in draft_lengths}

    @property
    def done(self) -> bool:
        return self._next >= len(self._order)

    def plan(self, state: StepState) -> Plan:
        zeros = np.zeros(len(state.slots), np.int64)
        k = 0 if self.done else self._order[self._next]
        return Plan(zeros + k, zeros, state.drafters[0] if k else None, Reason.FIXED)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if self.done:
            return
        k, batch, kv_tokens = self._order[self._next], len(state.slots), int(state.lengths.sum())
        if self._next >= self._warmup:
            self.seconds[k].append((outcome.draft_seconds, outcome.seconds))
            self.emitted[k].append(float(outcome.emitted.mean()))
            self.timings.append(PassTiming(TARGET, batch, batch * (k + 1), kv_tokens, outcome.target_seconds))
            if k and plan.drafter is not None:
                seconds = outcome.draft_seconds / k
                self.timings.append(PassTiming(plan.drafter, batch, batch, kv_tokens, seconds))
        self._next += 1

    def after_update(self) -> None:
        pass

    def forget(self, slots: np.ndarray) -> None:
        pass


@dataclass(frozen=True)
class Rolled:
    """A rollout: its duration, passes, and draft tokens proposed and accepted."""

    seconds: float
    passes: int
    drafted: int
    accepted: int


class _Watched:
    """Counts what another policy does, and hides from it where each sequence will end: it sees one limit for all."""

    def __init__(self, policy: SpeculationPolicy, limit: int) -> None:
        self._policy, self._limit = policy, limit
        self.passes = self.drafted = self.accepted = 0

    def plan(self, state: StepState) -> Plan:
        plan = self._policy.plan(self._blind(state))
        return replace(plan, draft_lengths=np.minimum(plan.draft_lengths, state.allowed - 1))

    def _blind(self, state: StepState) -> StepState:
        return replace(state, allowed=self._limit - state.outputs)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        state = self._blind(state)
        self.passes += 1
        self.drafted += int(plan.draft_lengths.sum())
        self.accepted += int(outcome.accepted.sum())
        self._policy.observe(state, plan, outcome)

    def after_update(self) -> None:
        self._policy.after_update()

    def forget(self, slots: np.ndarray) -> None:
        self._policy.forget(slots)


def roll(
    lab: Lab,
    policy: SpeculationPolicy,
    known: Sequence[int],
    limits: Sequence[int],
    alpha: float,
    passes: Passes | None = None,
) -> Rolled:
    """Decode sequences of `known` tokens up to `limits`, with imposed acceptance.

    Args:
        lab: Where; its drafter is set.
        policy: Decides; a `Turns` ends the rollout when it is done.
        known, limits: Tokens per sequence.
        alpha: Imposed.
        passes: What runs the passes; None: the engine's own steps.
    """
    watched = _Watched(policy, int(np.subtract(limits, known).max()))
    rows = lab.occupy(known, limits)
    if lab.device.type == "cuda":
        torch.cuda.synchronize(lab.device)
    start = time.perf_counter()
    if passes is None:
        _engine_steps(lab, watched, policy, alpha)
    else:
        _graph_steps(lab, watched, policy, rows, alpha, passes)
    seconds = time.perf_counter() - start
    lab.clear()
    return Rolled(seconds, watched.passes, watched.drafted, watched.accepted)


def _engine_steps(lab: Lab, watched: _Watched, policy: SpeculationPolicy, alpha: float) -> None:
    backend = lab.backend
    before, backend.policy = backend.policy, watched
    try:
        with imposed(alpha):
            while backend.has_work and not (isinstance(policy, Turns) and policy.done):
                backend.step()
    finally:
        backend.policy = before


def _graph_steps(
    lab: Lab, watched: _Watched, policy: SpeculationPolicy, rows: np.ndarray, alpha: float, passes: Passes
) -> None:
    """What the engine does in a step, without the parts that a fixed batch does not need."""
    slots, clock = lab.backend.slots, _Clock(lab.device)
    drafters = () if passes.drafter is None else (passes.drafter.name,)
    while len(rows) and not (isinstance(policy, Turns) and policy.done):
        clock.start()
        lengths = slots.length[rows]
        outputs, allowed = lengths - slots.prompt_length[rows], slots.limit[rows] - lengths
        state = StepState(rows, lengths, outputs, allowed, drafters)
        plan = as_captured(watched.plan(state), passes.draft_lengths)
        block, keys = passes.block(rows, plan.draft_lengths)
        clock.start_drafting()
        drafts = passes.draft(block, keys) if plan.speculates else None
        clock.stop_drafting()
        verdict = passes.verify(block, keys, drafts)
        if drafts is not None:
            verdict = accept(verdict, block.draft_lengths, keys, alpha)
        tokens, emitted, accepted = (x.cpu().numpy() for x in verdict)
        logprobs = np.zeros((3, *tokens.shape), np.float32)
        slots.append(rows, tokens, emitted, logprobs)
        done = slots.length[rows] >= slots.limit[rows]
        drafting, seconds = clock.read()
        watched.observe(state, plan, StepOutcome(accepted, emitted, done, drafting, seconds - drafting))
        rows = rows[~done]


def as_captured(plan: Plan, draft_lengths: Sequence[int]) -> Plan:
    """The plan with drafts no longer than the longest captured loop that it fills."""
    if not plan.speculates:
        return plan
    longest = int(plan.draft_lengths.max())
    most = max((k for k in draft_lengths if k <= longest), default=0)
    if not most:
        return Plan.plain(len(plan.draft_lengths), plan.reason, plan.seconds)
    return replace(plan, draft_lengths=np.minimum(plan.draft_lengths, most))


class _Clock:
    """Seconds of a pass and of the drafting in it; drafting on CUDA by events, read when the device is idle."""

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        )
        self._start = self._drafting = self._drafted = 0.0

    def start(self) -> None:
        self._start = time.perf_counter()

    def start_drafting(self) -> None:
        self._drafting = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop_drafting(self) -> None:
        self._drafted = time.perf_counter() - self._drafting
        if self._events:
            self._events[1].record()

    def read(self) -> tuple[float, float]:
        total = time.perf_counter() - self._start
        return (self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._drafted), total
