"""Shared by all tests: no network, and property tests that fail the same way every time."""

from __future__ import annotations

import os

import hypothesis

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("rollout-spec", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rollout-spec")
