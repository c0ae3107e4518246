"""The part of `compat` that touches vLLM's worker: reloading in place, plain passes, and decoding without drafts.

Each function says what it relies on; `tests/vllm/test_updates.py` fails when one of them no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rollout_spec.contracts import RolloutSpecError, invalid
from rollout_spec.integrations.vllm.compat_v2 import watch_proposing
from rollout_spec.integrations.vllm.hidden_states import capturing, show
from rollout_spec.integrations.vllm.options import DRAFT_PREFIX, is_self_drafter, options_of
from rollout_spec.integrations.vllm.sampling import rebind

if TYPE_CHECKING:
    from rollout_spec.integrations.vllm.worker import WorkerPolicy

_POLICY = "rollout_spec_policy"
_CHUNK = 512  # tokens of one plain pass


def attach_policy(runner: Any, policy: WorkerPolicy) -> None:
    """Keep the policy's state where everything that sees the runner finds it."""
    setattr(runner, _POLICY, policy)


def attached_policy(runner: Any) -> WorkerPolicy | None:
    """What `attach_policy` kept."""
    policy: WorkerPolicy | None = getattr(runner, _POLICY, None)
    return policy


def drafter_of(runner: Any) -> Any:
    """What drafts, None without one; the V2 runner calls it its speculator."""
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def watch_sleep(module: ModuleType) -> None:
    """Touch `vllm.v1.worker.gpu_worker`: let a worker know whether its KV cache has memory.

    Trainers wake the weights, bring new ones, and wake the cache last; until then a pass of a model would read what
    is not there. vLLM keeps this in the executor, where no worker sees it.
    """
    rebind(module.Worker, "sleep", _tell_asleep)
    rebind(module.Worker, "wake_up", _tell_awake)


def _tell_asleep(sleep: Callable[..., None]) -> Callable[..., None]:
    def telling(self: Any, *args: Any, **options: Any) -> None:
        sleep(self, *args, **options)
        self.rollout_spec_cache_asleep = True

    return telling


def _tell_awake(wake_up: Callable[..., None]) -> Callable[..., None]:
    def telling(self: Any, tags: Any = None) -> None:
        wake_up(self, tags)
        if tags is None or "kv_cache" in tags:
            self.rollout_spec_cache_asleep = False
            if hasattr(self, "rollout_spec_cache_woke"):
                self.rollout_spec_cache_woke()

    return telling


def watch_drafting(
    runner: Any,
    allowed: Callable[[], bool],
    failed: Callable[[Exception], None],
    told: Callable[[dict[str, Any]], None],
) -> None:
    """Draft nothing where `allowed` says no, or where the drafter raises, which `failed` is told.

    `told` gets the scheduler's figures of every step, which travel with its output.

    vLLM lets an exception in a drafter end the engine, and runs the models of its own drafters at `K = 0` too. So the
    drafter's own method is wrapped beside the runner's, and one that raised is not run again before `allowed` has said
    yes. With several ranks it does end the engine: those that stop alone leave the others waiting for them.
    """
    if hasattr(runner, "speculator"):
        watch_proposing(runner, allowed, failed, told)
        return
    if getattr(runner.propose_draft_token_ids, "rollout_spec", False):
        return
    propose, drafter = runner.propose_draft_token_ids, runner.drafter
    alone = runner.vllm_config.parallel_config.tensor_parallel_size == 1
    raised = False

    def guarded(*args: Any, **options: Any) -> Any:
        nonlocal raised
        if not raised:
            try:
                return type(drafter).propose(drafter, *args, **options)
            except Exception as error:
                if not alone:
                    raise
                raised = True
                failed(error)
        else:
            show(runner, options)
        drafter._last_draft_probs = None
        none = no_drafts(runner, options.get("num_speculative_tokens", args[0] if args else 0))
        if runner.speculative_config.method == "ngram_gpu":  # how many of them count is returned too
            return none, torch.zeros(len(none), dtype=torch.int32, device=runner.device)
        return none

    def watched(scheduler_output: Any, *args: Any, **options: Any) -> Any:
        nonlocal raised
        figures = getattr(scheduler_output, "rollout_spec", None)
        if figures is not None:
            told(figures)
        wanted, usable = scheduler_output.num_spec_tokens_to_schedule, allowed()
        raised = raised and not usable
        if usable or not wanted:
            return propose(scheduler_output, *args, **options)
        # vLLM's own way to say that nothing is to be drafted.
        scheduler_output.num_spec_tokens_to_schedule = 0
        propose(scheduler_output, *args, **options)
        runner._draft_probs = runner._draft_prob_req_ids = None
        return no_drafts(runner, wanted)

    watched.rollout_spec = True  # type: ignore[attr-defined]
    runner.propose_draft_token_ids, drafter.propose = watched, guarded


