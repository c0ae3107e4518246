"""The spot trainer's protocol as a finite system: the real state machines, lossless channels, and a hostile runtime.

`explore` walks through every interleaving of deliveries, work, micro-batches, deaths and restarts, checks what must
always hold, and that everything can still end well from every state.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rollout_spec.adaptive.spot import coordinator as coordinator_module
from rollout_spec.adaptive.spot import worker as worker_module
from rollout_spec.adaptive.spot.coordinator import Coordinator, SpotOptions
from rollout_spec.adaptive.spot.messages import (
    Checkpoint,
    Command,
    Evaluate,
    Found,
    Lost,
    Publish,
    RolloutBegan,
    RolloutOver,
    Save,
    Send,
    Train,
)
from rollout_spec.adaptive.spot.worker import Done, Worker


class Violation(Exception):
    """Something that must not happen happened."""


@dataclass(frozen=True)
class Params:
    """What a trainee's parameters are: those agreed on by a coordinator after so many rounds, and batches since."""

    epoch: int = 0
    step: int = 0
    micro: int = 0


@dataclass(frozen=True)
class Setting:
    """A small world.

    Attributes:
        work: Shares of work per worker.
        steps: Rounds trained before nothing more is.
        micro_batches: Per round.
        rollouts: How many.
        patient: The last rollout ends only when all rounds are trained; otherwise at any time.
        worker_deaths, coordinator_deaths: How many at most.
        too_large: The second worker has no memory for training.
    """

    work: tuple[int, ...] = (0, 1)
    steps: int = 1
    micro_batches: int = 1
    rollouts: int = 1
    patient: bool = True
    worker_deaths: int = 0
    coordinator_deaths: int = 0
    too_large: bool = False


def mean(states: list[Params]) -> Params:
    """Contributions count only if they grew from the same state by the same number of batches."""
    if len(set(states)) != 1:
        raise Violation(f"different parameters were averaged: {states}")
    return replace(states[0], step=states[0].step + 1, micro=0)


