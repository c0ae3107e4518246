"""The table of contracts: everything in vLLM that a part of the plugin calls, overrides, reads or rebinds.

A part is refused by name where one of its touches does not fit; `unfit_in` names the releases in which that is known.
docs/vllm-versions.md says what follows for users.
"""

from __future__ import annotations

from rollout_spec.integrations.vllm.contracts import touch
from rollout_spec.integrations.vllm.touches_drafter import DRAFTER, MARLIN
from rollout_spec.integrations.vllm.touches_v2 import DRAFTER_V2

PARTS = {
    "drafter": "the quantized self-drafter on the V1 model runner",
    "drafter_v2": "the quantized self-drafter on the V2 model runner",
    "marlin": "int4 linears on a GPU by vLLM's kernel; PyTorch's takes its place",
    "policy": "on, off and K of every step, in the scheduler",
    "sampling": "requests whose parameters vLLM refuses beside speculation",
    "sampling_cpu": "speculation at temperature > 0 on CPU (vllm#55005)",
    "draws": "coupled verification; on a CPU, draws by one random number",
    "hidden_states": "hidden states of the target, for training a drafter",
    "weights": "update_weights, the canary and plain passes",
}

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_LAYERS = "vllm.model_executor.layers"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_RELOAD = "vllm.model_executor.model_loader.reload"

