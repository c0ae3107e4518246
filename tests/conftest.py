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


LONGEST = {"test_gpu_benchmark.py", "test_random_configs.py", "test_ablations.py", "test_regret.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: with several workers, what begins last decides when all are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models run faster on one thread than several can meet; a test that needs more sets them itself."""
    torch.set_num_threads(1)