@dataclass
class World:
    """One state of everything."""

    setting: Setting
    guards: frozenset[str]
    coordinator: Coordinator | None
    workers: dict[str, Worker]
    params: dict[str, Params]
    engines: dict[str, tuple[int, Params | None]]
    work: dict[str, int]
    down: dict[tuple[int, str], tuple[Any, ...]] = field(default_factory=dict)  # (epoch, worker): messages
    up: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    mourned: tuple[str, ...] = ()  # dead, and the coordinator has not been told
    saved: Checkpoint = field(default_factory=Checkpoint)
    saving: Checkpoint | None = None
    judged: tuple[int, int, Params] | None = None  # epoch, round, parameters
    epoch: int = 0
    open: bool = False
    rollouts: int = 0
    worker_deaths: int = 0
    coordinator_deaths: int = 0
    spare_names: tuple[str, ...] = ("y", "z")

    def copy(self) -> World:
        new = copy.copy(self)
        for name in ("workers", "params", "engines", "work", "down", "up"):
            setattr(new, name, dict(getattr(self, name)))
        return new

    def own(self, name: str) -> Worker:
        """The worker, for changing."""
        self.workers[name] = worker = copy.copy(self.workers[name])
        return worker

    def key(self) -> Any:
        values = [_frozen(value) for name, value in vars(self).items() if name not in ("setting", "guards")]
        return tuple(values)

    # --- effects ---------------------------------------------------------------------------------------

    def tell(self, message: Any) -> None:
        """Hand the coordinator a message and carry its commands out."""
        if self.coordinator is None:
            return
        coordinator = self.coordinator = copy.copy(self.coordinator)
        coordinator.views, coordinator._answers = dict(coordinator.views), dict(coordinator._answers)
        for command in coordinator.handle(message):
            self.carry_out(command)
        coordinator._commands = []
        if coordinator._state is not None and coordinator._state.step != coordinator.step:
            raise Violation(
                f"the agreed state of step {coordinator._state.step} passes for {coordinator.step}"
            )

    def carry_out(self, command: Command) -> None:
        if isinstance(command, Save):
            if self.setting.coordinator_deaths:
                self.saving = command.checkpoint
        elif isinstance(command, Send):
            message = command.message
            if isinstance(message, (Train, Evaluate)):
                if not self.open:
                    raise Violation("training was ordered outside a rollout")
                worker = self.workers.get(command.worker)
                if worker is not None and worker.needed_bytes > worker.free_bytes:
                    raise Violation("training was ordered where it does not fit")
            if isinstance(message, Publish) and message.tensors.step % 2 == 0:
                raise Violation("a drafter was published that is no better")
            place = message.epoch, command.worker
            if command.worker in self.workers:
                self.down[place] = (*self.down.get(place, ()), message)

    def send_up(self, name: str, messages: list[Any]) -> None:
        if messages:
            self.up[name] = (*self.up.get(name, ()), *messages)

    def publish(self, name: str, message: Publish) -> None:
        version, _ = self.engines[name]
        if message.version <= version:
            raise Violation(f"version {message.version} was published over {version}")
        if message.tensors.micro:
            raise Violation("what was published is no agreed state")
        for other, (there, tensors) in self.engines.items():
            if other != name and there == message.version and tensors != message.tensors:
                raise Violation(f"two drafters are both called version {there}")
        self.engines[name] = message.version, message.tensors

    def carry_out_task(self, name: str, worker: Worker) -> Done:
        task = worker._running
        assert task is not None
        order = task.order
        if task.first:
            self.params[name] = order.state if order.state is not None else Params()
        params = self.params[name]
        if isinstance(order, Train):
            self.params[name] = params = replace(params, epoch=params.epoch, micro=params.micro + 1)
            return Done(state=params if task.last else None)
        if worker._order is order:
            found = self.judged
            if found is not None and found[:2] == (order.epoch, order.round) and found[2] != params:
                raise Violation(f"{found[2]} and {params} were judged as one drafter")
            self.judged = order.epoch, order.round, params
        better = params.step % 2 == 1
        return Done(
            candidate=1.0 if better else 0.4,
            current=0.5,
            tokens=1,
            tensors=replace(params, epoch=order.epoch) if order.lead else None,
        )

    def drop(self, name: str) -> None:
        for table in (self.workers, self.params, self.engines, self.work):
            table.pop(name)  # type: ignore[attr-defined]
        self.down = {place: queue for place, queue in self.down.items() if place[1] != name}

    def new_worker(self, name: str, work: int) -> None:
        needed = 2 if self.setting.too_large and name == "b" else 0
        self.workers[name] = Worker(name, needed, 1, guards=self.guards)
        self.params[name], self.engines[name], self.work[name] = Params(), (0, None), work
        self.tell(Found(name))

    def new_coordinator(self) -> None:
        self.epoch += 1
        options = SpotOptions(micro_batches=self.setting.micro_batches, publish_every=1, patience=9)
        self.coordinator = Coordinator(self.epoch, self.saved, mean, options, guards=self.guards)
        for name in sorted(self.workers):
            self.tell(Found(name))
        if self.open:
            self.tell(RolloutBegan())

    # --- what may happen next --------------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        setting, coordinator = self.setting, self.coordinator
        for place in self.down:
            yield f"deliver to {place[1]}", lambda world, place=place: world.deliver_down(place)
        for name, worker in self.workers.items():
            if self.work[name] and self.open and not worker._wanted:
                yield f"work for {name}", lambda world, name=name: world.begin(name)
            if worker.may_generate:
                yield f"{name} finishes", lambda world, name=name: world.finish(name)
            order = worker._order
            enough = (
                isinstance(order, Train) and order.state is not None and order.state.step >= setting.steps
            )
            if order is not None and worker.at_rest and not enough:
                yield f"{name} starts a task", lambda world, name=name: world.start(name)
            if not worker.at_rest:
                yield f"{name} ends a task", lambda world, name=name: world.end(name)
            if self.worker_deaths < setting.worker_deaths and self.open:
                yield f"{name} dies", lambda world, name=name: world.kill(name)
        for name in self.mourned:
            yield f"{name} is replaced", lambda world, name=name: world.replace(name)
        if coordinator is None:
            yield "a new coordinator", World.new_coordinator
        else:
            for name in self.up:
                yield f"deliver from {name}", lambda world, name=name: world.deliver_up(name)
            if self.coordinator_deaths < setting.coordinator_deaths and self.open:
                yield "the coordinator dies", World.kill_coordinator
            if self.saving is not None:
                yield "saved", World.finish_save
            if not self.open and self.rollouts < setting.rollouts:
                yield "a rollout begins", World.begin_rollout
            final = self.rollouts == setting.rollouts
            trained = coordinator.step >= setting.steps or not setting.patient or not final
            if self.open and trained and self.worked:
                yield "the rollout is over", World.end_rollout

    @property
    def worked(self) -> bool:
        if self.rollouts < self.setting.rollouts:
            return not any(worker._wanted for worker in self.workers.values())
        return not any(self.work.values()) and not any(worker._wanted for worker in self.workers.values())

    @property
    def all_done(self) -> bool:
        return (
            self.coordinator is not None
            and not (self.open or self.up or self.down or self.mourned or self.saving)
            and self.rollouts == self.setting.rollouts
            and self.worked
            and all(worker.at_rest and worker._order is None for worker in self.workers.values())
            and self.coordinator.quiet
        )

    def deliver_down(self, place: tuple[int, str]) -> None:
        message, *rest = self.down[place]
        _put(self.down, place, rest)
        name = place[1]
        worker = self.own(name)
        if isinstance(message, Publish):
            if not worker.accepts(message):
                return
            self.publish(name, message)
        self.send_up(name, worker.receive(message))

    def deliver_up(self, name: str) -> None:
        message, *rest = self.up[name]
        _put(self.up, name, rest)
        self.tell(message)

    def begin(self, name: str) -> None:
        self.work[name] -= 1
        self.send_up(name, self.own(name).begin_work())

    def finish(self, name: str) -> None:
        self.send_up(name, self.own(name).end_work())

    def start(self, name: str) -> None:
        self.own(name).next_task()

    def end(self, name: str) -> None:
        worker = self.own(name)
        self.send_up(name, worker.task_done(self.carry_out_task(name, worker)))

    def kill(self, name: str) -> None:
        self.worker_deaths += 1
        self.drop(name)
        self.mourned += (name,)

    def replace(self, name: str) -> None:
        self.mourned = tuple(other for other in self.mourned if other != name)
        self.tell(Lost(name))
        new, *rest = self.spare_names
        self.spare_names = tuple(rest)
        self.new_worker(new, 0)

    def kill_coordinator(self) -> None:
        self.coordinator_deaths += 1
        self.coordinator, self.saving = None, None

    def finish_save(self) -> None:
        assert self.saving is not None
        self.saved, self.saving = self.saving, None

    def begin_rollout(self) -> None:
        self.open = True
        self.rollouts += 1
        self.tell(RolloutBegan())

    def end_rollout(self) -> None:
        self.open = False
        self.tell(RolloutOver())

    def check(self) -> None:
        for name, worker in self.workers.items():
            if worker.may_generate and not worker.at_rest:
                raise Violation(f"{name} trains and generates at once")