def no_drafts(runner: Any, wanted: int) -> Tensor | list[list[int]]:
    """What the V1 runner takes from a drafter that drafts nothing, where `wanted` tokens a request were asked for.

    Scheduled asynchronously, the next step expects as many: they are token 0, which is judged as any other guess.
    """
    batch = runner.input_batch.num_reqs
    if not runner.use_async_scheduling:
        return [[] for _ in range(batch)]
    return torch.zeros(batch, wanted, dtype=torch.int64, device=runner.device)


def skip_idle_drafting(module: ModuleType) -> None:
    """Touch `vllm.v1.worker.gpu_model_runner`: at K = 0 do not prepare the inputs of a drafter that has nothing to do.

    vLLM prepares them in every step, because its own draft models keep a KV cache of their own up to date. The
    self-drafter and n-grams keep nothing. Drafters read tokens from the host here; asynchronous scheduling has the
    next step read them from what is prepared, and so is left alone.
    """
    rebind(module.GPUModelRunner, "propose_draft_token_ids", _skip_idle)


def _skip_idle(propose: Callable[..., Any]) -> Callable[..., Any]:
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if scheduler_output.num_spec_tokens_to_schedule == 0 and _idles(self) and not capturing():
            self._draft_probs = self._draft_prob_req_ids = None
            return []
        return propose(self, scheduler_output, *args, **options)

    return propose_draft_token_ids


def _idles(runner: Any) -> bool:
    """Whether this runner's drafter keeps nothing from steps in which it does not draft; looked up once."""
    try:
        idles: bool = runner._rollout_spec_idles
    except AttributeError:
        config = runner.vllm_config
        stateless = is_self_drafter(config) or config.speculative_config.method == "ngram"
        idles = options_of(config) is not None and stateless and not runner.use_async_scheduling
        runner._rollout_spec_idles = idles
    return idles


def current_config(vllm_config: Any) -> AbstractContextManager[Any]:
    """vLLM's layers read their configuration from this context while they load."""
    from vllm.config import set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(vllm_config)
    return context


# --- from outside ------------------------------------------------------------------------------------------


def pending_outputs(engine: Any) -> bool:
    """Whether outputs of steps that are over wait to be taken: vLLM in a process of its own runs ahead of `step`."""
    queue = getattr(engine.engine_core, "outputs_queue", None)
    return queue is not None and not queue.empty()


def shares_process(engine: Any) -> bool:
    """Whether the only worker lives in this process and can be handed tensors."""
    executor = getattr(engine, "model_executor", None)
    return getattr(executor, "driver_worker", None) is not None


def scheduler(engine: Any) -> Any:
    """The scheduler of an engine in this process."""
    _require_in_process(engine)
    return engine.engine_core.engine_core.scheduler


def model_runner(engine: Any) -> Any:
    """The runner of an engine in this process."""
    _require_in_process(engine)
    return engine.model_executor.driver_worker.worker.model_runner


def switch_coupled(engine: Any, coupled: bool) -> None:
    """Take the counter-based noise from an engine that started as coupled, or give it back."""
    from rollout_spec.integrations.vllm.draws import noise_source

    runner = model_runner(engine)
    parked = getattr(runner, "_rollout_spec_parked", None) or noise_source(runner)
    if parked is None:
        raise invalid("coupled", coupled, 'start the engine with speculation={"verifier": "coupled"}')
    runner._rollout_spec_parked = parked
    runner._rollout_spec_noise = parked if coupled else None


def _require_in_process(engine: Any) -> None:
    if not shares_process(engine):
        raise RolloutSpecError(
            "this looks into the engine, which runs in another process: set VLLM_ENABLE_V1_MULTIPROCESSING=0"
        )


# --- reloading in place ------------------------------------------------------------------------------------


