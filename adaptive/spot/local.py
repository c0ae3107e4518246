"""The spot trainer in one process, without threads: one engine, trained for between its steps when it idles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from rollout_spec.adaptive.spot.checkpoint import claim_epoch, read_checkpoint, write_checkpoint
from rollout_spec.adaptive.spot.coordinator import Coordinator, SpotOptions
from rollout_spec.adaptive.spot.host import Host
from rollout_spec.adaptive.spot.messages import (
    Checkpoint,
    Found,
    FromWorker,
    RolloutBegan,
    RolloutOver,
    Save,
    Say,
    Status,
    ToCoordinator,
)
from rollout_spec.adaptive.spot.protocol import Engine, Trainee, mean

logger = logging.getLogger("rollout_spec")


class LocalSpot:
    """Trains on this thread, whenever it is given time.

    Args:
        engine: While it is busy nothing is trained.
        trainee: What is trained.
        options: How.
        folder: For checkpoints, and to go on from one; None: none are written.

    Attributes:
        host: The engine and trainee as a worker, with its times.
        coordinator: Of this one worker.
    """

    def __init__(
        self, engine: Engine, trainee: Trainee, options: SpotOptions | None = None, folder: Path | None = None
    ) -> None:
        self.host, self._folder = Host("local", engine, trainee), folder
        epoch, checkpoint = (claim_epoch(folder), read_checkpoint(folder)) if folder else (1, Checkpoint())
        self.coordinator = Coordinator(epoch, checkpoint, mean, options)
        self._tell(Found("local"))

    def train(self, until: Callable[[], bool]) -> int:
        """Train until `until()`, or there is nothing to do, or work comes.

        `until` is asked between micro-batches; a shadow check that it ends is void.

        Returns:
            Tasks carried out: micro-batches and shadow checks.
        """
        host, worker = self.host, self.host.worker

        def over() -> bool:
            return until() or host.engine.busy

        def void() -> bool:
            if over() and worker.status is not Status.PREEMPTING:
                self._answer(worker.halt())
            return worker.status is Status.PREEMPTING

        if host.engine.busy:
            return 0
        self._tell(RolloutBegan())
        self._answer(worker.end_work())
        host.idle_from_now()
        done = 0
        while not over():
            task = worker.next_task()
            if task is None:
                break
            self._answer(worker.task_done(host.run(task, void)))
            done += 1
        host.idle_until_now()
        self._tell(RolloutOver())
        return done

    def train_for(self, seconds: float) -> int:
        """Train for that long, and up to one micro-batch longer; nothing is published of checks that take longer."""
        end = time.perf_counter() + seconds
        return self.train(lambda: time.perf_counter() >= end)

    def _answer(self, messages: list[FromWorker]) -> None:
        for message in messages:
            self._tell(message)

    def _tell(self, message: ToCoordinator) -> None:
        for command in self.coordinator.handle(message):
            if isinstance(command, Save):
                if self._folder is not None:
                    write_checkpoint(self._folder, command.checkpoint)
            elif isinstance(command, Say):
                logger.info("%s", command.text)
            else:
                self._answer(self.host.receive(command.message))
