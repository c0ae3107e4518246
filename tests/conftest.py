"""Shared by all tests: no network, one thread, and property tests that fail the same way every time."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("rollout-spec", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rollout-spec")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run faster on one thread than several can meet; a test that needs more sets them itself."""
    torch.set_num_threads(1)
