"""What the spot trainer asks of a drafter's trainer and of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rollout_spec.contracts import RolloutSpecError

Tensors = Mapping[str, Tensor]


class SpotError(RolloutSpecError, RuntimeError):
    """A worker or the coordinator cannot start, is lost again and again, or does not answer; the message says which."""


class Trainee(Protocol):
    """A drafter in training, on one worker's own samples. One call runs at a time, from any thread."""

    def micro_step(self) -> float | None:
        """Train on one micro-batch; its loss, or None where there is no data."""

    def state(self) -> Tensors:
        """A copy, on the CPU, of all that must be the same on every worker: trainable tensors and the optimizer's moments.

        Never the target's tensors. Floating tensors are averaged over workers, others taken from the first.
        """

    def load(self, state: Tensors) -> None:
        """Take a state over (copied; the tensors are read-only)."""

    def candidate(self) -> Tensors:
        """A copy of the drafter, on the CPU, as it would be published."""

    def evaluate(self, tensors: Tensors, needed: Callable[[], bool]) -> tuple[float, int]:
        """A drafter's acceptance per token on held-out recent contexts, and on how many tokens (0: there are none).

        Once `needed()`, nobody waits for the result: it returns within a micro-batch's time.
        """

    @property
    def bytes(self) -> int:
        """What training takes beside the engine, in bytes: parameters, gradients, moments, activations."""


class Engine(Protocol):
    """What publishes and what must not be disturbed."""

    @property
    def busy(self) -> bool:
        """Whether requests are waiting or being decoded."""

    def publish(self, tensors: Tensors, version: int) -> None:
        """Put a drafter in force between two steps, all of it or nothing."""

    @property
    def free_bytes(self) -> int:
        """Free beside the KV cache that stays resident."""


class Generator(Engine, Protocol):
    """An engine on a worker of its own."""

    def generate(self, share: Any, draining: Callable[[], None]) -> Any:
        """Answer a share of the rollout; call `draining` once nothing of it waits any more."""

    def update(self, weights: Tensors, version: int) -> None:
        """Put a policy in force; no rollout and no training is under way."""


def mean(states: Sequence[Tensors]) -> dict[str, Tensor]:
    """The mean of some trainees' states, in float32 and in the order given: the same bits for everybody."""
    first = states[0]
    if len(states) == 1:
        return dict(first)
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }
