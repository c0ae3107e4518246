"""The worker's half of the spot trainer's protocol, as a state machine: when it may train, and what it tells.

It never trains and generates at once, and whoever needs the worker waits for one micro-batch at most, without asking
the coordinator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rollout_spec.adaptive.spot.messages import (
    Contribution,
    Evaluate,
    Evaluated,
    FromWorker,
    Hello,
    Payload,
    Publish,
    Report,
    Status,
    Stop,
    ToWorker,
    Train,
)

GUARDS = frozenset(
    {
        "epoch",  # an earlier coordinator's orders are void
        "version",  # and so is a drafter no newer than the one in force
        "seen",  # orders given in ignorance of the last report are void
        "micro_batch",  # generation waits for the end of the micro-batch under way
    }
)


@dataclass(frozen=True)
class Task:
    """What to do next, without a break: one micro-batch of training, or one shadow check.

    Attributes:
        order: What it belongs to.
        first: Take the order's state over before.
        last: Return the trainee's state after.
    """

    order: Train | Evaluate
    first: bool
    last: bool


@dataclass(frozen=True)
class Done:
    """How a task ended.

    Attributes:
        state: After the last micro-batch of an order: the trainee's.
        candidate, current, tokens, tensors: Of a shadow check, as in `Evaluated`.
        reason: Why it could not be done; ends the order.
    """

    state: Payload | None = None
    candidate: float = 0.0
    current: float | None = None
    tokens: int = 0
    tensors: Payload | None = None
    reason: str = ""


class Worker:
    """One worker's state.

    Args:
        name: Never used again after this worker's death.
        needed_bytes: What training takes beside the engine.
        version: Of the drafter in force; 0: none.
        guards: All of them; a test takes one away to see that it is needed.

    Attributes:
        free_bytes: Free beside the resident KV cache, as last measured; the runtime keeps it up to date.
        version: Of the drafter in force.
        status: What it is doing.
    """

    def __init__(
        self,
        name: str,
        needed_bytes: int = 0,
        free_bytes: int = 0,
        version: int = 0,
        *,
        guards: Collection[str] = GUARDS,
    ) -> None:
        self.name, self.needed_bytes, self.free_bytes, self.version = name, needed_bytes, free_bytes, version
        self.status = Status.IDLE
        self._wanted: Status | None = None  # what it is needed for, by its user
        self._epoch, self._number = 0, 0
        self._order: Train | Evaluate | None = None
        self._done = 0  # tasks of the order
        self._running: Task | None = None
        self._guards = guards

    @property
    def may_generate(self) -> bool:
        """Whether the engine may step now."""
        return self.status in (Status.GENERATING, Status.DRAINING)

    @property
    def at_rest(self) -> bool:
        """Whether no task is under way."""
        return self._running is None

    # --- from its user ---------------------------------------------------------------------------------

    def begin_work(self) -> list[FromWorker]:
        """It is needed: training ends with the task under way."""
        self._wanted = Status.GENERATING
        return self._change()

    def drain(self) -> list[FromWorker]:
        """Nothing more is waiting behind what it decodes."""
        self._wanted = Status.DRAINING
        return self._change()

    def end_work(self) -> list[FromWorker]:
        """It is not needed any more."""
        self._wanted = None
        return self._change()

    def halt(self) -> list[FromWorker]:
        """Void the order under way: the rollout is over, or the coordinator is gone."""
        return self._change()

    # --- from the coordinator --------------------------------------------------------------------------

    def accepts(self, message: Publish) -> bool:
        """Whether to put this drafter in force; when that is done, `receive` it."""
        current = message.epoch == self._epoch or "epoch" not in self._guards
        return current and (message.version > self.version or "version" not in self._guards)

    def receive(self, message: ToWorker) -> list[FromWorker]:
        """Take note of a message."""
        if isinstance(message, Hello):
            if message.epoch < self._epoch and "epoch" in self._guards:
                return []
            self._epoch = message.epoch
            return self._change()
        if message.epoch != self._epoch and "epoch" in self._guards:
            return []
        if isinstance(message, Publish):
            self.version = message.version
            return []
        if isinstance(message, Stop):
            return self._change()
        if message.seen == self._number or "seen" not in self._guards:
            self._order, self._done = message, 0
            self.status = Status.TRAINING
        return []

    # --- from its runtime ------------------------------------------------------------------------------

    def next_task(self) -> Task | None:
        """The next task of the order, now under way; None: nothing to do, or one is under way already."""
        if self._order is None or self._running is not None:
            return None
        last = isinstance(self._order, Evaluate) or self._done + 1 == self._order.micro_batches
        self._running = Task(self._order, self._done == 0, last)
        return self._running

    def task_done(self, done: Done) -> list[FromWorker]:
        """The task under way has ended."""
        task, self._running = self._running, None
        assert task is not None
        order = task.order
        place = self.name, order.epoch, order.round
        if order is not self._order:  # void since
            return self._change() if self.status is Status.PREEMPTING else []
        self._done += 1
        if not (task.last or done.reason):
            return []
        self._order = None
        self.status = Status.IDLE
        if isinstance(order, Train):
            return [Contribution(*place, None if done.reason else done.state, done.reason)]
        return [Evaluated(*place, done.candidate, done.current, done.tokens, done.tensors, done.reason)]

    def _change(self) -> list[FromWorker]:
        """Drop the order, do what is wanted as soon as nothing is under way, and report."""
        self._order = None
        self.status = self._wanted or Status.IDLE
        if self._running is not None and "micro_batch" in self._guards:
            self.status = Status.PREEMPTING
        self._number += 1
        figures = self.version, self.free_bytes, self.needed_bytes
        return [Report(self.name, self._epoch, self._number, self.status, *figures)]
