"""Rollouts that take turns: several engines work at what is to be compared, one at a time, a fraction of a second each.

Machines drift within seconds, and whole rollouts take longer than that. Cut into slices that alternate, they all meet
the same drift.

Each works in a thread of its own, for which torch's OpenMP runtime keeps helpers. If all such threads outnumber the
processors, asleep or not, the runtime no longer lets them spin where they wait for each other, and every pass takes
longer. So helpers are let go at the end of a turn.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from rollout_spec.engine import RolloutEngine
from rollout_spec.kernels.build import openmp_of_this_process
from rollout_spec.policy.baselines import Delegate
from rollout_spec.policy.records import Plan, SpeculationPolicy, StepOutcome, StepState

SLICE = 0.25  # seconds until the next one's turn
_OMP_PAUSE_SOFT = 1  # as in omp.h
T = TypeVar("T")


@dataclass(frozen=True)
class Work(Generic[T]):
    """What one engine has to do under a policy; `run` decodes by that engine alone."""

    engine: RolloutEngine
    policy: SpeculationPolicy
    run: Callable[[], T]


def in_turns(works: Sequence[Work[T]], slice_seconds: float = SLICE) -> list[tuple[float, T]]:
    """Do all of `works`; whoever has been at it for `slice_seconds` ends its pass and waits.

    Returns:
        Of each, the seconds of its turns and what `run` gave.
    """
    if len({id(work.engine) for work in works}) < len(works):
        raise ValueError("works share an engine: give each its own")
    turns, threads = _Turns(len(works), slice_seconds), torch.get_num_threads()
    _let_helpers_go()

    def do(place: int, work: Work[T]) -> T:
        torch.set_num_threads(threads)  # the number is each thread's own
        work.engine.backend.policy = _InTurns(work.policy, turns, place)
        turns.take(place)
        try:
            return work.run()
        finally:
            turns.leave(place)
            work.engine.backend.policy = work.policy

    with ThreadPoolExecutor(len(works)) as pool:
        done = [pool.submit(do, place, work) for place, work in enumerate(works)]
        results = [future.result() for future in done]
    return list(zip(turns.seconds, results, strict=True))


class _Turns:
    """Who may work now: the first in the queue.

    Attributes:
        seconds: That each has worked.
    """

    def __init__(self, count: int, slice_seconds: float) -> None:
        self._queue, self._slice = deque(range(count)), slice_seconds
        self._changed = threading.Condition()
        self._since = 0.0
        self.seconds = [0.0] * count

    def take(self, place: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue[0] == place)
            self._since = time.perf_counter()

    def pass_over(self, place: int) -> None:
        """Between two passes: let the others work if the time is up."""
        if time.perf_counter() - self._since >= self._slice and len(self._queue) > 1:
            self.leave(place, back=True)
            self.take(place)

    def leave(self, place: int, back: bool = False) -> None:
        with self._changed:
            self.seconds[place] += time.perf_counter() - self._since
            _let_helpers_go()
            self._queue.popleft()
            if back:
                self._queue.append(place)
            self._changed.notify_all()


def _let_helpers_go() -> None:
    """End the threads that the OpenMP runtime keeps for this one; the next pass starts new ones."""
    runtime = openmp_of_this_process()
    pause = runtime and getattr(ctypes.CDLL(runtime), "omp_pause_resource_all", None)
    if pause:
        pause(_OMP_PAUSE_SOFT)


class _InTurns(Delegate):
    """A policy whose engine waits for its turn where a pass ends, outside of what is timed of a pass."""

    def __init__(self, inner: SpeculationPolicy, turns: _Turns, place: int) -> None:
        super().__init__(inner)
        self._turns, self._place = turns, place

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        super().observe(state, plan, outcome)
        self._turns.pass_over(self._place)
