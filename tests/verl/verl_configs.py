"""verl's two configurations of a rollout, as far as the plugin reads them, without verl."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from verl_runs import POLICY


def rollout_config(**changes: Any) -> SimpleNamespace:
    """A `RolloutConfig` with verl's defaults, but for what a laptop needs."""
    fields = {
        "prompt_length": 64,
        "response_length": 128,
        "max_model_len": None,
        "max_num_seqs": 16,
        "dtype": "float32",
        "seed": 42,
        "engine_kwargs": {"vllm": {}, "rollout_spec": {}},
        "custom": None,
        "enforce_eager": False,
        "free_cache_engine": True,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "logprobs_mode": "processed_logprobs",
        "tensor_model_parallel_size": 1,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_parallel_size": 1,
        "quantization": None,
        "qat": None,
        "enable_rollout_routing_replay": False,
        "cudagraph_capture_sizes": None,
        "scheduling_policy": "fcfs",
        "mtp": SimpleNamespace(enable=False, enable_rollout=False),
        "prometheus": SimpleNamespace(enable=False),
        "checkpoint_engine": SimpleNamespace(update_weights_bucket_megabytes=2048),
    }
    return SimpleNamespace(**{**fields, **changes})


def model_config(**changes: Any) -> SimpleNamespace:
    """An `HFModelConfig` of the arithmetic policy."""
    fields = {"local_path": str(POLICY), "lora_rank": 0, "lora": {}, "override_config": {}}
    return SimpleNamespace(**{**fields, **changes})
