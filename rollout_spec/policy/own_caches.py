"""Drafters with a cache of their own, and whether a pass shows what such a one is worth.

A self-drafter reads the target's cache. A trained drafter has its own, which holds what was there when it drafted last:
in the first pass after others have drafted it reads what it missed. That pass takes longer than any that follows, and
says little of what it would cost to go on.
"""

from __future__ import annotations

import numpy as np

from rollout_spec.policy.records import Plan, StepState

_NOBODY = np.zeros(0, np.int64)


class OwnCaches:
    """Who drafted in the last pass, for which sequences."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._last: str | None = None
        self._slots = _NOBODY

    def add(self, drafter: str) -> None:
        """This drafter, new or another in its place, has a cache of its own, in which there is nothing yet."""
        self._names.add(drafter)
        self.clear()

    def __contains__(self, drafter: str) -> bool:
        return drafter in self._names

    def observe(self, plan: Plan, state: StepState) -> bool:
        """Whether the drafter of this pass, which was run, had missed more than what the one before had brought."""
        if not self._names:
            return False
        last, slots = self._last, self._slots
        self._last, self._slots = plan.drafter, state.slots[plan.draft_lengths > plan.from_history]
        return plan.drafter in self._names and (
            plan.drafter != last or not bool(np.isin(self._slots, slots).all())
        )

    def forget(self, slots: np.ndarray) -> None:
        """These sequences are gone; their slots may be used again."""
        if self._names:
            self._slots = self._slots[(self._slots[:, None] != slots).all(1)]

    def clear(self) -> None:
        """All is to be read again, as after new weights."""
        self._last, self._slots = None, _NOBODY
