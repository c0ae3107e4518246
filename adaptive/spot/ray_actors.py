"""The spot trainer's coordinator and workers as Ray actors; `group` is the handle on them.

An actor's event loop runs the state machine; generation, micro-batches and publication run in threads of it, never two
of the first two at once. Each side notices the other's death by a call that never returns otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from rollout_spec.adaptive.spot.checkpoint import claim_epoch, read_checkpoint, write_checkpoint
from rollout_spec.adaptive.spot.coordinator import Coordinator, SpotOptions
from rollout_spec.adaptive.spot.host import Host
from rollout_spec.adaptive.spot.messages import (
    Checkpoint,
    Evaluate,
    Found,
    FromWorker,
    Lost,
    Payload,
    Publish,
    Save,
    Say,
    ToCoordinator,
    ToWorker,
    Train,
)
from rollout_spec.adaptive.spot.protocol import Generator, Tensors, Trainee, mean

logger = logging.getLogger("rollout_spec")

MakeEngine = Callable[[], Generator]
MakeTrainee = Callable[[Generator], Trainee]


def _fetch(payload: Payload) -> Tensors:
    tensors: Tensors = ray.get(payload) if isinstance(payload, ray.ObjectRef) else payload
    return tensors


class _Alive:
    """Lets others see when this actor dies."""

    async def lifetime(self) -> None:
        """Never returns; the call fails when the actor dies."""
        await asyncio.Event().wait()


class SpotWorker(_Alive):
    """A rollout worker that trains while it idles.

    Args:
        name: Never used again after its death.
        make_engine, make_trainee: Called here, on the worker.
        threads: CPU threads.
        weights, version: The policy, if it is not the one that `make_engine` begins with.
    """

    def __init__(
        self,
        name: str,
        make_engine: MakeEngine,
        make_trainee: MakeTrainee,
        threads: int,
        weights: Tensors | None = None,
        version: int = 0,
    ) -> None:
        torch.set_num_threads(threads)
        self._engine = make_engine()
        if weights is not None:
            self._engine.update(weights, version)
        self._host = Host(name, self._engine, make_trainee(self._engine), _fetch)
        self._worker = self._host.worker
        self._coordinator: Any = None
        self._shares = 0
        self._orders, self._rested = asyncio.Event(), asyncio.Event()
        self._rested.set()
        self._inbox = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    async def follow(self, coordinator: Any) -> None:
        """Report to this coordinator from now on, until it dies."""
        if not self._background:
            self._spawn(self._train())
        self._coordinator = coordinator
        self._spawn(self._watch(coordinator))

    async def receive(self, message: ToWorker) -> None:
        """Take note of a message of the coordinator, in the order sent."""
        async with self._inbox:
            self._worker.free_bytes = self._engine.free_bytes
            if isinstance(message, Publish) and not await self._publish(message):
                return
            self._report(self._worker.receive(message))
        self._orders.set()

    async def claim(self) -> None:
        """Keep it for generation; returns when it does not train."""
        start, training = time.perf_counter(), not self._worker.at_rest
        self._host.idle_until_now()
        self._report(self._worker.begin_work())
        await self._rested.wait()
        if training:
            self._host.times.preemptions.append(time.perf_counter() - start)

    async def generate(self, share: Any) -> Any:
        """Answer a share of the rollout; the worker is idle when it has answered all it was given."""
        self._shares += 1
        try:
            if not self._worker.may_generate:
                await self.claim()
            loop = asyncio.get_running_loop()

            def draining() -> None:
                loop.call_soon_threadsafe(self._drain)

            return await asyncio.to_thread(self._engine.generate, share, draining)
        finally:
            self._shares -= 1
            if not self._shares:
                self._host.idle_from_now()
                self._report(self._worker.end_work())

    async def update_weights(self, weights: Tensors, version: int) -> None:
        """Put a policy in force; called between rollouts, when the worker is at rest."""
        await asyncio.to_thread(self._engine.update, weights, version)

    async def rest(self) -> None:
        """The rollout is over; returns when the device is free."""
        start, training = time.perf_counter(), not self._worker.at_rest
        self._host.idle_until_now()
        self._report(self._worker.halt())
        await self._rested.wait()
        if training:
            self._host.times.preemptions.append(time.perf_counter() - start)

    async def figures(self) -> dict[str, Any]:
        """Idle time seen and used, latencies in seconds, and the drafter's version."""
        return self._host.figures()

    # --- inside ----------------------------------------------------------------------------------------

    async def _publish(self, message: Publish) -> bool:
        accepted = self._worker.accepts(message)
        return accepted and await asyncio.to_thread(self._host.publish, message)

    def _drain(self) -> None:
        if self._shares == 1 and self._worker.may_generate:
            self._report(self._worker.drain())

    async def _train(self) -> None:
        while True:
            await self._orders.wait()
            self._orders.clear()
            while (task := self._worker.next_task()) is not None:
                self._rested.clear()
                done = await asyncio.to_thread(self._host.run, task)
                self._report(self._worker.task_done(done))
                self._rested.set()
                await asyncio.sleep(0)

    async def _watch(self, coordinator: Any) -> None:
        try:
            await coordinator.lifetime.remote()
        except ray.exceptions.RayActorError:
            if self._coordinator is coordinator:
                self._coordinator = None
                self._worker.halt()
                logger.warning("the spot trainer's coordinator died; %s goes on without", self._worker.name)

    def _report(self, messages: list[FromWorker]) -> None:
        for message in messages:
            if self._coordinator is not None:
                self._coordinator.tell.remote(message)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


