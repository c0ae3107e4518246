"""The spot trainer's actors in this process, without a cluster."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rollout_spec.adaptive.spot import ray_actors
    from rollout_spec.adaptive.spot.coordinator import SpotOptions
    from rollout_spec.adaptive.spot.messages import Checkpoint, RolloutBegan, Save

    written: list[int] = []

    def write(folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.step == 1:
            raise OSError("disk full")
        written.append(checkpoint.step)

    async def scenario() -> None:
        coordinator = ray_actors.SpotCoordinator(str(tmp_path), SpotOptions())
        for steps in ((1,), (2, 3), (4,)):
            saves = [Save(Checkpoint(step=step)) for step in steps]
            monkeypatch.setattr(coordinator._coordinator, "handle", lambda message, saves=saves: saves)
            await coordinator.tell(RolloutBegan())
            writer: Any = coordinator._writer
            await asyncio.wait([writer])

    monkeypatch.setattr(ray_actors, "write_checkpoint", write)
    with caplog.at_level(logging.ERROR, "rollout_spec"):
        asyncio.run(scenario())
    assert written == [3, 4], "of two the later one"
    (record,) = caplog.records
    assert "step 1" in record.getMessage() and record.exc_info
