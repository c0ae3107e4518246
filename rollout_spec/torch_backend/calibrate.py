"""Measures passes of a backend: plain, drafting and verifying, at several batch sizes, contexts and draft lengths.

A context is random tokens, of which each sequence has a copy of its own in the cache and its own T=1 continuation; what is
timed is the whole pass, sampling and host work included. Configurations of one batch are interleaved, and their first round is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout_spec.contracts import SamplingParams
from rollout_spec.drafters.guard import DrafterGuard
from rollout_spec.drafters.history import History
from rollout_spec.kernels.library import kernels
from rollout_spec.observe.machine import cpu_model, installed_versions
from rollout_spec.policy.baselines import Off, Stateless
from rollout_spec.policy.cost_model import TARGET
from rollout_spec.policy.records import Matches, PassTiming, Plan, Reason, StepOutcome, StepState
from rollout_spec.sampling.noise import fold
from rollout_spec.torch_backend.slots import Sample

if TYPE_CHECKING:
    from rollout_spec.torch_backend.backend import TorchBackend

_MOST_ROWS = 640  # rows of one verify pass
_ROUNDS = 4  # the first warms up


@dataclass(frozen=True)
class Grid:
    """What to measure.

    Attributes:
        batches: Live sequences.
        contexts: Prompt tokens of each.
        draft_lengths: K; 0 is always measured too.
        seconds: Budget; configurations left when it is spent are dropped, the largest first.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    seconds: float


FULL = Grid((1, 2, 4, 8, 16, 32, 64, 128), (32, 256, 768), (1, 4, 10), 60.0)
BRIEF = Grid((1, 4, 16), (32, 256), (1, 5), 4.0)


def calibration_key(backend: TorchBackend) -> dict[str, Any]:
    """What the costs of this backend depend on."""
    drafter = backend.weights.drafter
    on_gpu = backend.device.type == "cuda"
    spec = {name: value for name, value in vars(backend.spec).items() if isinstance(value, (int, float, str))}
    return {
        "machine": torch.cuda.get_device_name(backend.device) if on_gpu else cpu_model()[0],
        "threads": None if on_gpu else torch.get_num_threads(),
        "model": spec,
        "dtype": str(backend.dtype),
        "drafter": drafter.name if drafter is not None else None,
        "verifier": "coupled" if backend.coupled else "rejection",
        **({} if backend.graphs is None else {"graphs": True}),
        **({} if on_gpu or (own := kernels()) is None else {"kernels": own.build}),
        "versions": {
            n: v for n, v in installed_versions().items() if n in ("torch", "rollout-spec", "bitsandbytes")
        },
    }


def measure(
    backend: TorchBackend, grid: Grid, progress: Callable[[str], None] = lambda _: None
) -> list[PassTiming]:
    """Time passes over the grid, as far as memory, context and the budget allow. The backend must be idle."""
    assert not backend.has_work, "calibration needs an idle backend"
    drafter = backend.weights.drafter
    names = [drafter.name] if drafter is not None else []
    timings: list[PassTiming] = []
    deadline = time.perf_counter() + grid.seconds
    with _undisturbed(backend):
        for batch, context in _configurations(backend, grid):
            if timings and time.perf_counter() > deadline:
                break
            progress(f"{batch} x {context} tokens")
            schedule = _Schedule(names, [k for k in grid.draft_lengths if batch * (k + 1) <= _MOST_ROWS])
            backend.policy = Off()
            samples = _samples(backend, batch, context)
            backend.policy = schedule
            while not schedule.done and backend.has_work:
                backend.step()
                if timings and time.perf_counter() > deadline + grid.seconds / 4:
                    break
            backend.abort(samples)
            timings += schedule.timings
    return timings