class SpotCoordinator(_Alive):
    """Runs the coordinator's state machine, and writes its checkpoints.

    Args:
        folder: For checkpoints and epochs; outlives the actor.
        options: How to train.
    """

    def __init__(self, folder: str, options: SpotOptions) -> None:
        self._folder = Path(folder)
        epoch = claim_epoch(self._folder)
        self._coordinator = Coordinator(epoch, read_checkpoint(self._folder), mean, options)
        self._workers: dict[str, Any] = {}
        self._said: list[str] = []
        self._shared: list[tuple[Tensors, Any]] = []  # what was sent last, and its reference
        self._unsaved: Checkpoint | None = None
        self._writer: asyncio.Task[None] | None = None
        self._watches: set[asyncio.Task[None]] = set()

    async def found(self, name: str, worker: Any) -> None:
        """There is such a worker, and it follows this coordinator."""
        self._workers[name] = worker
        watch = asyncio.get_running_loop().create_task(self._watch(name, worker))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        await self.tell(Found(name))

    async def tell(self, message: ToCoordinator) -> None:
        """Hand the state machine a message, and carry its commands out."""
        for command in self._coordinator.handle(message):
            if isinstance(command, Save):
                self._unsaved = command.checkpoint
                if self._writer is None:
                    self._writer = asyncio.get_running_loop().create_task(self._write())
            elif isinstance(command, Say):
                self._said.append(command.text)
                logger.info("%s", command.text)
            elif command.worker in self._workers:
                self._workers[command.worker].receive.remote(self._by_reference(command.message))

    async def figures(self) -> dict[str, Any]:
        """Epoch, phase, rounds agreed on, version in force, workers, and all that was said."""
        machine = self._coordinator
        return {
            "pid": os.getpid(),
            "epoch": machine.epoch,
            "phase": machine.phase.value,
            "step": machine.step,
            "version": machine.version,
            "workers": sorted(machine.views),
            "said": list(self._said),
        }

    # --- inside ----------------------------------------------------------------------------------------

    async def _watch(self, name: str, worker: Any) -> None:
        try:
            await worker.lifetime.remote()
        except ray.exceptions.RayActorError:
            self._workers.pop(name, None)
            await self.tell(Lost(name))

    async def _write(self) -> None:
        try:
            while (checkpoint := self._unsaved) is not None:
                self._unsaved = None
                try:
                    await asyncio.to_thread(write_checkpoint, self._folder, checkpoint)
                except Exception:
                    what = "the spot trainer's checkpoint of step %d could not be written to %s; the next will be tried"
                    logger.exception(what, checkpoint.step, self._folder)
        finally:
            self._writer = None

    def _by_reference(self, message: ToWorker) -> ToWorker:
        """Tensors are put into the object store once, whoever they are sent to."""
        if isinstance(message, (Train, Evaluate)) and message.state is not None:
            return replace(message, state=self._reference(message.state))
        if isinstance(message, Publish):
            return replace(message, tensors=self._reference(message.tensors))
        return message

    def _reference(self, tensors: Tensors) -> Any:
        for known, reference in self._shared:
            if known is tensors:
                return reference
        reference = ray.put(tensors)
        self._shared = [*self._shared[-3:], (tensors, reference)]
        return reference
