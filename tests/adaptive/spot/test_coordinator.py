"""What the coordinator is told and decides, message by message; `test_model_check` looks at all orders of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout_spec.adaptive.spot.coordinator import Coordinator, SpotOptions
from rollout_spec.adaptive.spot.messages import (
    Checkpoint,
    Contribution,
    Evaluate,
    Evaluated,
    Found,
    Publish,
    Report,
    RolloutBegan,
    Send,
    Status,
)
from rollout_spec.contracts import InvalidRequest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batches", 0),
        ("publish_every", 0),
        ("save_every", -1),
        ("patience", 0),
        ("publish_every", 1.5),
        ("micro_batches", True),
        ("min_gain", math.nan),
        ("min_gain", 2),
    ],
)
def test_options_that_would_stop_training_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}={value!r}: use"):
        SpotOptions(**{name: value})


def judged(*answers: tuple[float, float | None, int]) -> list[Any]:
    """What is published after a check by workers with these candidates' acceptances, current ones, and tokens."""
    coordinator = Coordinator(1, Checkpoint(), lambda states: states[0], SpotOptions(publish_every=1))
    coordinator.handle(RolloutBegan())
    names = [f"worker-{i}" for i in range(len(answers))]
    for name in names:
        coordinator.handle(Found(name))
    for name in names:
        coordinator.handle(Report(name, 1, 1, Status.IDLE, 0, 1, 0))
    round_ = coordinator._round
    commands = coordinator.handle(Contribution(names[0], 1, round_, "state"))  # the first is one worker's
    asked = [c.worker for c in commands if isinstance(c, Send) and isinstance(c.message, Evaluate)]
    assert asked == names
    for name, answer in zip(names, answers):
        tensors = "candidate" if name == names[0] else None
        commands = coordinator.handle(Evaluated(name, 1, round_ + 1, *answer, tensors))
    return [c.message for c in commands if isinstance(c, Send) and isinstance(c.message, Publish)]


def test_a_worker_without_a_drafter_does_not_vote_for_a_worse_one() -> None:
    assert not judged((0.4, 0.5, 100), (0.9, None, 100))
    assert judged((0.6, 0.5, 100), (0.1, None, 100))
    assert judged((0.4, 0.5, 0), (0.4, None, 100)), "nobody has compared"


def test_the_first_drafter_has_nothing_to_beat() -> None:
    assert judged((0.4, None, 100), (0.2, None, 100))
