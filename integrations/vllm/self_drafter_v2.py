"""The quantized self-drafter in vLLM's V2 model runner, the default on GPUs: it shares the target's KV cache.

The V2 runner needs Triton: `benchmarks/gpu/vllm_cells.py` runs this file on a GPU, `tests/vllm/test_v2_dry.py` on CPU
over vLLM's own base classes with stand-ins for the runner's inputs, and the contract tests hold every name it uses
against released sources. What it writes, and why that is safe, is told in `self_drafter.py`; here nothing is read
back to the host, so every request that must not draft in this step gets the index -1, for which vLLM's kernels write no
keys, no values and no draft probabilities.

A draft step reads its inputs from buffers and leaves the next one's there, so a CUDA graph of one step per batch size
serves every K: it is replayed K times. Where the target has no full graphs, or attention cannot be told of the next
step inside a graph, steps run eagerly.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from rollout_spec.integrations.vllm.compat_v2 import guess_blindly
from rollout_spec.integrations.vllm.metrics import set_aside
from rollout_spec.integrations.vllm.options import DRAFT_PREFIX
from rollout_spec.integrations.vllm.refusals import check_layers

try:
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator as Stock
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager
except ImportError:  # before 0.32, where drafting on this runner is refused
    from vllm.v1.worker.gpu.spec_decode.draft_model.speculator import PlainDraftModelSpeculator as Stock

logger = logging.getLogger("rollout_spec")


class SelfSpeculator(Stock):  # type: ignore[misc, valid-type]
    """Drafts with a quantized copy of the target, one token of every request per forward.

    A drafter that raises is reported and not run again.

    Attributes:
        forwards: Drafter forwards run so far.
        graphs: Graphs of a draft step by batch size; None before the KV cache is known, and where there are none.
        set_aside: Why the drafter is not run any more, or None.
    """

    num_extra_query_per_req = 0  # the target computed every token but the last: nothing to prefill

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.forwards = 0
        self.graphs: Any = None
        self.set_aside: str | None = None
        self._drafting = False
        self._targets: dict[str, str] = {}
        # Ranks that stop at different steps would wait for each other.
        self._alone = vllm_config.parallel_config.tensor_parallel_size == 1

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter from the target's checkpoint and keep vLLM from allocating a KV cache for it."""
        super().load_model(target_model)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        self._targets = {
            name: name.removeprefix(DRAFT_PREFIX) for name in sorted(self.draft_attn_layer_names)
        }
        check_layers(self.vllm_config, layers, self._targets)
        for name in self._targets:
            layers[name].get_kv_cache_spec = lambda vllm_config: None
        compute = self.model.compute_logits
        # The canary wants them as they are.
        self.model.compute_logits = lambda hidden: (
            _finite(compute(hidden)) if self._drafting else compute(hidden)
        )

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        """Take the runner's block tables. The drafter joins its target's KV group, in a copy: the runner's own
        allocation, metadata and connectors see the target's layers only."""
        shared = copy.copy(kv_cache_config)
        shared.kv_cache_groups = []
        for group in kv_cache_config.kv_cache_groups:
            joined = copy.copy(group)
            drafters = [name for name, target in self._targets.items() if target in group.layer_names]
            joined.layer_names = [*group.layer_names, *drafters]
            shared.kv_cache_groups.append(joined)
        super().set_attn(model_state, shared, block_tables, target_input_buffers, target_attn_groups)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plan one graph per batch size that the target decodes on a full graph."""
        self.graphs = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        if not self.supports_decode_metadata_update:
            logger.warning(
                "the self-drafter runs without CUDA graphs: this attention backend cannot be told of the next step "
                "inside a graph; FLASH_ATTN and TRITON_ATTN can"
            )
            return
        self.graphs = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1
        )

    def capture(self) -> None:
        """Capture the graphs; what runs meanwhile writes nothing."""
        if self.graphs is None:
            return
        self._bind()
        self.idx_mapping.fill_(-1)
        self.graphs.capture(
            self._step_to_capture,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft steps",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        *,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        **unused: Any,
    ) -> Tensor:
        """Draft for B requests: int64 [B, K_max], of which the first `num_speculative_tokens` columns count.

        Args:
            input_batch: What the target has just computed; `seq_lens` [B] holds computed and scheduled tokens.
            num_sampled, num_rejected: [B]; nothing was sampled where a prompt is not computed to its end yet.
            last_sampled: By request slot, the token sampled last.
            temperature, seeds: By request slot.
            num_speculative_tokens: K; 0 runs nothing, None means K_max (vLLM's warm-up).
            unused: Data-parallel sync and multimodal inputs, refused at start; the target's own states.
        """
        batch = input_batch.num_reqs
        count = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        slots = input_batch.idx_mapping[:batch]
        if count == 0:
            return self.draft_tokens[:batch]
        if self.set_aside is None:
            drafting = (num_sampled[:batch] > 0) & (not dummy_run)
            position = (input_batch.seq_lens[:batch] - num_rejected[:batch]).to(torch.int64)
            tokens = last_sampled.view(-1)[slots.long()]
            skip_attn = dummy_run and skip_attn_for_dummy_run
            self._copy_request_inputs(batch, slots, temperature, seeds)
            try:
                self._draft(input_batch, slots, drafting, position, tokens, count, skip_attn)
                return self.draft_tokens[:batch]
            except Exception as error:  # a guest's failure must not end the rollout
                if not self._alone or dummy_run:
                    raise
                self.set_aside = f"it raised {type(error).__name__}: {error}"
                set_aside(self.vllm_config, "worker", True)
                logger.error("the self-drafter is set aside: %s", self.set_aside, exc_info=error)
        return guess_blindly(self, slots, count)

    def revive(self) -> None:
        """Draft again: the weights are new."""
        self.set_aside = None

    def _draft(
        self,
        input_batch: Any,
        slots: Tensor,
        drafting: Tensor,
        position: Tensor,
        tokens: Tensor,
        count: int,
        skip_attn: bool,
    ) -> None:
        """Draft `count` tokens after `tokens` [B] at `position` [B] of the requests that are `drafting` [B]."""
        batch, buffers = input_batch.num_reqs, self.input_buffers
        graph = None
        if not skip_attn:
            self._bind()
            graph = self._graph(batch)
        rows = batch if graph is None else graph.num_reqs  # those behind the batch have the index -1
        longest = int(input_batch.seq_lens_cpu_upper_bound[:batch].max())
        self.draft_max_seq_len = min(longest + count, self.max_model_len)
        drafting = drafting & (position < self.max_model_len)
        self.idx_mapping[:batch] = torch.where(drafting, slots, -1)
        buffers.input_ids[:rows] = 0
        buffers.input_ids[:batch] = torch.where(drafting, tokens, 0)
        buffers.positions[:rows] = 0
        buffers.positions[:batch] = torch.where(drafting, position, 0)
        buffers.seq_lens[:rows] = buffers.positions[:rows] + 1
        buffers.query_start_loc[: rows + 1].copy_(self.arange_gpu[: rows + 1])
        self.current_draft_step.zero_()
        for step in range(count):
            self.forwards += 1
            if graph is not None:
                self.graphs.run_fullgraph(graph)
            elif skip_attn:
                self._step(batch, None, None)
            else:
                self._step(batch, *self._attention(input_batch, batch, step))

    def _step(self, rows: int, metadata: Any, mapping: Any) -> None:
        """One draft step of the first `rows` rows, from the buffers; they hold the next step's inputs after it.

        A row that reaches the longest sequence there may be drafts no further.
        """
        buffers, slots = self.input_buffers, self.idx_mapping[:rows]
        positions = buffers.positions[:rows]
        if metadata is not None:
            ends = buffers.query_start_loc[: rows + 1]
            self.block_tables.compute_slot_mappings(slots, ends, positions, rows)
        hidden = self._run_model(buffers.input_ids[:rows], positions, metadata, mapping, None)
        self._drafting = True
        try:
            sampled = self.sample_draft(
                hidden[:rows],
                positions,
                slots,
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            )
        finally:
            self._drafting = False
        tokens = torch.where(slots >= 0, sampled, 0)  # of index -1 it is whatever memory held
        drafts = self.draft_tokens[:rows]
        drafts.index_copy_(1, self.current_draft_step.view(1), tokens[:, None].to(drafts.dtype))
        positions += 1
        slots.masked_fill_(positions >= self.max_model_len, -1)
        positions.masked_fill_(slots < 0, 0)
        buffers.input_ids[:rows] = tokens
        buffers.seq_lens[:rows] = positions + 1
        self.current_draft_step += 1

    def _step_to_capture(
        self, rows: int, tokens: int, metadata: Any, mapping: Any, *unused: Any, **options: Any
    ) -> None:
        """A draft step that tells attention itself where its rows stand, as a graph has to."""
        if not torch.cuda.is_current_stream_capturing():  # a warm-up
            self.current_draft_step.zero_()
        self._update_draft_decode_metadata(metadata, rows)
        self._step(rows, metadata, mapping)

    def _graph(self, batch: int) -> Any:
        """The captured step for `batch` rows, or more; None if there is none."""
        if self.graphs is None:
            return None
        found = self.graphs.dispatch(batch, batch, uniform_token_count=1, num_active_loras=0)
        if found.cg_mode != CUDAGraphMode.FULL:
            return None
        for groups in self.attn_groups:
            for group in groups:
                group.map_to_kernel_block_table(self.block_tables.input_block_tables[group.kv_cache_group_id])
        return found

    def _attention(self, input_batch: Any, batch: int, step: int) -> tuple[Any, Any]:
        """Metadata and KV slots by layer of an eager step."""
        metadata = self._build_uniform_attn_metadata(
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE, num_tokens=batch, num_reqs=batch, uniform_token_count=1
            ),
            num_reqs=batch,
            num_query_per_req=1,
            seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
            step=step + 1,
        )
        slots = self.block_tables.slot_mappings[:, :batch]  # `_step` writes them before they are read
        return metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config)

    def _bind(self) -> None:
        """Let the drafter's layers hold the target's cache, also after the runner allocated it anew."""
        layers = self.vllm_config.compilation_config.static_forward_context
        moved = False
        for name, target in self._targets.items():
            if layers[name].kv_cache is not layers[target].kv_cache:
                layers[name].bind_kv_cache(layers[target].kv_cache)
                moved = True
        if moved and self.graphs is not None:
            self.graphs.release_graphs()  # they hold the old cache


def _finite(logits: Tensor) -> Tensor:
    """Rows with a NaN or without a finite largest logit become uniform: what the verifier is told is a distribution."""
    return logits.masked_fill_(~logits.amax(-1, keepdim=True).isfinite(), 0.0)
