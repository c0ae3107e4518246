"""A rollout watched while it runs: finished samples, tokens per second, acceptance, live batch.

On a terminal a table is redrawn in place; elsewhere (a log, a pipe) a plain line now and then.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from rollout_spec.contracts import SpecCounts
from rollout_spec.engine import RolloutEngine
from rollout_spec.torch_backend.slots import ACCEPTED, DRAFTED, PLAIN_STEPS, VERIFY_STEPS, Sample

POLLS_PER_SECOND = 5
FIRST_LOOK = 1e-3  # seconds between polls until samples are seen: all of them, before the first has finished
LINE_EVERY = 0.25  # of the samples, where lines are printed
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Progress:
    """One look at a rollout."""

    finished: int
    total: int
    tokens: int
    live: int
    spec: SpecCounts
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Meter:
    """Counts what an engine has sampled so far, finished or not.

    It reads the backend's arrays without the engine's lock, so that looking costs no step; a count can be one
    step old.
    """

    def __init__(self, engine: RolloutEngine, total: int) -> None:
        self._backend, self._total = engine.backend, total
        self._seen: dict[int, Sample] = {}
        self._start = time.perf_counter()

    @property
    def started(self) -> bool:
        """Whether samples have been seen."""
        return bool(self._seen)

    def read(self) -> Progress:
        """Look now."""
        backend = self._backend
        waiting = list(backend.scheduler.waiting)
        for sample in [*waiting, *backend.slots.samples]:
            if sample is not None:
                self._seen[id(sample)] = sample
        tokens, spec = 0, SpecCounts()
        for sample in list(self._seen.values()):
            count, row = self._of(sample)
            tokens += count
            spec += SpecCounts(
                drafted=int(row[DRAFTED]),
                accepted=int(row[ACCEPTED]),
                verify_steps=int(row[VERIFY_STEPS]),
                plain_steps=int(row[PLAIN_STEPS]),
            )
        finished = sum(sample.finish_reason is not None for sample in self._seen.values())
        live = len(backend.scheduler.running)
        return Progress(finished, self._total, tokens, live, spec, time.perf_counter() - self._start)

    def _of(self, sample: Sample) -> tuple[int, Any]:
        slot, slots = sample.slot, self._backend.slots
        if slot is None:
            return len(sample.output), sample.spec
        return int(slots.length[slot] - slots.prompt_length[slot]), slots.spec[slot]


class LiveRollouts:
    """Runs rollouts one after another and shows each of them, the earlier ones staying in sight.

    Args:
        console: Where to show them.
        names: Of the rollouts to come, in order.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        self._console = console
        self._rows: dict[str, Progress | None] = dict.fromkeys(names)
        self._printed: dict[str, float] = dict.fromkeys(names, 0.0)
        self._live: Live | None = None

    def shown(self) -> AbstractContextManager[Any]:
        """Context in which the table is redrawn; nothing on what is not a terminal."""
        if not self._console.is_terminal:
            return nullcontext()
        self._live = Live(console=self._console, get_renderable=self.table, auto_refresh=False)
        return self._live

    def run(self, name: str, engine: RolloutEngine, total: int, call: Callable[[], _Result]) -> _Result:
        """Run `call`, which makes the idle engine sample `total` completions, while a thread shows it.

        The engine stays on the caller's thread: OpenMP gives each thread that computes a team of its own, and two
        teams on the same cores slow each other down.
        """
        meter = Meter(engine, total)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1 / POLLS_PER_SECOND if meter.started else FIRST_LOOK):
                self._show(name, meter.read())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            result = call()
        finally:
            done.set()
            watcher.join()
        self._show(name, meter.read())
        return result

    def _show(self, name: str, progress: Progress) -> None:
        self._rows[name] = progress
        if self._live is not None:
            self._live.refresh()
            return
        share = progress.finished / progress.total
        if share >= self._printed[name] + LINE_EVERY:
            self._printed[name] = share - share % LINE_EVERY
            self._console.print(self._line(name, progress), highlight=False, soft_wrap=True)

    def _line(self, name: str, p: Progress) -> str:
        line = (
            f"{name}: {p.finished} of {p.total} samples, {p.tokens:,} tokens, {p.tokens_per_second:,.0f} tok/s, "
            f"{p.live} live, {p.seconds:.1f} s"
        )
        return (
            line
            if math.isnan(p.spec.tau)
            else f"{line}, acceptance {p.spec.acceptance:.2f}, tau {p.spec.tau:.2f}"
        )

    def table(self) -> Table:
        """The rollouts so far."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        table.add_column("")
        table.add_column("", ratio=1)
        for heading in ("samples", "tokens", "tok/s", "live", "accept", "tau", "time"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, progress in self._rows.items():
            table.add_row(*self._cells(name, progress))
        return table

    @staticmethod
    def _cells(name: str, p: Progress | None) -> list[Any]:
        if p is None:
            return [f"[dim]{name}", "", *[""] * 7]
        bar = ProgressBar(total=p.total, completed=p.finished)
        return [
            name,
            bar,
            f"{p.finished}/{p.total}",
            f"{p.tokens:,}",
            f"{p.tokens_per_second:,.0f}",
            str(p.live),
            number(p.spec.acceptance),
            number(p.spec.tau),
            f"{p.seconds:.1f} s",
        ]


def number(value: float, digits: int = 2) -> str:
    """A figure for people; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