def start(setting: Setting, guards: frozenset[str]) -> World:
    """All have met, a rollout is under way, and the first worker is busy with it if it has work."""
    world = World(setting, guards, None, {}, {}, {}, {}, open=True, rollouts=1)
    for name, work in zip("abc", setting.work, strict=False):
        world.new_worker(name, work)
    if world.work["a"]:
        world.begin("a")
    world.new_coordinator()
    while world.down or world.up:
        for place in list(world.down):
            if isinstance(world.down[place][0], (Train, Evaluate)):
                return world
            world.deliver_down(place)
        for name in list(world.up):
            world.deliver_up(name)
    return world


def explore(setting: Setting, without: str = "", limit: int = 200_000) -> int:
    """Look at every reachable state; how many there are.

    Raises:
        Violation: Something is wrong; with the shortest way there.
    """
    guards = (coordinator_module.GUARDS | worker_module.GUARDS) - {without}
    first = start(setting, guards)
    index = {first.key(): 0}
    origins: list[tuple[int, str]] = [(0, "")]
    before: list[list[int]] = [[]]
    finished = []
    queue = deque([first])
    number = -1
    while queue:
        world = queue.popleft()
        number += 1
        if world.all_done:
            finished.append(number)
        for name, move in world.moves():
            if len(origins) > limit:
                raise RuntimeError(f"more than {limit} states")
            after = world.copy()
            try:
                move(after)
                after.check()
            except Exception as error:
                raise Violation(f"{type(error).__name__} {error}: {_way(origins, number)}, {name}") from error
            key = after.key()
            known = index.get(key)
            if known is None:
                known = index[key] = len(origins)
                origins.append((number, name))
                before.append([])
                queue.append(after)
            before[known].append(number)
    able = set(finished)
    pending = list(finished)
    while pending:
        for origin in before[pending.pop()]:
            if origin not in able:
                able.add(origin)
                pending.append(origin)
    stuck = next((state for state in range(len(origins)) if state not in able), None)
    if stuck is not None:
        raise Violation(f"deadlock: {_way(origins, stuck)}")
    return len(origins)


def _way(origins: list[tuple[int, str]], state: int) -> str:
    names = []
    while state:
        state, name = origins[state]
        names.append(name)
    return ", ".join(reversed(names))


def _put(table: dict[Any, tuple[Any, ...]], place: Any, rest: list[Any]) -> None:
    if rest:
        table[place] = tuple(rest)
    else:
        del table[place]


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, (Coordinator, Worker)):
        skipped = ("options", "_mean", "_guards", "_commands")
        return tuple(_frozen(item) for name, item in vars(value).items() if name not in skipped)
    return value
