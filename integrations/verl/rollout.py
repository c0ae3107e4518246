"""What runs in the trainer's worker beside a server: sends it weights, and tells it to sleep and wake up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Iterable
from typing import Any

import ray
import torch
from torch import Tensor
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.utils import ensure_async_iterator

from rollout_spec.contracts import invalid
from rollout_spec.integrations.verl import transport
from rollout_spec.integrations.verl.options import MODEL, ROLLOUT, read_options
from rollout_spec.integrations.verl.server import server_name


class Rollout(BaseRollout):
    """Lives in a worker that trains (hybrid) or in one that only receives weights (standalone).

    Args:
        config, model_config, device_mesh: As verl passes them.
        replica_rank: Of the server; -1: the worker's own rank, for every worker has a server of its own.

    Raises:
        InvalidRequest, UnsupportedModel: See `options.read_options`; this is where a run fails first.
    """

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.options = read_options(self.config, self.model_config)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True
        self._handle: Any = None

    @property
    def _server(self) -> Any:
        if self._handle is None:  # servers are started after workers
            self._handle = ray.get_actor(server_name(self.replica_rank))
        return self._handle

    async def resume(self, tags: list[str]) -> None:
        if self.options.free_cache:
            await self._server.wake_up.remote(tags)

    async def release(self) -> None:
        await self._server.sleep.remote()

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]] | AsyncIterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Any = None,
        base_sync_done: bool = True,
    ) -> None:
        """Send a complete set of weights, the policy of version `global_steps`.

        Raises:
            InvalidRequest: The weights come in a form that cannot be put in force as a whole.
            WeightError: They do not fit; the server keeps those it had.
        """
        if wire_format != "named_tensors":
            backend = f"{ROLLOUT}.checkpoint_engine.backend"
            raise invalid(backend, wire_format, "whole tensors are needed: use one that is not delta_sharded")
        if peft_config is not None:
            raise invalid(f"{MODEL}.lora.merge", False, "adapters are merged before they are sent: use True")
        if global_steps is None:
            raise invalid("global_steps", None, "every policy needs a version: pass the trainer's step")
        pairs = ensure_async_iterator(weights)
        if not await self._server.begin_update.remote(global_steps):
            async for _ in pairs:  # gathering a tensor takes all workers
                pass
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            await transport.send(pairs, self._server.take.remote, self.options.bucket_bytes, device)
        except BaseException as error:
            await self._server.cancel_update.remote(repr(error))
            raise
        await self._server.finish_update.remote(global_steps)