def begin_reload(model: nn.Module) -> None:
    """Prepare every layer for new weights; the tensors it computes with stay where they are (graphs hold them)."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Process what the last weights completed."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    pack_tied_heads(model)


def pack_tied_heads(model: nn.Module) -> None:
    """Let tied heads follow their embedding.

    On a CPU vLLM computes with a packed copy of the head's weight, and its reload processes only one of the layers that
    share a parameter (limitation 2 in vllm.model_executor.model_loader.reload): the head would stay the old policy's.
    """
    for head in _tied_heads(model):
        head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr,operator]


def abandon_reload(model: nn.Module, model_config: Any) -> None:
    """Forget what arrived for unfinished layers; vLLM then gives them their former tensors back."""
    for _, info in _unfinished(model):
        info.loaded_weights.clear()
        info.load_numel = 0
    finish_reload(model, model_config)


def incomplete_layers(model: nn.Module) -> list[str]:
    """Layers that lack weights. vLLM itself would warn and keep the old ones, or compute with what memory holds."""
    lacking = []
    tied = _tied_heads(model)
    for name, layer in model.named_modules():
        info = _info(layer)
        if not info.can_load() or _is_attention(layer) or layer in tied:
            continue
        if info.load_numel < (info.load_numel_total or 0) - _padding(layer) - _tables(layer):
            lacking.append(name)
    return lacking


def _info(layer: nn.Module) -> Any:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)


def _unfinished(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        info = _info(layer)
        if info.can_load():
            yield name, info


def _is_attention(layer: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(layer))


def _tied_heads(model: nn.Module) -> set[nn.Module]:
    """Heads that are their model's embedding: nothing is sent for them."""
    config = getattr(model, "config", None)
    head = getattr(model, "lm_head", None)
    return {head} if head is not None and getattr(config, "tie_word_embeddings", False) else set()


def _padding(layer: nn.Module) -> int:
    """Elements of a layer's weight that no checkpoint fills: rows that pad the vocabulary, on this rank."""
    indices = getattr(layer, "shard_indices", None)
    if indices is None:
        return 0
    padding = indices.num_elements_padded - indices.num_org_elements
    return int(padding * layer.embedding_dim)


def _tables(layer: nn.Module) -> int:
    """Elements of a layer that are computed, not loaded, such as rotary tables."""
    computed = layer._non_persistent_buffers_set
    return sum(buffer.numel() for name, buffer in layer.named_buffers(recurse=False) if name in computed)


# --- plain passes ------------------------------------------------------------------------------------------


def plain_pass(runner: Any, vllm_config: Any, model: nn.Module, tokens: list[int]) -> Tensor | None:
    """Logits `[T, V]` of one sequence, in the first blocks of the KV cache.

    Relies on the V1 runner's attention groups and their metadata builders. The drafter's layers are those of the
    target under a prefix, with a cache of their own or the target's.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return None
    size = groups[0].kv_cache_spec.block_size
    blocks = -(-len(tokens) // size)
    if blocks >= runner.kv_cache_config.num_blocks:
        return None
    table = torch.arange(1, blocks + 1, dtype=torch.int32, device=runner.device)[None]  # block 0 pads
    rows = []
    for start in range(0, len(tokens), _CHUNK):
        stop = min(start + _CHUNK, len(tokens))
        rows.append(_pass(runner, vllm_config, model, tokens[start:stop], start, table, size))
    return torch.cat(rows)


def _pass(
    runner: Any,
    vllm_config: Any,
    model: nn.Module,
    tokens: list[int],
    start: int,
    table: Tensor,
    block_size: int,
) -> Tensor:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import CommonAttentionMetadata

    device, count = runner.device, len(tokens)
    positions = torch.arange(start, start + count, device=device)
    slots = table[0].long()[positions // block_size] * block_size + positions % block_size
    ends = torch.tensor([0, count], dtype=torch.int32)
    lengths = torch.tensor([start + count], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=ends.to(device),
        query_start_loc_cpu=ends,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=1,
        num_actual_tokens=count,
        max_query_len=count,
        max_seq_len=start + count,
        block_table_tensor=table,
        slot_mapping=slots,
        causal=True,
        positions=positions,
        is_prefilling=torch.tensor([True]),
    )
    metadata, mapping = {}, {}
    for group in runner.attn_groups[0]:
        built = group.get_metadata_builder(0).build(0, common)
        for name in group.layer_names:
            for layer in (name, DRAFT_PREFIX + name):
                metadata[layer], mapping[layer] = built, slots
    with set_forward_context(
        metadata,
        vllm_config,
        num_tokens=count,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=mapping,
    ):
        hidden = model(input_ids=torch.tensor(tokens, device=device), positions=positions)
    logits: Tensor = model.compute_logits(hidden)  # type: ignore[operator]
    return logits