POLICY = (
    touch("policy", f"{_SCHEDULER}.schedule", "self, throttle_prefills=", why="extended: decides K"),
    touch(
        "policy",
        f"{_SCHEDULER}.update_from_output",
        "self, scheduler_output, model_runner_output",
        why="extended: learns what was accepted, and when",
    ),
    touch("policy", f"{_SCHEDULER}.update_draft_token_ids", "self, draft_token_ids", why="receives drafts"),
    touch(
        "policy",
        f"{_SCHEDULER}._update_after_schedule",
        "self, scheduler_output",
        why="extended: K is decided before placeholders for it are made",
    ),
    touch(
        "policy",
        f"{_SCHEDULER}._free_request",
        "self, request, delay_free_blocks=",
        why="extended: history keeps the answers of requests that end",
    ),
    touch(
        "policy",
        f"{_SCHEDULER}.reset_prefix_cache",
        "self, reset_running_requests=, reset_connector=",
        why="extended: every weight update ends with it",
    ),
    touch(
        "policy",
        "vllm.v1.outputs:ModelRunnerOutput",
        ("req_id_to_index", "sampled_token_ids"),
        why="what was emitted",
    ),
    touch(
        "policy",
        "vllm.v1.engine.core:EngineCore.post_step",
        "self, model_executed",
        why="wrapped: drafts are asked for only where some were made",
    ),
    touch("policy", "vllm.v1.engine.core:EngineCore", ("scheduler",), why="says whether drafts were made"),
    touch(
        "policy",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        "self, scheduler_output",
        why="asynchronous scheduling reserves K placeholders here",
    ),
    touch(
        "policy",
        "vllm.v1.core.sched.output:SchedulerOutput",
        (
            "num_scheduled_tokens",
            "num_spec_tokens_to_schedule",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
        why="carries K to the runner, and says whether a step does nothing but decode",
    ),
    touch(
        "policy",
        _SCHEDULER,
        (
            "dynamic_sd_lookup",
            "finished_req_ids",
            "max_model_len",
            "num_spec_tokens",
            "requests",
            "running",
            "scheduler_config",
            "vllm_config",
            "waiting",
        ),
        why="read by the policy",
    ),
    touch(
        "policy",
        "vllm.v1.request:Request",
        (
            "cache_salt",
            "is_finished",
            "max_tokens",
            "num_computed_tokens",
            "num_output_placeholders",
            "num_output_tokens",
            "num_prompt_tokens",
            "num_tokens",
            "output_token_ids",
            "prompt_token_ids",
            "request_id",
            "sampling_params",
            "spec_token_ids",
            "status",
            "structured_output_request",
        ),
        why="read by the policy",
    ),
    touch("policy", "vllm.config.model:ModelConfig", ("enable_prompt_embeds",), why="prompts without tokens"),
    touch(
        "policy",
        "vllm.config.speculative:SpeculativeConfig",
        (
            "draft_model_config",
            "method",
            "model",
            "num_speculative_tokens",
            "num_speculative_tokens_per_batch_size",
        ),
        why="which K there is, and up to where",
    ),
    touch("policy", "vllm.config.model:ModelConfig", ("enforce_eager",), why="whether K is bound to graphs"),
    touch("policy", "vllm.config.model:ModelConfig", ("quantization",), why="what kept costs depend on"),
    touch("policy", "vllm.config.cache:CacheConfig", ("cache_dtype",), why="what kept costs depend on"),
    touch("policy", "vllm.config.attention:AttentionConfig", ("backend",), why="what kept costs depend on"),
    touch(
        "policy",
        "vllm.config.vllm:VllmConfig",
        ("additional_config", "attention_config", "cache_config", "use_v2_model_runner"),
        why="how users configure it",
    ),
    touch(
        "policy",
        f"{_RUNNER}._input_fits_in_drafter",
        "self, common_attn_metadata",
        why="up to where the V1 runner drafts for a batch",
    ),
    touch("policy", _SCHEDULER, ("kv_cache_config",), why="metrics: blocks spent on the drafter"),
    touch(
        "policy",
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        ("kv_cache_groups", "num_blocks"),
        why="metrics: blocks spent on the drafter",
    ),
    touch(
        "policy",
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        ("kv_cache_spec", "layer_names"),
        why="metrics: blocks spent on the drafter",
    ),
    touch(
        "policy",
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        ("kv_cache_specs",),
        why="metrics: blocks spent on the drafter",
    ),
    touch(
        "policy",
        "vllm.v1.kv_cache_interface:KVCacheSpec",
        ("page_size_bytes",),
        why="metrics: blocks spent on the drafter",
    ),
)

HIDDEN_STATES = (
    touch(
        "hidden_states",
        f"{_PROPOSER}.__init__",
        "self, vllm_config, device, pass_hidden_states_to_model, runner=",
        why="wrapped: keeps the runner",
    ),
    touch(
        "hidden_states",
        f"{_PROPOSER}.propose",
        "self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, next_token_ids, "
        "token_indices_to_sample, common_attn_metadata, sampling_metadata, mm_embed_inputs=, "
        "num_rejected_tokens_gpu=, slot_mappings=",
        why="wrapped: sees what the target computed",
    ),
    touch("hidden_states", _RUNNER, ("input_batch",), why="requests of the rows"),
    touch(
        "hidden_states",
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        ("batch_size", "query_start_loc"),
        why="rows of each request",
    ),
)

SAMPLING = (
    touch(
        "sampling",
        "vllm.v1.engine.input_processor:InputProcessor",
        ("speculative_config",),
        why="cleared: it is read only to refuse requests",
    ),
    touch(
        "sampling",
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        "self, vllm_config, ...",
        why="wrapped",
    ),
    touch(
        "sampling",
        "vllm.v1.worker.gpu_model_runner:",
        ("build_logitsprocs",),
        why="wrapped: processors that vLLM leaves out when it speculates are loaded",
    ),
    touch(
        "sampling",
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        "vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=",
        why="wrapped",
    ),
    touch(
        "sampling_cpu",
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        "x, cu_num_tokens, num_tokens, replace_from=, replace_to=",
        why="probed for vllm#55005",
    ),
    touch(
        "sampling_cpu",
        "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=",
        why="replaced where the probe finds vllm#55005",
    ),
    touch(
        "sampling_cpu",
        "vllm.triton_utils.dispatcher:KernelOverride.__init__",
        "self, kernel, impl",
        why="what vLLM wraps a kernel's replacement on CPU in",
        unfit_in=("0.24.0",),
    ),
)

DRAWS = (
    touch(
        "draws",
        f"{_RUNNER}._sample",
        "self, logits, spec_decode_metadata",
        why="wrapped: what a pass draws with",
    ),
    touch(
        "draws",
        "vllm.v1.sample.rejection_sampler:rejection_sample",
        "draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits, "
        "bonus_token_ids, sampling_metadata, ...",
        why="wrapped: verifies drafts otherwise",
    ),
    touch(
        "draws",
        f"{_PROPOSER}._sample_draft_tokens",
        "self, hidden_states, sampling_metadata",
        why="wrapped: drafts with the noise that the target chooses with",
    ),
    touch(
        "draws",
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
        "self, metadata, draft_probs, logits, sampling_metadata",
        why="processes the logits that are verified",
    ),
    touch(
        "draws",
        "vllm.v1.sample.sampler:Sampler",
        ("topk_topp_sampler",),
        why="stood in for, so that plain and bonus rows are drawn otherwise",
    ),
    touch(
        "draws",
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native",
        "self, logits, generators, k, p",
        why="stood in for",
    ),
    touch(
        "draws",
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        "logits, k, p, ...",
        why="cuts distributions, the drafter's as the target's",
    ),
    touch(
        "draws",
        "vllm.v1.sample.metadata:SamplingMetadata",
        ("all_greedy", "all_random", "generators", "temperature", "top_k", "top_p"),
        why="carries what draws in place of generators",
    ),
    touch(
        "draws",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        ("cu_num_draft_tokens", "num_draft_tokens"),
        why="which rows are verified",
    ),
    touch(
        "draws",
        _RUNNER,
        ("device", "input_batch", "positions", "query_start_loc", "requests", "sampler"),
        why="request and position of every row",
    ),
)

WEIGHTS = (
    *(
        touch("weights", f"{_RELOAD}.layerwise:{name}", form, why="new weights in place, layer by layer")
        for name, form in (
            ("initialize_layerwise_reload", "model"),
            ("finalize_layerwise_reload", "*args, **kwargs"),
            ("finalize_layerwise_processing", "model, model_config"),
            ("get_layerwise_info", "layer"),
        )
    ),
    touch(
        "weights",
        f"{_RELOAD}.types:LayerReloadingInfo",
        ("can_load", "load_numel", "load_numel_total", "loaded_weights"),
        why="tells which layers lack weights",
    ),
    touch(
        "weights",
        f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding",
        ("embedding_dim", "shard_indices"),
        why="rows that pad the vocabulary are never sent",
    ),
    touch(
        "weights",
        _RUNNER,
        (
            "drafter",
            "input_batch",
            "propose_draft_token_ids",
            "speculative_config",
            "use_async_scheduling",
            "_draft_prob_req_ids",
            "_draft_probs",
        ),
        why="a drafter that may not draft, or raised, leaves what the next step needs",
    ),
    touch(
        "weights",
        _PROPOSER,
        ("propose", "_last_draft_probs"),
        why="wrapped: a drafter that raises is stopped",
    ),
    touch("weights", "vllm.v1.worker.gpu_input_batch:InputBatch", ("num_reqs",), why="rows of no drafts"),
    touch("weights", f"{_RUNNER}.get_model", "self", why="the target"),
    touch("weights", "vllm.v1.worker.gpu_worker:Worker.sleep", "self, level=", why="wrapped"),
    touch(
        "weights",
        "vllm.v1.worker.gpu_worker:Worker.wake_up",
        "self, tags=",
        why="wrapped: the canary waits for it",
    ),
    touch("weights", "vllm.v1.engine.llm_engine:LLMEngine.sleep", "self, level=, mode=", why="pauses"),
    touch("weights", "vllm.v1.engine.llm_engine:LLMEngine.wake_up", "self, tags=", why="goes on"),
    touch(
        "weights",
        "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc",
        "self, method, timeout=, args=, kwargs=",
        why="reaches every worker",
    ),
    touch(
        "weights",
        "vllm.v1.engine.llm_engine:LLMEngine.reset_prefix_cache",
        "self, reset_running_requests=, reset_connector=",
        why="drops what the old weights computed",
    ),
    touch(
        "weights",
        "vllm.config.vllm:set_current_vllm_config",
        "vllm_config, ...",
        why="layers read it as they load",
    ),
    touch(
        "weights",
        "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder",
        "self, ubatch_id=",
        why="plain passes, for the canary",
    ),
    touch(
        "weights",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "self, common_prefix_len, common_attn_metadata, ...",
        why="plain passes, for the canary",
    ),
    touch("weights", _RUNNER, ("attn_groups", "kv_cache_config"), why="plain passes, for the canary"),
    touch("weights", f"{_RUNNER}.get_draft_model", "self", why="the drafter", unfit_in=("0.24.0",)),
    touch(
        "weights",
        f"{_LAYERS}.attention:",
        ("is_deferred_attention_layer",),
        why="layers that come after all others",
        unfit_in=("0.24.0",),
    ),
    touch(
        "weights",
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.reset_lora_state",
        "self",
        why="merged adapters follow new weights",
        unfit_in=("0.24.0",),
    ),
)

TOUCHES = (*DRAFTER, *MARLIN, *DRAFTER_V2, *POLICY, *SAMPLING, *DRAWS, *HIDDEN_STATES, *WEIGHTS)
