"""Workers that train a drafter while they idle, as seen by a trainer: rollouts in, completions out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.messages import RolloutBegan, RolloutOver
from rollout_spec.adaptive.spot.ray_actors import MakeEngine, MakeTrainee, SpotCoordinator, SpotWorker


class SpotGroup:
    """A trainer's handle on spot-training workers: rollouts in, completions out, whoever dies meanwhile.

    Args:
        workers: How many.
        make_engine, make_trainee: Called on each worker.
        folder: For checkpoints; every node sees it that may run the coordinator.
        options: How to train.
        threads: CPU threads per worker.
        resources: Ray's options for each worker, such as `{"num_gpus": 1}`.

    Attributes:
        workers, coordinator: Handles of the actors alive, as far as is known.
        deaths: How often an actor was replaced.
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
    ) -> None:
        self._make = make_engine, make_trainee, threads
        self._folder, self._options = str(folder), options or SpotOptions()
        self._resources = resources or {"num_cpus": 1}
        self._open, self._made, self.deaths = False, 0, 0
        self._policy: tuple[Any, ...] = ()
        self.workers: list[Any] = [None] * workers
        self._names = [""] * workers
        self._lives: list[Any] = [None] * workers
        for place in range(workers):
            self._start_worker(place)
        self._start_coordinator()

    def rollout(
        self, shares: Iterable[Any], meanwhile: Callable[[], None] = lambda: None, interval: float = 0.25
    ) -> list[Any]:
        """Have each worker answer its share; a dead worker's is answered anew by the one that replaces it.

        Args:
            shares: One per worker.
            meanwhile: Called every `interval` seconds.

        Returns:
            Each share's answer, once, in order.
        """
        waiting = list(shares)
        self._each("claim")
        self._open = True
        self.coordinator.tell.remote(RolloutBegan())
        answers: dict[int, Any] = {}
        pending: dict[Any, tuple[int, str]] = {}

        def ask(place: int) -> None:
            pending[self._ask(place, waiting[place])] = place, self._names[place]

        for place in range(len(waiting)):
            ask(place)
        while pending:
            ready, _ = ray.wait(list(pending), timeout=interval)
            meanwhile()
            self.heal()
            for reference in ready:
                place, name = pending.pop(reference)
                if _died(reference):
                    self._replace(place, name)
                    ask(place)
                else:
                    answers[place] = ray.get(reference)
        self._open = False
        if _died(self.coordinator.tell.remote(RolloutOver())):  # no order is given after this
            self.heal()
        self._each("rest")
        return [answers[place] for place in range(len(waiting))]

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Put a policy in force on every worker, and on those that replace them; not during a rollout."""
        self._policy = ray.put(dict(weights)), version
        self._each("update_weights", *self._policy)

    def heal(self) -> None:
        """Replace the actors that have died."""
        if _ended(self._life):
            self.deaths += 1
            self._start_coordinator()
        for place, life in enumerate(self._lives):
            if _ended(life):
                self._replace(place, self._names[place])

    def figures(self) -> dict[str, Any]:
        """The coordinator's, and each worker's by name."""
        workers = dict(zip(self._names, ray.get([worker.figures.remote() for worker in self.workers])))
        return {"coordinator": ray.get(self.coordinator.figures.remote()), "workers": workers}

    def shutdown(self) -> None:
        """End all actors."""
        for actor in (self.coordinator, *self.workers):
            ray.kill(actor)

    # --- inside ----------------------------------------------------------------------------------------

    def _ask(self, place: int, share: Any) -> Any:
        return self.workers[place].generate.remote(share)

    def _each(self, method: str, *arguments: Any) -> None:
        """Call it on every worker, whoever dies."""
        calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        for place, (call, name) in enumerate(zip(calls, list(self._names))):
            if _died(call):
                self._replace(place, name)

    def _replace(self, place: int, name: str) -> None:
        """Start a worker in the place of a dead one, unless that is done."""
        if self._names[place] == name:
            self.deaths += 1
            self._start_worker(place)
            self._introduce(place)

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
        for place in range(len(self.workers)):
            self._introduce(place)
        if self._open:
            self.coordinator.tell.remote(RolloutBegan())

    def _introduce(self, place: int) -> None:
        worker = self.workers[place]
        if not _died(worker.follow.remote(self.coordinator)):  # else `heal` sees to it
            self.coordinator.found.remote(self._names[place], worker)


def _ended(life: Any) -> bool:
    return bool(ray.wait([life], timeout=0)[0])


def _died(call: Any) -> bool:
    """Wait for a call; whether its actor died over it. Other errors are raised."""
    try:
        ray.get(call)
    except ray.exceptions.RayActorError:
        return True
    return False
