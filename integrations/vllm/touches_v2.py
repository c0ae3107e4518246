"""What the self-drafter touches in vLLM's V2 model runner."""

from __future__ import annotations

from rollout_spec.integrations.vllm.contracts import touch

_GPU = "vllm.v1.worker.gpu"
_ATTENTION = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"
_SPECULATOR = f"{_GPU}.spec_decode.speculator:DraftModelSpeculator"
# 0.32 renamed the class; 0.24 has neither.
_STANDALONE = (
    f"{_GPU}.spec_decode.standalone_ar.speculator:StandaloneARSpeculator",
    f"{_GPU}.spec_decode.draft_model.speculator:PlainDraftModelSpeculator",
)
_PROPOSE_V2 = (
    "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
    "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, "
)


def _each(name: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for owner in _STANDALONE)


DRAFTER_V2 = (
    touch(
        "drafter_v2",
        f"{_GPU}.model_runner:",
        ("DraftModelSpeculator", "GPUModelRunner", "init_speculator"),
        why="init_speculator is rebound, the construction checked",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.model_runner:GPUModelRunner.execute_model",
        "self, scheduler_output, ...",
        why="wrapped: the scheduler's figures travel with its output",
    ),
    touch("drafter_v2", f"{_GPU}.model_runner:GPUModelRunner", ("speculator",), why="its propose is wrapped"),
    touch(
        "drafter_v2",
        f"{_GPU}.spec_decode:init_speculator",
        "vllm_config, device",
        "vllm_config, device, req_states",
        why="wrapped",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.spec_decode.speculator:BaseSpeculator.propose",
        _PROPOSE_V2
        + "dp_sync_state=, dummy_run=, skip_attn_for_dummy_run=, mm_inputs=, is_profile=, num_speculative_tokens=",
        why="overridden; without num_speculative_tokens neither off nor K could be carried out",
        unfit_in=("0.24.0", "0.31.0"),
    ),
    touch("drafter_v2", f"{_SPECULATOR}.__init__", "self, vllm_config, device", why="extended"),
    touch(
        "drafter_v2", f"{_SPECULATOR}.load_model", "self, target_model", why="extended: no KV is allocated"
    ),
    touch(
        "drafter_v2",
        _each("set_attn"),
        "self, model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups",
        why="extended: the drafter joins its target's KV group",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        _each("_run_model"),
        "self, input_ids, positions, attn_metadata, slot_mappings, num_tokens_across_dp",
        why="the drafter's forward",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        _STANDALONE,
        ("arange_gpu", "current_draft_step", "num_extra_query_per_req"),
        why="buffers that the overridden propose uses",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        _SPECULATOR,
        (
            "block_tables",
            "draft_attn_layer_names",
            "draft_logits",
            "draft_max_seq_len",
            "draft_tokens",
            "idx_mapping",
            "input_buffers",
            "kv_cache_config",
            "max_model_len",
            "num_speculative_steps",
            "seeds",
            "temperature",
        ),
        why="buffers that the overridden propose uses",
    ),
    touch(
        "drafter_v2",
        f"{_SPECULATOR}.sample_draft",
        "self, hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits, ...",
        why="samples drafts and keeps q for the verifier; index -1 keeps nothing",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        f"{_SPECULATOR}._copy_request_inputs",
        "self, num_reqs, idx_mapping, temperature, seeds, ...",
        why="inputs of a batch",
    ),
    touch(
        "drafter_v2",
        f"{_SPECULATOR}._build_uniform_attn_metadata",
        "self, batch_desc, num_reqs, num_query_per_req, seq_lens_cpu_upper_bound, step, ...",
        why="attention metadata of a draft step",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.block_table:BlockTables.compute_slot_mappings",
        "self, idx_mapping, query_start_loc, positions, num_tokens_padded, ...",
        why="KV slots of a draft step; index -1 owns none",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.attn_utils:build_slot_mappings_by_layer",
        "slot_mappings, kv_cache_config",
        why="KV slots by layer",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.input_batch:InputBatch",
        ("idx_mapping", "num_reqs", "seq_lens", "seq_lens_cpu_upper_bound"),
        why="what the target has just computed",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.input_batch:InputBuffers",
        ("input_ids", "positions", "query_start_loc", "seq_lens"),
        why="the drafter's inputs",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.cudagraph_utils:BatchExecutionDescriptor",
        ("cg_mode", "num_reqs", "num_tokens", "uniform_token_count"),
        why="constructed",
    ),
    touch(
        "drafter_v2",
        f"{_ATTENTION}.bind_kv_cache",
        "self, kv_cache",
        why="gives the drafter's layers the target's cache",
        unfit_in=("0.24.0",),
    ),
    touch(
        "drafter_v2",
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        ("kv_cache_groups",),
        why="copied, with the drafter's layers in their target's group",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.spec_decode.target_dependent_ar.cudagraph_utils:SpeculatorCudaGraphManager.capture",
        "self, forward_fn, model_state, input_buffers, block_tables, attn_groups, kv_cache_config, progress_bar_desc=, "
        "...",
        why="captures a draft step per batch size",
        unfit_in=("0.24.0", "0.31.0"),
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.cudagraph_utils:CudaGraphManager.__init__",
        "self, vllm_config, device, cudagraph_mode, decode_query_len, ...",
        why="constructed",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.cudagraph_utils:CudaGraphManager.dispatch",
        "self, num_reqs, num_tokens, uniform_token_count, num_active_loras, ...",
        why="finds the graph of a batch",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.cudagraph_utils:CudaGraphManager.run_fullgraph",
        "self, desc",
        why="runs it",
    ),
    touch(
        "drafter_v2",
        f"{_GPU}.cudagraph_utils:CudaGraphManager",
        ("release_graphs",),
        why="graphs of a KV cache that is gone must not run",
        unfit_in=("0.24.0", "0.31.0"),
    ),
    touch(
        "drafter_v2",
        _each("init_cudagraph_manager"),
        "self, cudagraph_mode",
        why="overridden: plans the graphs",
        unfit_in=("0.24.0",),
    ),
    touch("drafter_v2", _each("capture"), "self", why="overridden: captures them", unfit_in=("0.24.0",)),
    touch(
        "drafter_v2",
        f"{_SPECULATOR}._update_draft_decode_metadata",
        "self, attn_metadata, num_reqs",
        why="tells attention of a step inside a graph",
        unfit_in=("0.24.0", "0.31.0"),
    ),
    touch(
        "drafter_v2",
        _SPECULATOR,
        ("attn_groups", "model_state", "supports_decode_metadata_update"),
        why="what a graph is captured with, and whether it can be",
        unfit_in=("0.24.0", "0.31.0"),
    ),
    touch(
        "drafter_v2",
        "vllm.v1.worker.utils:AttentionGroup",
        ("kv_cache_group_id", "map_to_kernel_block_table"),
        why="block tables as the kernels in a graph read them",
        unfit_in=("0.24.0", "0.31.0"),
    ),
)
