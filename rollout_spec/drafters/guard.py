"""Whether the drafter may be used. A stale, broken or useless one is set aside, and said so once, loudly.

Nothing a drafter does can change what is emitted; the guard keeps it from silently costing time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rollout_spec.config import SpeculationConfig
from rollout_spec.drafters.base import Drafter, Proposal

logger = logging.getLogger("rollout_spec")

_WATCH_TOKENS = 512  # draft tokens over which acceptance is judged while decoding
CONTEXTS, _CONTEXT_TOKENS = 2, 24  # every update pays for them, and a wrong drafter is far below the floor


@dataclass(frozen=True)
class DrafterReport:
    """Why a drafter was set aside.

    Attributes:
        cause: `stale`, `nan`, `raised`, `low-acceptance`.
        message: For people: what was seen and what the engine does about it.
        version: Policy version in force.
    """

    cause: str
    message: str
    version: int


class Stamped(Protocol):
    """What the guard needs to know of a drafter."""

    name: str
    version: int


class DrafterGuard:
    """Watches one drafter.

    Args:
        config: Whether there is a canary, and what it asks for.
        until: For reports: what brings the drafter back, and what the version stamps.

    Attributes:
        reports: Everything reported so far.
        canary_acceptance: Mean acceptance `1 - TV` on recent contexts after the last update; None if not run.
    """

    def __init__(
        self, config: SpeculationConfig, until: str = "until the next weight update (policy version"
    ) -> None:
        self.config, self._until = config, until
        self.reports: list[DrafterReport] = []
        self.canary_acceptance: float | None = None
        self._set_aside = False
        self._tried = self._accepted = 0
        self._contexts: deque[np.ndarray] = deque(maxlen=CONTEXTS)

    @property
    def contexts(self) -> Sequence[np.ndarray]:
        """Recent token sequences, for the canary."""
        return self._contexts

    def usable(self, drafter: Stamped | None, version: int) -> bool:
        """Whether the drafter is in order and was made from the policy in force."""
        return drafter is not None and not self._set_aside and drafter.version == version

    def check(self, drafter: Stamped | None, version: int) -> bool:
        """`usable`, before drafting: a drafter made from another policy version is reported."""
        if drafter is not None and not self._set_aside and drafter.version != version:
            what = f"drafter {drafter.name} was made from policy version {drafter.version}, not {version}"
            self._report("stale", what, version)
        return self.usable(drafter, version)

    def propose(self, drafter: Drafter, run: Callable[[], Proposal]) -> Proposal | None:
        """What `run` lets the drafter propose, or None if it raised."""
        try:
            return run()
        except Exception as error:  # a guest's failure is reported and must not end the rollout
            self.failed(drafter, error)
            return None

    def failed(self, drafter: Stamped, error: Exception) -> None:
        """Set a drafter aside that raised `error`."""
        cause = f"drafter {drafter.name} raised {type(error).__name__}: {error}"
        self._report("raised", cause, drafter.version, error)

    def observe(self, healthy: bool, tried: int, accepted: int, version: int) -> None:
        """Judge a verified proposal: finite logits, and acceptance over the last tokens tried.

        Args:
            healthy: Whether all its logits were finite.
            tried: Draft tokens put to the test: those accepted, and the first rejected of each sequence. Those
                behind a rejection say nothing about the drafter.
            accepted: Draft tokens accepted.
            version: Policy version in force.
        """
        if not healthy:
            self._report("nan", "the drafter produced NaN or infinite logits", version)
            return
        self._tried, self._accepted = self._tried + tried, self._accepted + accepted
        if self._tried >= _WATCH_TOKENS:
            self._judge(self._accepted / self._tried, f"over {self._tried} draft tokens tried", version)
            self._tried = self._accepted = 0

    def remember(self, tokens: np.ndarray) -> None:
        """Keep the end of a finished sequence as a canary context."""
        self._contexts.append(tokens[-_CONTEXT_TOKENS:])

    def after_update(
        self,
        drafter: Stamped | None,
        version: int,
        compare: Callable[[np.ndarray], tuple[Tensor, Tensor] | None],
        error: Exception | None = None,
    ) -> None:
        """Start afresh after a weight update, and run the canary.

        Args:
            drafter: The drafter, already updated.
            version: Policy version in force.
            compare: Context `[T]` to target and drafter logits `[T, V]` after each token; None if it cannot
                be run now.
            error: Why the drafter could not be updated, if it could not.
        """
        self._set_aside, self._tried, self._accepted = False, 0, 0
        self.canary_acceptance = None
        if drafter is not None and error is not None:
            self._report(
                "raised", f"updating drafter {drafter.name}: {type(error).__name__}: {error}", version, error
            )
        if drafter is None or not self.check(drafter, version) or not self.config.canary:
            return
        acceptances = []
        for context in self._contexts:
            try:
                logits = compare(context)
            except Exception as error:  # a guest's failure
                self.failed(drafter, error)
                return
            if logits is None:
                continue
            target, draft = (x.softmax(-1) for x in logits)
            if not bool(torch.isfinite(draft).all()):
                self._report("nan", "the canary found NaN in the drafter's logits", version)
                return
            acceptances.append(torch.minimum(target, draft).sum(-1).mean().item())
        if acceptances:
            self.canary_acceptance = sum(acceptances) / len(acceptances)
            self._judge(self.canary_acceptance, f"on {len(acceptances)} recent contexts (canary)", version)

    def _judge(self, acceptance: float, where: str, version: int) -> None:
        if acceptance < self.config.canary_min_acceptance:
            floor = f"speculation.canary_min_acceptance={self.config.canary_min_acceptance}"
            self._report("low-acceptance", f"acceptance {acceptance:.3f} {where} is below {floor}", version)

    def _report(self, cause: str, what: str, version: int, error: Exception | None = None) -> None:
        message = f"{what}; decoding plainly {self._until} {version})"
        self._set_aside = True
        self.reports.append(DrafterReport(cause, message, version))
        logger.error("drafter set aside [%s]: %s", cause, message, exc_info=error)
