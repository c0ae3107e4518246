"""Times a decode pass."""

from __future__ import annotations

import time

import torch


class PassClock:
    """Times one pass and the drafting in it; on CUDA by events, read after the pass has synchronised.

    Attributes:
        decided: Seconds from the start to the plan.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        )
        self._start = self._drafting = time.perf_counter()
        self._drafted = self.decided = 0.0

    def stop_deciding(self) -> None:
        self.decided = time.perf_counter() - self._start

    def start_drafting(self) -> None:
        self._drafting = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop_drafting(self) -> None:
        self._drafted = time.perf_counter() - self._drafting
        if self._events:
            self._events[1].record()

    def read(self) -> tuple[float, float]:
        """Seconds of drafting and of the whole pass so far; the device must be idle."""
        total = time.perf_counter() - self._start
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3, total
        return self._drafted, total
