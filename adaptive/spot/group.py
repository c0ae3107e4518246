"""Workers that train a drafter while they idle, as seen by a trainer: rollouts in, completions out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from torch import Tensor

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.messages import RolloutBegan, RolloutOver
from rollout_spec.adaptive.spot.protocol import SpotError
from rollout_spec.adaptive.spot.ray_actors import MakeEngine, MakeTrainee, SpotCoordinator, SpotWorker
from rollout_spec.contracts import RolloutSpecError, WeightError, invalid

LOSSES = 3
"""A place that has lost this many workers in one rollout is given up, and so is the coordinator's."""
_LOST = (RayActorError, ObjectLostError, SpotError)  # or silent
_COORDINATOR = "the coordinator"


class SpotGroup:
    """A trainer's handle on spot-training workers: rollouts in, completions out, whoever dies meanwhile.

    Args:
        workers: How many.
        make_engine, make_trainee: Called on each worker.
        folder: For checkpoints; every node sees it that may run the coordinator.
        options: How to train.
        threads: CPU threads per worker.
        resources: Ray's options for each worker, such as `{"num_gpus": 1}`.
        timeout: Seconds after which a rollout fails if no share is answered. Who does not answer is replaced.

    Attributes:
        workers, coordinator: Handles of the actors alive, as far as is known.
        deaths: How often an actor was replaced.

    Raises:
        InvalidRequest: An argument is out of range.
        SpotError: A worker or the coordinator could not start.
    """

    def __init__(
        self,
        workers: int,
        make_engine: MakeEngine,
        make_trainee: MakeTrainee,
        folder: str | Path,
        options: SpotOptions | None = None,
        threads: int = 1,
        resources: dict[str, Any] | None = None,
        timeout: float = 1800.0,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise invalid("workers", workers, "use an integer >= 1")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise invalid("timeout", timeout, "use a number of seconds > 0")
        self._make = make_engine, make_trainee, threads
        self._folder, self._options = str(folder), options or SpotOptions()
        self._resources = resources or {"num_cpus": 1}
        self.timeout = timeout
        self._open, self._made, self.deaths = False, 0, 0
        self._losses: Counter[int | str] = Counter()  # by place, since the last call began
        self._policy: tuple[Any, ...] = ()
        self.workers: list[Any] = [None] * workers
        self._names = [""] * workers
        self._lives: list[Any] = [None] * workers
        for place in range(workers):
            self._start_worker(place)
        self._start_coordinator()
        started = [actor.figures.remote() for actor in (self.coordinator, *self.workers)]
        for name, error in zip((_COORDINATOR, *self._names), self._errors(started)):
            if error is not None:
                self.shutdown()
                raise SpotError(f"{name} could not start: {_reason(error)}") from error

    def rollout(
        self, shares: Iterable[Any], meanwhile: Callable[[], None] = lambda: None, interval: float = 0.25
    ) -> list[Any]:
        """Have each worker answer its share; a dead worker's is answered anew by the one that replaces it.

        However it ends, training has ended then, too.

        Args:
            shares: One per worker.
            meanwhile: Called every `interval` seconds.

        Returns:
            Each share's answer, once, in order.

        Raises:
            InvalidRequest: There are more or fewer shares than workers.
            SpotError: A place has lost several workers, or no share was answered within `timeout`.
        """
        waiting = list(shares)
        if len(waiting) != len(self.workers):
            raise invalid("shares", len(waiting), f"give {len(self.workers)}, one for each worker")
        self._losses.clear()
        try:
            self._mend(self._each("claim"))
            self._open = True
            self.coordinator.tell.remote(RolloutBegan())
            answers = self._answers(waiting, meanwhile, interval)
        finally:
            self._open = False
            last_word = self.coordinator.tell.remote(RolloutOver())  # no order is given after this
            (over,) = self._errors([last_word])
            rested = self._each("rest")
        if over is not None:
            self._replace_coordinator(over)
        self._mend(rested)
        return answers

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Put a policy in force on every worker, and on those that replace them; not during a rollout.

        If it fails anywhere, the one before stays in force everywhere: workers that may have taken it are replaced.

        Raises:
            WeightError: Something does not fit; all workers refuse it.
        """
        self._losses.clear()
        policy = ray.put(dict(weights)), version
        errors = self._each("update_weights", *policy)
        failed = [error for error in errors.values() if error is not None and not isinstance(error, _LOST)]
        if failed:
            for place, name in enumerate(list(self._names)):
                if not isinstance(errors[name], WeightError):
                    self._restart(place)
            raise failed[0]
        self._policy = policy
        self._mend(errors)

    def heal(self) -> None:
        """Replace the actors that have died.

        Raises:
            SpotError: One place has lost several of them.
        """
        if (error := self._end(self._life)) is not None:
            self._replace_coordinator(error)
        for place, life in enumerate(self._lives):
            if (error := self._end(life)) is not None:
                self._replace(place, error)

    def figures(self) -> dict[str, Any]:
        """The coordinator's, and each worker's by name."""
        calls = [actor.figures.remote() for actor in (self.coordinator, *self.workers)]
        coordinator, *workers = ray.get(calls, timeout=self.timeout)
        return {"coordinator": coordinator, "workers": dict(zip(self._names, workers))}

    def shutdown(self) -> None:
        """End all actors."""
        for actor in (self.coordinator, *self.workers):
            ray.kill(actor)

    # --- inside ----------------------------------------------------------------------------------------

    def _answers(self, waiting: list[Any], meanwhile: Callable[[], None], interval: float) -> list[Any]:
        answers: dict[int, Any] = {}
        pending: dict[Any, tuple[int, str]] = {}

        def ask(place: int) -> None:
            pending[self._ask(place, waiting[place])] = place, self._names[place]

        for place in range(len(waiting)):
            ask(place)
        last = time.monotonic()
        while pending:
            ready, _ = ray.wait(list(pending), timeout=interval)
            meanwhile()
            self.heal()
            if ready:
                last = time.monotonic()
            elif time.monotonic() - last > self.timeout:
                for place, _ in pending.values():
                    self._restart(place)
                remedy = f"{len(pending)} were in flight; raise timeout, or look at the workers' logs"
                raise SpotError(f"no share was answered within timeout={self.timeout:g} s: {remedy}")
            for reference in ready:
                place, name = pending.pop(reference)
                try:
                    answers[place] = ray.get(reference, timeout=self.timeout)
                except _LOST as error:
                    if self._names[place] == name:  # else that is done
                        self._replace(place, error)
                    ask(place)
        return [answers[place] for place in range(len(waiting))]

    def _ask(self, place: int, share: Any) -> Any:
        return self.workers[place].generate.remote(share)

    def _each(self, method: str, *arguments: Any) -> dict[str, Exception | None]:
        """Call it on every worker; the error that it ended with, by the worker's name."""
        calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return dict(zip(self._names, self._errors(calls)))

    def _mend(self, errors: Mapping[str, Exception | None]) -> None:
        """Replace the workers that are lost. Other errors are raised."""
        for place, name in enumerate(list(self._names)):
            error = errors.get(name)
            if isinstance(error, _LOST):
                self._replace(place, error)
            elif error is not None:
                raise error

    def _replace(self, place: int, error: Exception) -> None:
        """Start a worker in the place of a lost one."""
        self._lose(place, self._names[place], error)
        self._restart(place)

    def _restart(self, place: int) -> None:
        self.deaths += 1
        ray.kill(self.workers[place])  # it may be silent
        self._start_worker(place)
        self._introduce(place)

    def _replace_coordinator(self, error: Exception) -> None:
        if not isinstance(error, _LOST):
            raise error
        self._lose(_COORDINATOR, _COORDINATOR, error)
        self.deaths += 1
        ray.kill(self.coordinator)
        self._start_coordinator()

    def _lose(self, place: int | str, name: str, error: Exception) -> None:
        self._losses[place] += 1
        if self._losses[place] >= LOSSES:
            raise SpotError(
                f"{name}: {LOSSES} were lost in its place, the last by {_reason(error)}"
            ) from error

    def _start_worker(self, place: int) -> None:
        make_engine, make_trainee, threads = self._make
        self._names[place] = f"worker-{self._made}"
        self._made += 1
        remote = ray.remote(SpotWorker).options(**self._resources)
        self.workers[place] = remote.remote(
            self._names[place], make_engine, make_trainee, threads, *self._policy
        )
        self._lives[place] = self.workers[place].lifetime.remote()

    def _start_coordinator(self) -> None:
        remote = ray.remote(SpotCoordinator).options(num_cpus=0)
        self.coordinator = remote.remote(self._folder, self._options)
        self._life = self.coordinator.lifetime.remote()
        self._introduce(*range(len(self.workers)))
        if self._open:
            self.coordinator.tell.remote(RolloutBegan())

    def _introduce(self, *places: int) -> None:
        follows = [self.workers[place].follow.remote(self.coordinator) for place in places]
        for place, error in zip(places, self._errors(follows)):
            if error is None:
                self.coordinator.found.remote(self._names[place], self.workers[place])
            else:
                ray.kill(self.workers[place])  # if it is only silent; `heal` sees to it

    def _errors(self, calls: Sequence[Any]) -> list[Exception | None]:
        """Wait for calls, `timeout` for all together; the error that each ended with."""
        end = time.monotonic() + self.timeout
        return [self._error(call, end) for call in calls]

    def _error(self, call: Any, end: float) -> Exception | None:
        try:
            ray.get(call, timeout=max(0.0, end - time.monotonic()))
        except GetTimeoutError:
            return SpotError(
                f"no answer within timeout={self.timeout:g} s; raise timeout, or look at its log"
            )
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, RolloutSpecError) else error
        except RayError as error:
            return error
        return None

    def _end(self, life: Any) -> Exception | None:
        """How an actor died; None while it lives."""
        return self._errors([life])[0] if ray.wait([life], timeout=0)[0] else None


def _reason(error: Exception) -> str:
    """The last line of Ray's account: what a constructor raised, or how a process ended."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
