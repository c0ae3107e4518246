"""What the self-drafter cannot serve, refused at start with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from rollout_spec.config import SpeculationConfig
from rollout_spec.contracts import InvalidRequest, invalid
from rollout_spec.integrations.vllm.options import QUANTIZATION_PREFIX, is_self_drafter

V1 = "set VLLM_USE_V2_MODEL_RUNNER=0 to run on the V1 runner"
_ELSE = "use another speculative method (the policy works with all of them), or leave speculative_config out"


def refuse(vllm_config: Any) -> None:
    """Raise InvalidRequest, naming the field, if this engine's configuration cannot have a self-drafter.

    Tensor parallelism is served: every rank quantizes the shards it loaded, and the logits that drafts are sampled
    from are gathered to all ranks, which draw with generators of the same seed, as vLLM's own draft models do.
    """
    for field, value, reason in _reasons(vllm_config):
        raise invalid(field, value, reason)


def refuse_coupled_v2() -> NoReturn:
    """Raise InvalidRequest: the V2 runner samples by kernels of its own."""
    raise invalid("speculation.verifier", "coupled", f"the V2 model runner samples by its own kernels; {V1}")


def refuse_data_parallel(vllm_config: Any) -> None:
    """Raise InvalidRequest if there are data-parallel ranks, which would not decide alike."""
    ranks = vllm_config.parallel_config.data_parallel_size
    if ranks > 1:
        reason = (
            "every rank would decide from its own times, and ranks that disagree wait for each other for ever"
        )
        raise invalid("data_parallel_size", ranks, f"{reason}; run one engine per rank instead")


def refuse_ignored(vllm_config: Any, options: SpeculationConfig) -> None:
    """Raise InvalidRequest for an option that vLLM's own arguments overrule, or that nothing here carries out."""
    speculative = vllm_config.speculative_config
    if options.adaptive:
        remedy = 'vLLM takes no drafter while it runs; use backend="torch", or name a trained one in speculative_config'
        raise invalid("speculation.adaptive", True, remedy)
    made = None
    if is_self_drafter(vllm_config):
        made = str(speculative.quantization).removeprefix(QUANTIZATION_PREFIX)
    if options.drafter not in ("auto", made or "none"):
        wanted = f"without {QUANTIZATION_PREFIX}{made}"
        if options.drafter != "none":
            wanted = f'with "quantization": "{QUANTIZATION_PREFIX}{options.drafter}"'
        raise invalid(
            "speculation.drafter",
            options.drafter,
            f"give a speculative_config {wanted}, which decides it (llm_arguments and serve_flags write one), or leave "
            "the option out",
        )
    if speculative is not None and (options.draft_length or 0) > speculative.num_speculative_tokens:
        raise invalid(
            "speculation.draft_length",
            options.draft_length,
            f"use at most speculative_config.num_speculative_tokens={speculative.num_speculative_tokens}, or raise that",
        )


def check_layers(vllm_config: Any, layers: Mapping[str, Any], pairs: Mapping[str, str]) -> None:
    """Raise InvalidRequest if a drafter's attention layer cannot use the cache of the target's.

    Args:
        vllm_config: Of the target.
        layers: Every attention layer by name, before any was told to allocate nothing.
        pairs: Target layer of each drafter layer, by name.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    remaining = set(layers) - set(pairs) - set(pairs.values())
    for name in sorted(remaining):
        if layers[name].get_kv_cache_spec(vllm_config) is not None:
            raise invalid("model", name, f"the drafter has no layer like it; {_ELSE}")
    for name, target in pairs.items():
        if target not in layers:
            raise invalid(
                "speculative_config.model", name, "not a layer of the target: name the target's own model"
            )
        own, spec = (layers[x].get_kv_cache_spec(vllm_config) for x in (name, target))
        shared = getattr(layers[target], "kv_sharing_target_layer_name", None)
        if shared is not None:
            raise invalid("model", target, f"it shares the KV cache of {shared}: not supported; {_ELSE}")
        if type(spec) is not FullAttentionSpec:
            kind = "nothing" if spec is None else type(spec).__name__
            raise invalid("model", target, f"full attention is needed, this layer caches {kind}; {_ELSE}")
        if own != spec or layers[name].get_attn_backend() is not layers[target].get_attn_backend():
            raise InvalidRequest(
                f"{name}: its KV cache differs from the target's ({own} against {spec}); "
                "leave attention_backend and kv_cache_dtype out of speculative_config"
            )


def _reasons(vllm_config: Any) -> Iterator[tuple[str, object, str]]:
    """(field, value, why not and what to do) of everything that stands against a self-drafter."""
    refuse_data_parallel(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative, text = vllm_config.speculative_config, model.hf_text_config
    for ranks in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, ranks, 1) > 1:
            yield ranks, getattr(parallel, ranks), "the drafter needs the whole KV cache on its rank; use 1"
    if speculative.method != "draft_model":
        yield "speculative_config.method", speculative.method, "use draft_model"
    if speculative.model != model.model:
        yield (
            "speculative_config.model",
            speculative.model,
            f"the drafter is made from the target: {model.model!r}",
        )
    for field in ("kv_cache_dtype", "attention_backend"):
        if getattr(speculative, field, None) is not None:
            yield (
                f"speculative_config.{field}",
                getattr(speculative, field),
                "it is the target's; leave it out",
            )
    for field in (
        "parallel_drafting",
        "use_heterogeneous_vocab",
        "disable_padded_drafter_batch",
        "use_local_argmax_reduction",
    ):
        if getattr(speculative, field, False):
            yield f"speculative_config.{field}", True, "the self-drafter drafts in its own way; leave it out"
    if model.is_multimodal_model or model.uses_mrope or model.is_encoder_decoder:
        yield "model", model.model, f"the self-drafter reads text alone; {_ELSE}"
    if model.use_mla:
        yield (
            "model",
            model.model,
            f"its attention keeps latents, which the self-drafter was not tried on; {_ELSE}",
        )
    if model.is_moe:
        yield "model", model.model, f"its experts would stay unquantized, so drafting could not pay; {_ELSE}"
    if model.is_hybrid or model.has_inner_state or model.is_attention_free:
        yield "model", model.model, f"its recurrent state cannot be rolled back after a rejection; {_ELSE}"
    if _slides(text):
        window = model.get_sliding_window()
        yield "sliding_window", window, f"the window's cache drops keys that the drafter reads; {_ELSE}"
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        yield "kv_connector", connector, f"it would pass on keys that are only provisional; {_ELSE}"


def _slides(text_config: Any) -> bool:
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return getattr(text_config, "sliding_window", None) is not None
