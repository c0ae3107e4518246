"""From the configuration of a vLLM engine to the policy that decides K."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rollout_spec.config import SpeculationConfig
from rollout_spec.integrations.vllm.compat import check_version
from rollout_spec.integrations.vllm.online_calibration import SelfCalibrating
from rollout_spec.integrations.vllm.options import QUANTIZATION_PREFIX, is_self_drafter, options_of
from rollout_spec.observe.machine import cpu_model, installed_versions
from rollout_spec.policy import calibration
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.calibration import Calibration
from rollout_spec.policy.cost_model import CostModel, fit
from rollout_spec.policy.price import even_context, shape_of
from rollout_spec.policy.records import PassTiming, SpeculationPolicy

logger = logging.getLogger("rollout_spec")


def drafter_name(vllm_config: Any) -> str | None:
    """`nf4` and the like for a self-drafter, vLLM's name of the method for others, None if nothing drafts."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    if is_self_drafter(vllm_config):
        return str(speculative.quantization).removeprefix(QUANTIZATION_PREFIX)
    return str(speculative.method)


def drafts_late(vllm_config: Any) -> bool:
    """Whether a step ends before its drafts are made: on a GPU the V2 runner hands its tokens over first."""
    from vllm.platforms import current_platform

    return bool(vllm_config.use_v2_model_runner) and not current_platform.is_cpu()


def why_no_history(vllm_config: Any, options: SpeculationConfig) -> str | None:
    """Why the scheduler does not draft from text seen before in this engine; None if it does."""
    if not options.history:
        return "speculation.history is off"
    if vllm_config.speculative_config is None or not is_self_drafter(vllm_config):
        return "only the self-drafter leaves it the choice"
    if options.draft_length is not None:
        return "speculation.draft_length is fixed"
    if vllm_config.scheduler_config.async_scheduling:
        return "with asynchronous scheduling a step is scheduled before the tokens of the last are known"
    if vllm_config.model_config.enable_prompt_embeds:
        return "with enable_prompt_embeds a prompt may have no tokens"
    if vllm_config.use_v2_model_runner:
        return "vLLM's V2 model runner verifies its own drafts only; set VLLM_USE_V2_MODEL_RUNNER=0"
    return None


def draft_lengths(vllm_config: Any, captured: Sequence[int] | None) -> Sequence[int]:
    """K that can be drafted.

    vLLM carries out any K at any batch size. With a table of K its V2 runner has full graphs of those in `captured`
    alone, the table's K by batch size up to `max_num_seqs` (None without a table); so there K is one of these, if one
    of them drafts. Its V1 runner has no full graphs then.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return [0]
    longest = speculative.num_speculative_tokens
    if captured is None:
        return range(longest + 1)
    if vllm_config.use_v2_model_runner and not vllm_config.model_config.enforce_eager and any(captured):
        return captured
    return [min(k, longest) for *_, k in speculative.num_speculative_tokens_per_batch_size]


def longest_beside_drafts(vllm_config: Any, max_model_len: int) -> int | None:
    """Tokens that the longest sequence of a pass may have by its end; beyond, vLLM's V1 runner drafts zeros for all.

    None where every sequence ends for itself: with the self-drafter, and on the V2 runner.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or vllm_config.use_v2_model_runner or is_self_drafter(vllm_config):
        return None
    limit = getattr(speculative.draft_model_config, "max_model_len", None) or max_model_len
    return int(limit) - speculative.num_speculative_tokens - (speculative.method == "dflash")


def choose_policy(
    vllm_config: Any, options: SpeculationConfig, lengths: Sequence[int] | None = None
) -> SpeculationPolicy:
    """Fixed draft lengths if the configuration says so, else decisions from measured costs.

    `lengths` are those that can be drafted; None: all.
    """
    name = drafter_name(vllm_config)
    if name is None:
        return Off()
    if options.draft_length is not None:
        return Fixed(options.draft_length)
    longest = min(options.longest_draft, vllm_config.speculative_config.num_speculative_tokens)

    def make(costs: CostModel) -> AutomaticPolicy:
        return AutomaticPolicy(
            costs,
            objective=options.objective,
            longest=longest,
            margin=options.margin,
            probe_share=options.probe_share,
            explore_share=options.explore_share,
            ragged=False,
            behind_history=False,  # a pass drafts from one of the two
            seed=vllm_config.model_config.seed,
        )

    key = calibration_key(vllm_config)
    found = calibration.cached(key)

    def keep(timings: Sequence[PassTiming]) -> None:
        made = Calibration(key, tuple(timings), fit(timings), {}, brief=True)
        try:
            calibration.write(made, calibration.cache_path(key))
        except OSError as error:
            logger.warning("the measured costs could not be kept for the next engine: %s", error)

    timings = found.timings if found is not None else ()
    return SelfCalibrating(
        name, make, longest, timings, keep, drafts_late(vllm_config), kv_share(vllm_config), lengths
    )


def kv_share(vllm_config: Any) -> float | None:
    """Bytes of a context token over those of the weights that a pass reads; None for a model not known that well."""
    try:
        shape = shape_of(vllm_config.model_config.hf_text_config.to_dict())
    except ValueError:
        return None
    return 1 / even_context(shape)


def calibration_key(vllm_config: Any) -> Mapping[str, Any]:
    """What the costs of this engine depend on; JSON values."""
    from vllm.platforms import current_platform

    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    speculative, options = vllm_config.speculative_config, options_of(vllm_config)
    own = speculative is None or is_self_drafter(vllm_config)
    text = model.hf_text_config.to_dict()
    on_cpu = current_platform.is_cpu()
    return {
        "engine": f"vllm {check_version()}",
        "machine": cpu_model()[0] if on_cpu else current_platform.get_device_name(),
        "threads": (os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()) if on_cpu else None,
        "model": {name: value for name, value in text.items() if isinstance(value, (int, float))},
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache": str(vllm_config.cache_config.cache_dtype),
        "attention": str(vllm_config.attention_config.backend),
        "drafter": drafter_name(vllm_config),
        "draft_model": None if own else speculative.model,
        "quantized_head": options.quantize_lm_head if own and options is not None else None,
        "ranks": vllm_config.parallel_config.tensor_parallel_size,
        "eager": bool(model.enforce_eager),
        "graphs": str(compilation.cudagraph_mode),
        "async": bool(vllm_config.scheduler_config.async_scheduling),
        "late": drafts_late(vllm_config),
        "versions": {
            n: v for n, v in installed_versions().items() if n in ("torch", "rollout-spec", "bitsandbytes")
        },
    }
