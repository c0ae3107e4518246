"""A checkpoint engine for trainer and rollout in separate workers of one machine without accelerators.

verl's own need NCCL or network cards. Use this one for development:
`rollout.checkpoint_engine.backend=rollout_spec_cpu` with
`rollout.checkpoint_engine.custom_backend_module=rollout_spec.integrations.verl.checkpoint_cpu`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import load_file, save_file
from torch import Tensor
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry


@CheckpointEngineRegistry.register("rollout_spec_cpu")
class FileCheckpointEngine(CheckpointEngine):
    """Passes each set of weights on in a file that the sender's first worker writes.

    Args:
        bucket_size: Not needed.
        is_master: Whether this worker writes.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.path = Path()

    def prepare(self) -> dict[str, Any]:
        return {"path": str(Path(tempfile.gettempdir()) / f"rollout-spec-{uuid4().hex}.safetensors")}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        path = metadata[0]["path"]
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:  # type: ignore[override]
        self.path = Path(path)

    def finalize(self) -> None:
        if self.is_master:
            with suppress(FileNotFoundError):
                self.path.unlink()

    async def send_weights(  # type: ignore[override]
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights}
        if self.is_master:
            part = self.path.with_suffix(".part")
            save_file(tensors, part)
            part.rename(self.path)
        return {}

    async def receive_weights(  # type: ignore[override]
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, Tensor]]:
        while not self.path.exists():
            await asyncio.sleep(0.01)
        for name, tensor in load_file(self.path).items():
            yield name, tensor
