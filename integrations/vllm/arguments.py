"""The arguments with which `vllm.LLM` and `vllm serve` run with the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from rollout_spec.config import EngineConfig, SpeculationConfig
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.integrations.vllm.compat import check_version
from rollout_spec.integrations.vllm.options import KEY, QUANTIZATION_PREFIX

SCHEDULER = "rollout_spec.integrations.vllm.scheduler.PolicyScheduler"
WORKER_EXTENSION = "rollout_spec.integrations.vllm.worker.WorkerExtension"
# K that graphs are captured for. vLLM's V2 runner captures the first `max_num_seqs` of its table only, so that of the
# calibration comes first, and then those that spread.
LENGTHS = (4, 8, 2, 16, 1, 6, 12, 3, 32, 24, 48, 64)


def llm_arguments(model: str, speculation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM(...)` or `vllm.AsyncEngineArgs(...)` that switch everything on.

    Args:
        model: The target, as vLLM takes it; the drafter is made from it.
        speculation: Fields of `SpeculationConfig`. `drafter="auto"` takes int4 on a GPU, and on a CPU the first
            of nf4, int4 and int8 that it has a kernel for, without timing them; `history` drafts where
            vLLM schedules synchronously, on its V1 runner.

    Raises:
        InvalidRequest: An unknown field, or a value out of range; the message names it.
        UnsupportedVllm: The installed vLLM is outside the supported range.
    """
    check_version()
    options = EngineConfig.from_dict({"speculation": dict(speculation or {})}).speculation
    arguments: dict[str, Any] = {
        "model": model,
        "additional_config": {KEY: _changed(options)},
        "scheduler_cls": SCHEDULER,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if options.drafter != "none":
        kind = available_kind() if options.drafter == "auto" else options.drafter
        longest = options.draft_length or options.longest_draft
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": model,
            "quantization": QUANTIZATION_PREFIX + kind,
            "num_speculative_tokens": longest,
            "draft_sample_method": "probabilistic",
            "num_speculative_tokens_per_batch_size": _graph_table(options),
        }
    return arguments


def serve_flags(model: str, speculation: Mapping[str, Any] | None = None) -> list[str]:
    """The same as words of a command line: `["vllm", "serve", *serve_flags(...)]`."""
    arguments = llm_arguments(model, speculation)
    words = [arguments.pop("model")]
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return words


def available_kind(cpu_dtype: torch.dtype = torch.bfloat16) -> str:
    """The kind of drafter that `drafter="auto"` means on this machine; `cpu_dtype` is the target's, if that is a CPU."""
    if torch.cuda.is_available():  # no trial there: it would open the device in vLLM's front end
        return "int4"
    return usual_quantizer("cpu", cpu_dtype)


def _changed(options: SpeculationConfig) -> dict[str, Any]:
    """The options that are not the defaults."""
    defaults = asdict(SpeculationConfig())
    return {name: value for name, value in asdict(options).items() if value != defaults[name]}


def _graph_table(options: SpeculationConfig) -> list[list[int]]:
    """vLLM's table of K by batch size: the scheduler decides instead, but graphs are captured for every K in it.

    0 comes first, so that it is captured for however few sequences, and last, so that it is for all of them.
    """
    longest = options.draft_length or options.longest_draft
    shorter = [] if options.draft_length else [x for x in LENGTHS if x < longest]
    lengths = [*shorter, longest] if longest > LENGTHS[0] else [longest, *shorter]
    return [[batch, batch, length] for batch, length in enumerate([0, *lengths, 0], 1)]
