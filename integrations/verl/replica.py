"""The trainer's handle of one server: puts it where its weights come from."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.workers.rollout.replica import RolloutReplica

from rollout_spec.contracts import invalid
from rollout_spec.integrations.verl.compat import NAME
from rollout_spec.integrations.verl.server import RolloutServer, current_node_and_devices, server_name


class Replica(RolloutReplica):
    """One server on the device of one worker. verl calls the methods it inherits, and they the server's."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        for role in ("is_reward_model", "is_teacher_model"):
            if getattr(self, role):
                raise invalid(
                    "rollout.name", NAME, f"serves the policy alone, and not as {role[3:]}: use vllm there"
                )
        if self.world_size != 1:
            remedy = "an engine runs on one device: use 1, and more GPUs become more replicas"
            raise invalid("actor_rollout_ref.rollout.tensor_model_parallel_size", self.world_size, remedy)

    async def launch_servers(self) -> None:
        (worker,) = self.workers
        node, devices = await worker.__ray_call__.remote(current_node_and_devices)
        platform = get_platform()
        visible = {platform.visible_devices_envvar(): devices}
        server = (
            ray.remote(RolloutServer)
            .options(
                name=server_name(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                runtime_env={"env_vars": {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **visible}},
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, self.model_config, self.replica_rank, self.rollout_mode)
        )
        await server.stats.remote()  # raises what the start of the server raised
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"{NAME}://{self.replica_rank}"
