"""Shared by the tests of the verl plugin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers that tests share

from verl_runs import Run, end_all, run_example


@pytest.fixture
def run_verl(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`run_verl("grpo_cpu.sh", *settings, WORKERS="2")`; whatever it started is gone afterwards."""
    yield partial(run_example, tmp_path)
    end_all(tmp_path)
