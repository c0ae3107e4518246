"""What the self-drafter touches in vLLM's V1 model runner and in its quantization."""

from __future__ import annotations

from rollout_spec.integrations.vllm.contracts import touch

_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_DRAFT_MODEL = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_LAYERS = "vllm.model_executor.layers"
_QUANTIZATION = f"{_LAYERS}.quantization.base_config"
_METHODS = (
    f"{_LAYERS}.linear:UnquantizedLinearMethod",
    f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
)
_CREATE_WEIGHTS = (
    "self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, "
    "**extra_weight_attrs"
)

_FAMILIES = (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))

DRAFTER = (
    touch(
        "drafter",
        "vllm.v1.worker.gpu_model_runner:",
        ("DraftModelProposer",),
        why="rebound to ours, which is vLLM's where nothing is configured",
    ),
    touch("drafter", f"{_DRAFT_MODEL}.__init__", "self, vllm_config, device, runner=", why="overridden"),
    touch(
        "drafter",
        f"{_PROPOSER}.propose",
        "self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, next_token_ids, "
        "token_indices_to_sample, common_attn_metadata, sampling_metadata, mm_embed_inputs=, "
        "num_rejected_tokens_gpu=, slot_mappings=",
        why="overridden: it drafts on the target's KV cache",
    ),
    touch("drafter", f"{_PROPOSER}.load_model", "self, target_model", why="overridden: no KV is allocated"),
    touch("drafter", f"{_DRAFT_MODEL}._create_draft_vllm_config", "self", why="overridden: one KV layout"),
    *(
        touch(
            "drafter",
            f"vllm.model_executor.models.{module}:{name}",
            attributes,
            why="on a CPU, eagerly, the drafter computes by our decoder, over these",
        )
        for module, name, attributes in (
            *((module, f"{family}ForCausalLM", ("lm_head", "model")) for module, family in _FAMILIES),
            ("llama", "LlamaModel", ("embed_tokens", "layers", "norm")),
            ("qwen2", "Qwen2Model", ("embed_tokens", "layers", "norm")),
            *(
                (
                    module,
                    f"{family}DecoderLayer",
                    ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn"),
                )
                for module, family in _FAMILIES
            ),
            *((module, f"{family}Attention", ("attn", "o_proj", "qkv_proj")) for module, family in _FAMILIES),
            ("llama", "LlamaMLP", ("down_proj", "gate_up_proj")),
            ("qwen2", "Qwen2MLP", ("down_proj", "gate_up_proj")),
            ("qwen3", "Qwen3Attention", ("k_norm", "q_norm")),
        )
    ),
    touch(
        "drafter",
        f"{_LAYERS}.attention.attention:Attention.forward",
        "self, query, key, value, ...",
        why="attends for our decoder, with vLLM's cache",
    ),
    touch("drafter", f"{_PROPOSER}.take_last_draft_probs", "self", why="hands q to the verifier"),
    touch(
        "drafter",
        f"{_DRAFT_MODEL}._maybe_share_embeddings",
        "self, target_language_model",
        why="overridden: the embedding is the target's",
    ),
    touch(
        "drafter",
        f"{_DRAFT_MODEL}._maybe_share_lm_head",
        "self, target_language_model",
        why="overridden: an lm_head that is not quantized is the target's",
    ),
    touch(
        "drafter",
        f"{_PROPOSER}._sample_draft_tokens",
        "self, hidden_states, sampling_metadata",
        why="samples drafts from hidden states",
    ),
    touch(
        "drafter",
        f"{_PROPOSER}._sample_from_logits",
        "self, logits, sampling_metadata",
        why="overridden on CPUs: samples drafts, with q where drafting is probabilistic",
    ),
    touch(
        "drafter",
        f"{_PROPOSER}._update_positions_dependent_metadata",
        "self, positions, common_attn_metadata, batch_size, input_batch_size, block_size",
        why="advances positions, lengths and slots by one token",
    ),
    touch(
        "drafter",
        f"{_PROPOSER}.build_per_group_and_layer_attn_metadata",
        "self, common_attn_metadata, draft_index=, ...",
        why="attention metadata of a draft step",
    ),
    touch(
        "drafter", f"{_PROPOSER}._get_slot_mapping", "self, num_tokens, ...", why="KV slots of a draft step"
    ),
    touch("drafter", f"{_PROPOSER}._get_positions", "self, num_tokens", why="positions of a draft step"),
    touch(
        "drafter",
        f"{_PROPOSER}._determine_batch_execution_and_padding",
        "self, num_tokens, ...",
        why="graph mode and padding of a draft step",
    ),
    touch(
        "drafter",
        _PROPOSER,
        (
            "arange",
            "block_size",
            "input_ids",
            "token_arange_np",
            "_draft_attn_layer_names",
            "_last_draft_probs",
        ),
        why="buffers and names that the overridden propose uses",
    ),
    touch(
        "drafter",
        _RUNNER,
        (
            "drafter",
            "effective_drafter_max_model_len",
            "shared_kv_cache_layers",
            "use_async_scheduling",
            "_draft_prob_req_ids",
            "_draft_probs",
        ),
        why="which layers share a cache, up to where drafting goes on, and what drafts were sampled from",
    ),
    touch(
        "drafter",
        f"{_RUNNER}.propose_draft_token_ids",
        "self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states, "
        "aux_hidden_states, spec_decode_metadata, common_attn_metadata, slot_mappings",
        why="wrapped: a drafter that fails or may not be used drafts nothing, and at K = 0 nothing is prepared for it",
    ),
    touch(
        "drafter",
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "batch_size",
            "max_query_len",
            "num_actual_tokens",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
        why="rewritten for single-token steps",
    ),
    touch(
        "drafter",
        "vllm.forward_context:set_forward_context",
        "attn_metadata, vllm_config, *, num_tokens=, num_tokens_across_dp=, cudagraph_runtime_mode=, slot_mapping=, "
        "...",
        why="runs the drafter's forward",
    ),
    touch(
        "drafter",
        f"{_LAYERS}.attention_layer_base:AttentionLayerBase.get_kv_cache_spec",
        "self, vllm_config",
        why="replaced on the drafter's layers: nothing is allocated for them",
    ),
    touch(
        "drafter",
        "vllm.config.vllm:get_layers_from_vllm_config",
        "vllm_config, layer_type, ...",
        why="finds attention layers",
    ),
    touch(
        "drafter",
        "vllm.config.speculative:SpeculativeConfig",
        (
            "draft_model_config",
            "draft_sample_method",
            "method",
            "model",
            "num_speculative_tokens",
            "parallel_drafting",
            "quantization",
            "uses_draft_model",
        ),
        why="how users configure it",
    ),
    touch(
        "drafter",
        f"{_LAYERS}.quantization:register_quantization_config",
        "quantization",
        why="vLLM's public way to add our methods",
    ),
    touch(
        "drafter",
        f"{_QUANTIZATION}:QuantizationConfig.get_quant_method",
        "self, layer, prefix",
        why="overridden",
    ),
    touch("drafter", f"{_QUANTIZATION}:QuantizationConfig.from_config", "cls, config", why="overridden"),
    touch(
        "drafter",
        f"{_QUANTIZATION}:QuantizationConfig",
        ("get_config_filenames", "get_min_capability", "get_name", "get_supported_act_dtypes"),
        why="overridden",
    ),
    *(
        touch("drafter", f"{owner}.create_weights", _CREATE_WEIGHTS, why="extended: quantized after loading")
        for owner in _METHODS
    ),
    *(
        touch("drafter", f"{owner}.process_weights_after_loading", "self, layer", why="overridden: quantizes")
        for owner in _METHODS
    ),
    *(
        touch("drafter", f"{owner}.apply", "self, layer, x, bias=", why="overridden: quantized product")
        for owner in _METHODS
    ),
    touch(
        "drafter",
        f"{_METHODS[1]}.tie_weights",
        "self, layer, embed_tokens",
        why="overridden: a tied head is quantized with its embedding",
    ),
    touch(
        "drafter",
        "vllm.utils.torch_utils:direct_register_custom_op",
        "op_name, op_func, *, fake_impl=, ...",
        why="the quantized linear as one operation for torch.compile",
    ),
)

_OPERATORS = "vllm._custom_ops"

MARLIN = (
    touch(
        "marlin",
        f"{_OPERATORS}:gptq_marlin_repack",
        "b_q_weight, size_k, size_n, num_bits, ...",
        "b_q_weight, perm, size_k, size_n, num_bits, ...",
        why="packs int4 weights",
    ),
    touch(
        "marlin",
        f"{_OPERATORS}:marlin_gemm",
        "a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, workspace, b_q_type, size_m, size_n, size_k, "
        "...",
        "a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type, size_m, "
        "size_n, size_k, ...",
        why="multiplies with them",
    ),
    touch("marlin", "vllm.scalar_type:scalar_types", ("uint4",), why="codes with zero points"),
)
