"""A weight update that arrives in pieces over many calls, as one streaming `engine.update_weights`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING

from torch import Tensor

from rollout_spec.contracts import WeightError
from rollout_spec.integrations.verl.transport import Bucket

if TYPE_CHECKING:
    from rollout_spec.engine import RolloutEngine
    from rollout_spec.torch_backend.weights import UpdateReport


class WeightStream:
    """One update under way: `feed` it buckets, then `finish`; or `cancel`, and the old weights stay in force.

    Args:
        engine: What to update. It goes on generating, and takes tensors in a thread of this stream.
        version: The new policy version.
    """

    def __init__(self, engine: RolloutEngine, version: int) -> None:
        self._buckets: SimpleQueue[tuple[Bucket, Future[None]] | str | None] = SimpleQueue()
        self._waiting: Future[None] = Future()  # for the engine to take the last bucket
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-spec-weights")
        self._update = self._thread.submit(engine.update_weights, self._pairs(), version)
        self._update.add_done_callback(self._over)

    async def feed(self, bucket: Bucket) -> None:
        """Hand over a bucket and wait until its tensors were taken.

        Raises:
            WeightError: What the engine found wrong, at the bucket in which it did.
        """
        self._waiting = Future()
        self._buckets.put((bucket, self._waiting))
        if self._update.done():
            self._update.result()
        await asyncio.wrap_future(self._waiting)

    async def finish(self) -> UpdateReport:
        """All tensors are there: put them in force."""
        self._buckets.put(None)
        try:
            return await asyncio.wrap_future(self._update)
        finally:
            self._thread.shutdown(wait=False)

    async def cancel(self, reason: str) -> None:
        """The sender failed."""
        self._buckets.put(reason)
        with suppress(Exception):
            await asyncio.wrap_future(self._update)
        self._thread.shutdown(wait=False)

    def _over(self, update: Future[UpdateReport]) -> None:
        error = update.exception()
        if error is not None and not self._waiting.done():
            self._waiting.set_exception(error)

    def _pairs(self) -> Iterator[tuple[str, Tensor]]:
        while (received := self._buckets.get()) is not None:
            if isinstance(received, str):
                raise WeightError(f"the sender of the weights failed: {received}")
            bucket, taken = received
            yield from bucket.tensors()
            taken.set_result(None)
