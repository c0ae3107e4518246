"""What a training showed: rewards, times, what speculation did; as JSON values and as a plot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rollout_spec.contracts import SpecCounts


@dataclass
class TrainingLog:
    """What a training showed, step by step; times in seconds.

    `tokens_sha256` covers all tokens sampled for training and their logprobs, `logprob_difference` is the largest
    between the engine and the trainer before the first update of a step.
    """

    rewards: list[float] = field(default_factory=list)
    rollout: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    logprob_difference: list[float] = field(default_factory=list)
    tokens_sha256: list[str] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    spec: SpecCounts = field(default_factory=SpecCounts)

    def summary(self) -> dict:
        """As JSON values; times in seconds."""
        spec = self.spec
        return {
            "steps": len(self.rewards),
            "seconds": {
                name: round(sum(getattr(self, name)), 2) for name in ("rollout", "update", "training")
            },
            "tau": round(spec.tau, 3) if spec.verify_steps else None,
            "acceptance": round(spec.acceptance, 3) if spec.drafted else None,
            "passes": {"verifying": spec.verify_steps, "plain": spec.plain_steps},
            "tokens": sum(self.tokens),
            "longest": max(self.longest, default=0),
            "largest_logprob_difference": max(self.logprob_difference, default=0.0),
            "held_out_accuracy": {str(step): round(value, 4) for step, value in self.held_out.items()},
            "rewards": [round(value, 4) for value in self.rewards],
            "rollout_seconds": [round(value, 3) for value in self.rollout],
            "update_seconds": [round(value, 3) for value in self.update],
        }

    def plot(self, path: Path) -> None:
        """The reward of every step, its running mean, and held-out accuracy."""
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
        smooth = [sum(self.rewards[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(self.rewards))]
        axes.plot(range(len(smooth)), self.rewards, color="#c9d4e3", lw=1, label="mean reward of a step")
        axes.plot(range(len(smooth)), smooth, color="#3572c6", lw=2, label="mean of 10 steps")
        axes.plot(
            [*self.held_out], [*self.held_out.values()], "o-", color="#e8a33d", label="held-out accuracy, T=1"
        )
        axes.set(xlabel="training step", ylabel="share of right answers", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=150)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the arrays' bits, one after the other."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()
