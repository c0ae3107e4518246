"""verl on a machine without accelerators, for development and tests. Loaded only with `VERL_PLATFORM=cpu`.

verl 0.9.1 has platforms for CUDA, ROCm and NPU. Its registry takes another one; the rest of what it needs to run on
gloo is here. Ray is told of as many GPUs as there are workers (`ray_kwargs.ray_init.num_gpus`); they do not exist.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from rollout_spec.integrations.after_import import after_import


def install() -> None:
    """Register the platform and make this process's touches."""
    os.environ.setdefault(
        "VERL_ENGINE_DEVICE", "cuda"
    )  # verl's switch: its FSDP engines are registered for cuda
    after_import("verl.plugin.platform", register_platform)
    after_import("verl.utils.distributed", use_gloo_once)
    after_import("verl.utils.model", value_head_without_flash_attention)


class _Device(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl calls and a CPU has no use for."""

    def __getattr__(self, name: str) -> Any:
        if name in _ZERO:
            return lambda *args, **kwargs: 0
        if name in _NOTHING:
            return lambda *args, **kwargs: None
        return getattr(torch.cpu, name)

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Free and total memory in bytes: unknown."""
        return 0, 0

    def get_device_name(self, device: object = None) -> str:
        return "CPU"


_ZERO = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
_NOTHING = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "reset_accumulated_memory_stats")
_device = _Device("torch.cpu")


def register_platform(module: ModuleType) -> None:
    """Register `cpu`, verl's public way; `VERL_PLATFORM=cpu` selects it."""

    @module.PlatformRegistry.register("cpu")
    class PlatformCPU(module.PlatformBase):  # type: ignore[name-defined,misc]
        """One CPU in the place of one accelerator."""

        device_name = "cpu"
        vendor_name = "cpu"
        device_module = _device

        def is_available(self) -> bool:
            return True

        def current_device(self) -> torch.device:
            return torch.device("cpu")  # verl does tensor.to(current_device())

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None: ...

        def synchronize(self, device_index: int | None = None) -> None: ...

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None: ...

        def empty_cache(self) -> None: ...

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextlib.contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None: ...

        def profiler_stop(self) -> None: ...

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None: ...


def use_gloo_once(module: ModuleType) -> None:
    """verl asks for the backends `cpu:gloo,cpu:gloo`, and torch refuses a device named twice."""
    initialize = module.initialize_global_process_group_ray

    def initialize_global_process_group_ray(
        timeout_second: float | None = None, backend: str | None = None
    ) -> None:
        initialize(timeout_second, backend or "cpu:gloo")

    module.initialize_global_process_group_ray = initialize_global_process_group_ray  # type: ignore[attr-defined]


def value_head_without_flash_attention(module: ModuleType) -> None:
    """verl loads critics with `flash_attention_2`, whatever the configuration says; there is none for CPUs."""

    def load_valuehead_model(
        local_path: str, torch_dtype: torch.dtype, model_config: Any, trust_remote_code: bool
    ) -> torch.nn.Module:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(  # type: ignore[no-any-return]
            local_path,
            dtype=torch_dtype,
            config=model_config,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )

    module.load_valuehead_model = load_valuehead_model  # type: ignore[attr-defined]
