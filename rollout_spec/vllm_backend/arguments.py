"""From an `EngineConfig` to vLLM's own arguments."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.arguments import llm_arguments
from rollout_spec.models.checkpoint import read_config

_DEFAULTS = EngineConfig()
_OURS = {
    "model": "the path given to from_pretrained",
    "additional_config": "speculation",
    "dtype": "dtype",
    "seed": "seed",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "max_num_batched_tokens": "prefill_chunk",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "num_gpu_blocks_override": "kv_cache_tokens",
    "logprobs_mode": "nothing: logprobs are those of the sampled distribution",
    "skip_tokenizer_init": "nothing: texts are read and written outside vLLM",
    "worker_extension_cls": "nothing: weight updates need the plugin's",
}
_MOST_LOGPROBS = 1000  # what SamplingParams.logprobs allows


def engine_arguments(path: str | Path, config: EngineConfig) -> dict[str, Any]:
    """Keyword arguments of `vllm.EngineArgs`; what the configuration leaves at its default is left to vLLM.

    Raises:
        InvalidRequest: A value that vLLM cannot honour, named with what to do instead.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    _check_device(config.device, current_platform.device_type)
    if config.graph_bytes is not None:
        raise invalid(
            "graph_bytes", config.graph_bytes, "vLLM sizes its graphs: use vllm={'compilation_config': ...}"
        )
    arguments = llm_arguments(str(path), asdict(config.speculation)) | {
        "dtype": _dtype(path) if config.dtype == "auto" else config.dtype,
        "seed": config.seed % 2**32,
        "max_num_seqs": config.max_num_seqs,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": _MOST_LOGPROBS,
        "skip_tokenizer_init": True,
        "per_request_spec_decode_metrics": "summary",
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if on_cpu or config.kv_cache_bytes != _DEFAULTS.kv_cache_bytes:
        arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes
    if config.block_size != _DEFAULTS.block_size:
        arguments["block_size"] = config.block_size
    if config.prefill_chunk != _DEFAULTS.prefill_chunk:
        arguments["max_num_batched_tokens"] = max(config.prefill_chunk, config.max_num_seqs)
    if config.kv_cache_tokens is not None:
        block = arguments.get("block_size", 128 if on_cpu else 16)
        arguments["block_size"] = block
        arguments["num_gpu_blocks_override"] = (
            -(-config.kv_cache_tokens // block) + 1
        )  # vLLM keeps one to pad
    for name, value in (config.vllm or {}).items():
        if name in _OURS:
            raise invalid(f"vllm.{name}", value, f"is set by {_OURS[name]}")
        arguments[name] = value
    return arguments


def _check_device(wanted: str, device: str) -> None:
    if ":" in wanted:
        raise invalid("device", wanted, "for vLLM choose devices with CUDA_VISIBLE_DEVICES, and use cuda")
    if wanted not in ("auto", device):
        raise invalid("device", wanted, f"the vLLM installed here runs on {device}; use auto")


def _dtype(path: str | Path) -> str:
    """The checkpoint's: vLLM's own `auto` would make float16 or bfloat16 of float32."""
    config = read_config(path)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
