"""What the spot trainer's coordinator and workers tell each other: frozen, and tagged with an epoch.

An epoch is one life of a coordinator. Each coordinator gets a larger one than all before it, and workers follow the
largest they have heard of. A worker that dies comes back under another name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

Payload = Any  # named tensors, or a reference to them; nobody here looks inside


class Status(str, Enum):
    """What a worker is doing.

    `generating`: it has requests, and more may be waiting. `draining`: all it was given is being decoded, and it
    idles when that ends. `idle`: nothing to do. `training`: it carries out an order. `preempting`: it may train no
    more, and its last micro-batch has not ended.
    """

    GENERATING = "generating"
    DRAINING = "draining"
    IDLE = "idle"
    TRAINING = "training"
    PREEMPTING = "preempting"


# --- from the runtime to the coordinator ---------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """There is such a worker."""

    worker: str


@dataclass(frozen=True)
class Lost:
    """There is no such worker any more."""

    worker: str


@dataclass(frozen=True)
class RolloutBegan:
    """Workers that idle from now on may train."""


@dataclass(frozen=True)
class RolloutOver:
    """The trainer has what it wanted, and needs its devices."""


# --- from a worker to the coordinator ------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A worker's state; sent when it changes other than by an order that was carried out.

    Attributes:
        epoch: Of the coordinator that the worker follows.
        number: Of this report; an order given before it is void.
        version: Of the drafter in force there; 0: none.
        free_bytes: Free beside the KV cache that stays resident.
        needed_bytes: What training takes.
    """

    worker: str
    epoch: int
    number: int
    status: Status
    version: int
    free_bytes: int
    needed_bytes: int


@dataclass(frozen=True)
class Contribution:
    """The end of a worker's part in a round of training.

    Attributes:
        state: The trainee's state after it; None: it could not train.
        reason: Why not.
    """

    worker: str
    epoch: int
    round: int
    state: Payload | None
    reason: str = ""


@dataclass(frozen=True)
class Evaluated:
    """A worker's shadow check.

    Attributes:
        candidate: Acceptance of the trained drafter on this worker's held-out contexts.
        current: Acceptance of the drafter in force on the same contexts; None if there is none.
        tokens: How many tokens both were judged on; 0: no contexts here, or the check failed.
        tensors: The candidate, from the worker that was asked for it.
        reason: Why it failed.
    """

    worker: str
    epoch: int
    round: int
    candidate: float
    current: float | None
    tokens: int
    tensors: Payload | None = None
    reason: str = ""


# --- from the coordinator to a worker ------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """A new coordinator: drop what the last one ordered, and report."""

    epoch: int


@dataclass(frozen=True)
class Train:
    """Take over a state, train that many micro-batches on it, contribute the result.

    Attributes:
        seen: Number of the worker's last report; void if it has sent another since.
        state: What all of the group begin with; None: the worker's own.
    """

    epoch: int
    round: int
    seen: int
    state: Payload | None
    micro_batches: int


@dataclass(frozen=True)
class Evaluate:
    """Take over a state, and compare it with the drafter in force on held-out contexts.

    Attributes:
        seen: As in `Train`.
        lead: Whether to send the candidate's tensors too.
    """

    epoch: int
    round: int
    seen: int
    state: Payload
    lead: bool


@dataclass(frozen=True)
class Stop:
    """Void the order under way, at the end of the micro-batch under way, and report."""

    epoch: int


@dataclass(frozen=True)
class Publish:
    """Put a drafter in force, between two steps of the engine."""

    epoch: int
    version: int
    tensors: Payload


# --- from the coordinator to its runtime ---------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What outlives a coordinator.

    Attributes:
        epoch: Of the coordinator that wrote it.
        step: Rounds agreed on.
        state: The trainees' state after them; None before the first.
        version: Of the drafter in force; 0: none.
        tensors: That drafter.
    """

    epoch: int = 0
    step: int = 0
    state: Payload | None = None
    version: int = 0
    tensors: Payload | None = None


@dataclass(frozen=True)
class Send:
    """Send it; what is sent to one worker arrives in order."""

    worker: str
    message: Hello | Train | Evaluate | Stop | Publish


@dataclass(frozen=True)
class Save:
    """Write a checkpoint, at leisure; a later one replaces it."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class Say:
    """Log a line."""

    text: str


Command = Send | Save | Say
FromWorker = Report | Contribution | Evaluated
ToCoordinator = Found | Lost | RolloutBegan | RolloutOver | FromWorker
ToWorker = Hello | Train | Evaluate | Stop | Publish
