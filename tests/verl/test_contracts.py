"""What the plugin relies on in verl, compared with the verl that is installed; and what it mends, found still broken."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402

from rollout_spec.integrations.verl import compat  # noqa: E402

SIGNATURES = {
    "verl.workers.rollout.base:BaseRollout.__init__": "self, config, model_config, device_mesh, *args, **kwargs",
    "verl.workers.rollout.base:BaseRollout.resume": "self, tags",
    "verl.workers.rollout.base:BaseRollout.release": "self",
    "verl.workers.rollout.base:BaseRollout.update_weights": "self, weights, wire_format, **kwargs",
    "verl.workers.rollout.base:get_rollout_class": "rollout_name, mode",
    "verl.workers.rollout.replica:RolloutReplicaRegistry.register": "name, loader",
    "verl.workers.rollout.replica:RolloutReplica.__init__": (
        "self, replica_rank, config, model_config, gpus_per_node, is_reward_model, is_teacher_model, name_suffix"
    ),
    "verl.workers.rollout.replica:RolloutReplica.launch_servers": "self",
    "verl.workers.rollout.replica:RolloutReplica.abort_all_requests": "self, reject_request",
    "verl.workers.rollout.llm_server:LLMServerClient.generate": (
        "self, request_id, *, prompt_ids, sampling_params, image_data, video_data, audio_data, mm_processor_kwargs, **kwargs"
    ),
    "verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate": (
        "self, request_id, *, prompt_ids, sampling_params, image_data, video_data, audio_data, mm_processor_kwargs, **kwargs"
    ),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_metrics": (
        "self, batch, metrics, timing_raw, global_steps, epoch"
    ),
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._rollout_server_managers": "self",
    "verl.trainer.ppo.ray_trainer:compute_spec_decode_metrics": (
        "spec_drafts, spec_accepts, spec_verifies, non_padding_mask"
    ),
    "verl.utils.config:omega_conf_to_dataclass": "config, dataclass_type",
    "verl.utils.distributed:initialize_global_process_group_ray": "timeout_second, backend",
    "verl.utils.model:load_valuehead_model": "local_path, torch_dtype, model_config, trust_remote_code",
    "verl.checkpoint_engine.base:CheckpointEngine.send_weights": "self, weights, global_steps",
    "verl.checkpoint_engine.base:CheckpointEngine.receive_weights": "self, global_steps",
    "verl.checkpoint_engine.base:CheckpointEngine.build_topology": "actor_wg_world_size, rollout_world_size, metadata",
}  # fmt: skip


@pytest.mark.parametrize("place", SIGNATURES)
def test_a_signature(place: str) -> None:
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    parameters = inspect.signature(inspect.unwrap(found)).parameters.values()
    text, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            text.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text.append(stars + parameter.name)
    assert ", ".join(text) == SIGNATURES[place], f"verl changed {place}"


def test_the_servers_methods_are_those_that_verl_calls() -> None:
    """Replicas fan out to methods of the same name; a new one would be an AttributeError in the middle of a run."""
    import re

    from verl.workers.rollout import replica

    from rollout_spec.integrations.verl.server import RolloutServer

    called = set(re.findall(r"server\.(\w+)\.remote", inspect.getsource(replica.RolloutReplica)))
    assert called >= {"sleep", "wake_up", "resume_generation"}
    assert {name for name in called if not hasattr(RolloutServer, name)} == set()


def test_fields_of_an_answer() -> None:
    from verl.workers.rollout.replica import TokenOutput

    assert {"token_ids", "log_probs", "stop_reason", "extra_fields"} <= set(TokenOutput.model_fields)


def test_the_configurations_have_the_fields_that_are_read() -> None:
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl_configs import model_config, rollout_config

    def names(config: type) -> set[str]:
        return set(inspect.signature(config).parameters) | {"local_path"}

    assert {*vars(rollout_config())} - names(RolloutConfig) == set()
    assert {*vars(model_config())} - names(HFModelConfig) == set()


# --- each touch is still needed --------------------------------------------------------------------------------------


def test_verl_still_has_no_function_to_register_a_rollout() -> None:
    from verl.workers.rollout import base

    functions = [
        name
        for name, value in vars(base).items()
        if inspect.isfunction(value) and value.__module__ == base.__name__
    ]
    assert functions == ["get_rollout_class"] and isinstance(base._ROLLOUT_REGISTRY, dict)


def fake_client(kind: str) -> tuple[Any, list[Any]]:
    """verl's client for asynchronous training, before a server that interrupts every answer once."""
    from verl.workers.rollout import llm_server
    from verl.workers.rollout.replica import TokenOutput

    outputs = [
        TokenOutput(
            token_ids=[1, 2],
            log_probs=[-1.0, -1.0],
            stop_reason=reason,
            extra_fields={
                "global_steps": version,
                "version_spans": [(0, 2, version)],
                "spec_num_draft_tokens": 4,
            },
        )
        for reason, version in (("aborted", 1), ("completed", 2))
    ]

    class Remote:
        async def remote(self, **arguments: Any) -> Any:
            return outputs.pop(0)

    class Client(llm_server.FullyAsyncLLMServerClient):
        async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
            return "server", SimpleNamespace(generate=Remote())

        def _release_server(self, server_id: str, request_id: str | None = None) -> None: ...

    rollout = OmegaConf.create({"name": kind, "response_length": 10})
    return Client(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))), outputs


