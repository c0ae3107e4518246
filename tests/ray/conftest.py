"""Shared by the tests of the pool: a small Ray of their own, and a pool of two engines on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers that tests share

from pool_kills import CONFIG, POLICY


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Any]:
    from rollout_spec.integrations.ray.pool import EnginePool

    with EnginePool(POLICY, CONFIG, size=2, timeout=120) as pool:
        yield pool
