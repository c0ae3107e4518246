"""What the coordinator is told and decides, message by message; `test_model_check` looks at all orders of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rollout_spec.adaptive.spot.coordinator import SpotOptions
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
