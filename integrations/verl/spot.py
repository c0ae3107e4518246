"""A server trains its drafter while it has nothing to answer, until it is needed.

In the long tail of a rollout most replicas are done; in a server's own actor that time is free. `need` ends training within
one micro-batch; `allow` says that nothing is in flight, and the device not lent to the trainer.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rollout_spec.contracts import InvalidRequest, invalid

if TYPE_CHECKING:
    from rollout_spec.engine import RolloutEngine

_PAUSE = 0.05  # seconds between two looks whether there is something to train on


@dataclass(frozen=True)
class SpotTraining:
    """How a server trains a drafter in its idle time.

    Attributes:
        kind: Of the drafter, see `EagleSpec`.
        checkpoint: Folder of `rollout-spec drafter train` to begin from. Empty: kind `eagle` begins as the target's last
            layer, `eagle3` from random weights.
        learning_rate: Of AdamW. None: a third of that of the checkpoint's training; without one 2.5e-4, relative to the
            scale of each matrix, for `eagle`, and `TrainConfig`'s own for `eagle3`. See `usual_config`.
        batch_tokens: Of a micro-batch; a request waits for one at most.
        buffer_bytes: Of the answers kept to train on.
        publish_every: Rounds of 8 micro-batches between two looks whether to publish.
        seed: Of random initial weights and of draws.
    """

    kind: Literal["eagle", "eagle3"] = "eagle"
    checkpoint: str = ""
    learning_rate: float | None = None
    batch_tokens: int = 512
    buffer_bytes: int = 256 << 20
    publish_every: int = 4
    seed: int = 0

    @classmethod
    def from_options(cls, given: Any) -> SpotTraining:
        """From `True` or a mapping of this class's fields.

        Raises:
            InvalidRequest: A field is unknown or out of range, or there is no such checkpoint.
        """
        if given is True:
            return cls()
        if not isinstance(given, Mapping):
            raise invalid("spot_training", given, "use True, or a mapping such as {batch_tokens: 256}")
        known = {field.name: field for field in fields(cls)}
        for name in given:
            if name not in known:
                raise InvalidRequest(f"spot_training.{name}: unknown option; known: {', '.join(known)}")
        options = cls(**given)
        for name in ("batch_tokens", "buffer_bytes", "publish_every"):
            value = getattr(options, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(f"spot_training.{name}", value, "use an integer >= 1")
        if options.learning_rate is not None and not options.learning_rate > 0:
            raise invalid("spot_training.learning_rate", options.learning_rate, "use a number > 0")
        if options.kind not in ("eagle", "eagle3"):
            raise invalid("spot_training.kind", options.kind, "use eagle or eagle3")
        if options.checkpoint and not (Path(options.checkpoint) / "drafter.json").exists():
            remedy = "give a folder that `rollout-spec drafter train` wrote"
            raise invalid("spot_training.checkpoint", options.checkpoint, remedy)
        return options


class IdleTraining:
    """Trains on a thread of its own between `allow` and `need`; neither is called from that thread.

    Until the first `allow` none of the policy's tensors is held.

    Args:
        engine: On the torch backend, with `speculation.adaptive`.
        options: How.

    Attributes:
        spot: The spot trainer of this one engine, with its times.
    """

    def __init__(self, engine: RolloutEngine, options: SpotTraining) -> None:
        from rollout_spec.adaptive.spot.coordinator import SpotOptions
        from rollout_spec.adaptive.spot.local import LocalSpot
        from rollout_spec.adaptive.spot.serving import ServedEngine
        from rollout_spec.adaptive.spot.trainee import DrafterTrainee, usual_config
        from rollout_spec.drafters.eagle_spec import EagleSpec

        served = ServedEngine(engine, EagleSpec.for_target(engine.backend.spec, options.kind))
        config = usual_config(options.checkpoint, options.kind)
        trainee = DrafterTrainee.begin(
            served,
            replace(config, learning_rate=options.learning_rate or config.learning_rate, seed=options.seed),
            options.checkpoint,
            batch_tokens=options.batch_tokens,
            budget_bytes=options.buffer_bytes,
            seed=options.seed,
        )
        self.spot = LocalSpot(served, trainee, SpotOptions(publish_every=options.publish_every))
        self._trainee = trainee
        trainee.release()
        self._idle = 0.0
        self._since: float | None = None
        self._allowed = threading.Event()
        self._training = threading.Lock()  # held while anything of the drafter's training is under way
        threading.Thread(target=self._run, name="rollout-spec-spot", daemon=True).start()
        atexit.register(self._rest)  # a process cannot end in the middle of a micro-batch

    def allow(self) -> None:
        """Nothing is in flight."""
        if self._since is None:
            self._since = time.perf_counter()
        self._allowed.set()

    async def need(self) -> None:
        """Stop training; on return nothing of it is under way."""
        self._allowed.clear()
        if self._since is not None:
            self._idle, self._since = self._idle + time.perf_counter() - self._since, None
        if not self._training.acquire(blocking=False):
            await asyncio.to_thread(self._training.acquire)
        self._training.release()

    async def release(self) -> None:
        """`need`, and hold none of the policy's tensors: they are about to be freed."""
        await self.need()
        self._trainee.release()

    @property
    def idle_seconds(self) -> float:
        """Time between `allow` and `need` so far."""
        return self._idle + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def used_seconds(self) -> float:
        """Of it, in micro-batches and in looks whether to publish, to the end of the last one."""
        return self.spot.host.times.used

    @property
    def version(self) -> int:
        """Of the drafter published last; 0: none."""
        return self.spot.host.worker.version

    def _rest(self) -> None:
        self._allowed.clear()
        self._training.acquire()

    def _run(self) -> None:
        while True:
            self._allowed.wait()
            with self._training:
                taught = len(self._trainee.taught) > 0
                done = self.spot.train(lambda: not self._allowed.is_set()) if taught else 0
            if not done:
                time.sleep(_PAUSE)
