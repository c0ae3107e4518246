"""Whose turn it is: the next step's, or somebody's who has to do with the engine between two steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepLock:
    """`with lock:` waits for the step that is running and holds off the next; reentrant.

    Locks are not fair: a thread that runs step after step takes its lock again long before one that waits for it has
    woken. So those who wait are counted, and steps make way while there are any.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._counting = threading.Lock()
        self._waiting = 0

    def __enter__(self) -> None:
        self.make_way()
        try:
            self._changed.acquire()
        except BaseException:
            self._count(-1)
            raise

    def __exit__(self, *error: object) -> None:
        self._count(-1)
        self._changed.notify_all()  # before the lock is gone: steps would have it
        self._changed.release()

    def make_way(self) -> None:
        """No step begins from here on, until `go_on` was called as often; one that runs may go on to its end."""
        self._count(1)

    def go_on(self) -> None:
        """One less has to be made way for."""
        with self._changed:
            self._count(-1)
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Hold the lock for a step, and tell whether it may run: whether nobody waits."""
        with self._changed:
            yield not self._waiting

    def wait(self, seconds: float) -> None:
        """In the place of a step: until somebody has had his turn, at most so long."""
        self._changed.wait(seconds)

    def _count(self, change: int) -> None:
        with self._counting:
            self._waiting += change