@pytest.mark.parametrize("kind", ["vllm", compat.NAME])
def test_verls_client_forgets_versions_and_counts_and_we_remember(kind: str) -> None:
    client, _ = fake_client(kind)
    output = asyncio.run(client.generate("id", prompt_ids=[5], sampling_params={}))
    assert output.token_ids == [1, 2, 1, 2]
    fields = output.extra_fields
    if kind == compat.NAME:
        assert fields["version_spans"] == [(0, 2, 1), (2, 4, 2)] and fields["spec_num_draft_tokens"] == 8
        assert (fields["min_global_steps"], fields["max_global_steps"]) == (1, 2)
    else:
        assert "version_spans" not in fields, "verl keeps them now: drop compat.keep_extra_fields"


def test_verl_still_asks_for_counts_of_mtp_alone() -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(inspect.unwrap(PPOTrainer._compute_metrics))
    assert "if mtp_config is not None and mtp_config.enable and mtp_config.enable_rollout" in source, (
        "verl reads counts of other rollouts now: drop compat.log_speculation"
    )


ON_CPU = """
import verl
from verl.plugin.platform import PlatformRegistry, get_platform
from verl.utils import distributed, model
print(sorted(PlatformRegistry.registered_names()), get_platform().device_name)
print(distributed.initialize_global_process_group_ray.__module__, model.load_valuehead_model.__module__)
print(get_platform().device_module.memory_allocated(), get_platform().device_module.empty_cache())
"""


def in_a_process(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_cpu_platform_is_loaded_where_it_is_asked_for_and_nowhere_else() -> None:
    names, functions, memory = in_a_process(ON_CPU, VERL_PLATFORM="cpu")
    assert "'cpu'" in names and names.endswith(" cpu")
    assert set(functions.split()) == {"rollout_spec.integrations.verl.compat_cpu"}
    assert memory == "0 None"
    names, functions = in_a_process(ON_CPU.rpartition("print(get_platform")[0])
    assert "'cpu'" not in names, "verl has a platform for CPUs: drop compat_cpu.register_platform"
    assert functions == "verl.utils.distributed verl.utils.model"


def test_torch_still_refuses_verls_backends_on_a_cpu() -> None:
    import torch
    from verl.utils import distributed

    source = Path(distributed.__file__).read_text(encoding="utf-8")
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in source
    store = torch.distributed.HashStore()
    with pytest.raises(ValueError, match=r"(?i)duplicate"):
        torch.distributed.init_process_group("cpu:gloo,cpu:gloo", rank=0, world_size=1, store=store)


def test_verl_still_insists_on_flash_attention_for_critics() -> None:
    from verl.utils import model

    source = inspect.getsource(model).partition("def load_valuehead_model")[2]
    assert 'attn_implementation="flash_attention_2"' in source, (
        "drop compat_cpu.value_head_without_flash_attention"
    )


def test_the_plugin_is_light_and_found() -> None:
    code = "import verl, sys; print(*sorted(m for m in sys.modules if m.startswith('rollout_spec.')))"
    (loaded,) = in_a_process(code)
    assert "rollout_spec.integrations.verl.plugin" in loaded.split()
    assert not {"rollout_spec.engine", "rollout_spec.integrations.verl.server"} & set(loaded.split())


def test_a_verl_that_does_not_fit_is_refused_when_the_rollout_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import get_rollout_replica_class

    monkeypatch.setattr(compat, "version", lambda name: "0.10.0")
    for look_up in (get_rollout_class, get_rollout_replica_class):
        with pytest.raises(compat.UnsupportedVerl, match=r"verl==0\.10\.0"):
            look_up(compat.NAME)
