"""A worker with its engine and trainee: carries out what the protocol's state machine says, and keeps the time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rollout_spec.adaptive.spot.messages import FromWorker, Payload, Publish, Status, ToWorker, Train
from rollout_spec.adaptive.spot.protocol import Engine, Tensors, Trainee
from rollout_spec.adaptive.spot.worker import Done, Task, Worker

logger = logging.getLogger("rollout_spec")


@dataclass
class SpotTimes:
    """Where a worker's idle time went, in seconds.

    Attributes:
        idle: Without work while a rollout was under way.
        used: Of it, in micro-batches and shadow checks.
        micro_batches: Each one's time, shadow checks left out.
        preemptions: From each need of a training worker to the end of its last task.
        losses: Of the micro-batches.
    """

    idle: float = 0.0
    used: float = 0.0
    micro_batches: list[float] = field(default_factory=list)
    preemptions: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Host:
    """Runs tasks and publishes, one thing at a time; tells the state machine about it.

    Args:
        name: The worker's; never used again after its death.
        engine: Not touched while a task runs, except to be published to.
        trainee: Only touched by tasks.
        fetch: From a payload to tensors.

    Attributes:
        worker: The state machine.
        times: What was measured.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        trainee: Trainee,
        fetch: Callable[[Payload], Tensors] = lambda payload: payload,
    ) -> None:
        self.engine, self.trainee, self.times = engine, trainee, SpotTimes()
        self.worker = Worker(name, trainee.bytes, engine.free_bytes)
        self._fetch = fetch
        self._in_force: Tensors | None = None
        self._until: Callable[[], bool] = lambda: False
        self._idle_since: float | None = None

    def receive(self, message: ToWorker) -> list[FromWorker]:
        """Take note of a message; a drafter is published at once."""
        self.worker.free_bytes = self.engine.free_bytes
        if isinstance(message, Publish) and not (self.worker.accepts(message) and self.publish(message)):
            return []
        return self.worker.receive(message)

    def publish(self, message: Publish) -> bool:
        """Put a drafter in force, or say why not and keep the one that is."""
        try:
            tensors = self._fetch(message.tensors)
            self.engine.publish(tensors, message.version)
        except Exception:
            what = "drafter version %d could not be published to %s; the one in force stays"
            logger.exception(what, message.version, self.worker.name)
            return False
        self._in_force = tensors
        return True

    def run(self, task: Task, until: Callable[[], bool] = lambda: False) -> Done:
        """Carry a task out; a shadow check, no longer than `until()`. An error of the trainee ends the order, not the worker."""
        start, self._until = time.perf_counter(), until
        try:
            return self._run(task)
        except Exception as error:
            logger.exception("a task of the spot trainer failed on %s", self.worker.name)
            return Done(reason=f"{type(error).__name__}: {error}")
        finally:
            seconds = time.perf_counter() - start
            if self._idle_since is not None:
                self.times.used += seconds
            if isinstance(task.order, Train):
                self.times.micro_batches.append(seconds)

    def _run(self, task: Task) -> Done:
        if task.first and task.order.state is not None:
            self.trainee.load(self._fetch(task.order.state))
        if isinstance(task.order, Train):
            loss = self.trainee.micro_step()
            if loss is None:
                return Done(reason="there are no samples to train on")
            self.times.losses.append(loss)
            return Done(state=self.trainee.state() if task.last else None)
        candidate = self.trainee.candidate()
        accepted, tokens = self.trainee.evaluate(candidate, self._needed)
        current = None
        if self._in_force is not None and not self._needed():
            current = self.trainee.evaluate(self._in_force, self._needed)[0]
        return Done(None, accepted, current, tokens, candidate if task.order.lead else None)

    def _needed(self) -> bool:
        """Whether the task under way is void: the state machine has said so, in another thread, or whoever runs it says so."""
        return self.worker.status is Status.PREEMPTING or self._until()

    # --- the clock -------------------------------------------------------------------------------------

    def idle_from_now(self) -> None:
        """The worker's share of a rollout is done."""
        self._idle_since = time.perf_counter()

    def idle_until_now(self) -> None:
        """It is needed again, or the rollout is over."""
        if self._idle_since is not None:
            self.times.idle += time.perf_counter() - self._idle_since
            self._idle_since = None

    def figures(self) -> dict[str, Any]:
        """`times`, and what follows from them, as JSON values."""
        times = self.times
        return {
            "idle_seconds": times.idle,
            "used_seconds": times.used,
            "used_share": times.used / times.idle if times.idle else None,
            "micro_batches": len(times.micro_batches),
            "micro_batch_seconds": percentiles(times.micro_batches),
            "preemption_seconds": percentiles(times.preemptions),
            "pid": os.getpid(),
            "last_loss": times.losses[-1] if times.losses else None,
            "version": self.worker.version,
        }


def percentiles(seconds: list[float]) -> dict[str, float | int]:
    """Count, median, 99th percentile (the smallest value that 99 % do not exceed) and maximum."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    p99 = ordered[-(-99 * len(ordered) // 100) - 1]
    return {"count": len(ordered), "p50": ordered[(len(ordered) - 1) // 2], "p99": p99, "max": ordered[-1]}