def _configurations(backend: TorchBackend, grid: Grid) -> Iterator[tuple[int, int]]:
    """(B, context) that fit, smallest batches first, so that a budget cuts the expensive ones."""
    room = _room(grid)
    for batch in grid.batches:
        for context in grid.contexts:
            blocks = -(-(context + room) // backend.config.block_size)
            fits = batch <= backend.slots.capacity and context + room <= backend.max_model_len
            if fits and batch * blocks <= backend.pool.available:
                yield batch, context


def _room(grid: Grid) -> int:
    return _ROUNDS * sum(k + 1 for k in (0, *grid.draft_lengths)) + 2


def _samples(backend: TorchBackend, batch: int, context: int) -> list[Sample]:
    """`batch` live samples of one random prompt: computed once, then copied, so that each reads memory of its own."""
    tokens = np.random.default_rng(context).integers(0, backend.spec.vocab_size, context)
    prompt = backend.scheduler.prompt(tokens)
    limit = min(backend.max_model_len, backend.kv_tokens)
    samples = [
        Sample("calibration", i, prompt, SamplingParams(ignore_eos=True), fold(context, i), limit, ())
        for i in range(batch)
    ]
    first = samples[0]
    backend.scheduler.submit(first)
    while first.slot is None or not len(backend.scheduler.ready()):
        backend.step()
    slots, slot = backend.slots, first.slot
    blocks = slots.tables[slot, : slots.num_blocks[slot]].tolist()
    written = slice(slots.prompt_length[slot], slots.length[slot])
    for sample in samples[1:]:
        sample.output = slots.tokens[slot, written].copy()
        sample.logprobs = slots.logprobs[:, slot, written].copy()
        own = backend.pool.allocate(len(blocks))
        for source, target in zip(blocks, own, strict=True):
            backend.cache.copy_block(source, target)
        backend.scheduler.adopt(sample, own)
        backend.assign(sample)
    return samples


class _Schedule(Stateless):
    """Goes through the draft lengths in turn, all sequences alike.

    Without a drafter history drafts, so that verify passes are measured all the same.
    """

    def __init__(self, drafters: Sequence[str], draft_lengths: Sequence[int]) -> None:
        self._drafter = drafters[0] if drafters else None
        self._lengths = [0, *draft_lengths] * _ROUNDS
        self._first = len(self._lengths) // _ROUNDS
        self._next = self._kv_tokens = 0
        self.timings: list[PassTiming] = []

    @property
    def done(self) -> bool:
        return self._next >= len(self._lengths)

    def plan(self, state: StepState) -> Plan:
        batch = len(state.slots)
        if self.done:
            return Plan.plain(batch, Reason.FIXED)
        length = self._lengths[self._next]
        zeros = np.zeros(batch, np.int64)
        if self._drafter is None:
            return Plan(zeros + length, zeros + length, None, Reason.FIXED)
        return Plan(zeros + length, zeros, self._drafter if length else None, Reason.FIXED)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if self.done:
            return
        batch = len(state.slots)
        if not self._next:
            self._kv_tokens = int(state.lengths.sum())  # it hardly grows while all this runs
        kv_tokens = self._kv_tokens
        wanted, drafted = self._lengths[self._next], int(plan.draft_lengths.max())
        if self._next >= self._first and drafted == wanted:
            rows = batch + int(plan.draft_lengths.sum())
            self.timings.append(PassTiming(TARGET, batch, rows, kv_tokens, outcome.target_seconds))
            if plan.drafter is not None:
                seconds = outcome.draft_seconds / drafted
                self.timings.append(PassTiming(plan.drafter, batch, batch, kv_tokens, seconds))
        self._next += 1


class _Nonsense(History):
    """Proposes token 0 for as long as one likes."""

    def __init__(self) -> None:
        super().__init__(max_tokens=1)

    def begin(
        self, slot: int, prompt: np.ndarray, output: np.ndarray | None = None, group: Hashable = None
    ) -> None:
        pass

    def extend(self, slots: np.ndarray, tokens: np.ndarray, emitted: np.ndarray) -> None:
        pass

    def finish(self, slot: int, keep: bool = True) -> None:
        pass

    def match(self, slots: np.ndarray, limits: np.ndarray) -> Matches:
        return Matches(limits, np.zeros(len(slots)))

    def propose(self, slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.zeros((len(slots), int(counts.max())), np.int64)


@contextmanager
def _undisturbed(backend: TorchBackend) -> Iterator[None]:
    """Keep what calibration would disturb: policy, guard, history, trace and counters."""
    kept = backend.policy, backend.guard, backend.history, backend.recorder, backend.adaptive
    counters = backend.spec_counters.copy(), backend.generated_tokens, replace(backend.times)
    guard = DrafterGuard(replace(backend.config.speculation, canary=False, canary_min_acceptance=0.0))
    backend.guard, backend.recorder, backend.adaptive = guard, None, None
    backend.history = _Nonsense() if backend.weights.drafter is None else None
    try:
        yield
    finally:
        backend.policy, backend.guard, backend.history, backend.recorder, backend.adaptive = kept
        backend.spec_counters, backend.generated_tokens, backend.times = counters
