"""The quantized self-drafter in vLLM's V1 model runner: it reads and writes the target's own KV cache.

Drafting starts from the token sampled last, whose keys and values the target has not computed yet, and goes on from
there. What the drafter writes is provisional: it lies behind everything the target has verified, in slots that the
scheduler reserved (lookahead), in blocks of the request's own, and the target overwrites it when it verifies.
So the drafter needs no blocks, no prefill of its own, and nothing to catch up with after a phase without it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config, replace
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from rollout_spec.integrations.vllm.coupled import GREEDY_BELOW
from rollout_spec.integrations.vllm.drafter_forward import use_decoder
from rollout_spec.integrations.vllm.hidden_states import offer
from rollout_spec.integrations.vllm.metrics import set_aside
from rollout_spec.integrations.vllm.options import DRAFT_PREFIX, is_self_drafter, options_of
from rollout_spec.integrations.vllm.refusals import check_layers, refuse
from rollout_spec.sampling.verify import draw_from

logger = logging.getLogger("rollout_spec")


class StockOrSelfDrafter(DraftModelProposer):
    """vLLM's proposer as it is, unless this engine is configured for a self-drafter."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> StockOrSelfDrafter:
        configured = options_of(vllm_config) is not None and is_self_drafter(vllm_config)
        return super().__new__(SelfDrafter if configured else cls)


class SelfDrafter(StockOrSelfDrafter):
    """Proposes with a quantized copy of the target.

    A drafter that raises, or whose logits are not finite, is reported once and not run again. What was drafted from
    such logits, and until that is noticed on a GPU, comes from a uniform distribution: tokens emitted stay right.

    Attributes:
        forwards: Drafter forwards run so far.
        set_aside: Why nothing is drafted any more, or None.
    """

    _last_draft_probs: Tensor | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        refuse(vllm_config)
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.forwards = 0
        self.set_aside: str | None = None
        self._drafting = False
        # Ranks that stop drafting at different steps would wait for each other; alone one may stop at once.
        self._alone = vllm_config.parallel_config.tensor_parallel_size == 1
        # On a GPU the host reads its copy whenever that has arrived, a step late, without waiting.
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._seen_broken = (
            self._broken if device.type == "cpu" else torch.zeros((), dtype=torch.bool).pin_memory()
        )

    def _create_draft_vllm_config(self) -> VllmConfig:
        config = super()._create_draft_vllm_config()
        backend = self.vllm_config.attention_config.backend  # one cache, so one layout
        return replace(config, attention_config=replace(config.attention_config, backend=backend))

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter and let its attention layers use the target's KV cache; InvalidRequest if they cannot."""
        super().load_model(target_model)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        targets = {name: name.removeprefix(DRAFT_PREFIX) for name in sorted(self._draft_attn_layer_names)}
        check_layers(self.vllm_config, layers, targets)
        for name in targets:
            layers[name].get_kv_cache_spec = lambda vllm_config: None  # so nothing is allocated for it
        self._layers = [layers[name] for name in targets]
        if self.device.type == "cpu" and self.vllm_config.model_config.enforce_eager:
            use_decoder(self.model, self.vllm_config)
        compute_logits = self.model.compute_logits
        self.model.compute_logits = lambda *args, **kwargs: self._checked(compute_logits(*args, **kwargs))
        # vLLM's own sharing between layers; a layer that declared it itself would not write.
        self.runner.shared_kv_cache_layers |= targets
        # Near the end the runner would draft zeros for the whole batch; here `_steps` and the scheduler cut drafts.
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.num_speculative_tokens

    def _maybe_share_embeddings(self, target_language_model: torch.nn.Module) -> None:
        own, theirs = (getattr(x.model, "embed_tokens", None) for x in (self.model, target_language_model))
        if own is not None and theirs is not None:  # else it keeps its copy
            own.weight = theirs.weight

    def _maybe_share_lm_head(self, target_language_model: torch.nn.Module) -> None:
        if getattr(self.model.lm_head, "quantized", None) is None:
            self.model.lm_head = target_language_model.lm_head

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor:
        """Draft for every request: tokens int64 [B, K]; K = 0 runs nothing, and K is 0 once the drafter failed."""
        offer(
            self.runner,
            target_token_ids,
            target_positions,
            target_hidden_states,
            common_attn_metadata,
            num_rejected_tokens_gpu,
        )
        self._last_draft_probs = None
        batch = common_attn_metadata.batch_size()
        last = token_indices_to_sample
        if last is None:
            last = common_attn_metadata.query_start_loc[1 : batch + 1] - 1
        steps = common_attn_metadata, target_positions[last], num_speculative_tokens
        if self._alone and self._seen_broken.item():
            self._fail("its logits were not finite")
        if self.set_aside is None and num_speculative_tokens > 0:
            self._drafting = True
            try:
                drafts = self._draft(next_token_ids, sampling_metadata, *steps)
            except Exception as error:  # a guest's failure must not end the rollout
                if not self._alone:
                    raise
                self._fail(f"it raised {type(error).__name__}: {error}", error)
            else:
                if self.device.type != "cpu" or not self._broken.item():
                    return drafts
                self._fail("its logits were not finite")
            finally:
                self._drafting = False
            self._last_draft_probs = None
            with suppress(Exception):  # it fails where drafting failed before it wrote anything
                self._wipe(*steps)
        # With async scheduling the next step expects as many drafts as were asked for.
        width = num_speculative_tokens if self.runner.use_async_scheduling else 0
        return torch.zeros(batch, width, dtype=torch.int64, device=self.device)

    def _draft(
        self, ids: Tensor, sampling_metadata: Any, metadata: Any, positions: Tensor, count: int
    ) -> Tensor:
        batch = len(positions)
        tokens, probs = [], []
        for rows in self._steps(metadata, positions, count):
            self.input_ids[:batch] = ids
            inputs = self.input_ids[:rows], self._get_positions(rows)
            self.forwards += 1
            hidden = self.model(input_ids=inputs[0], positions=inputs[1], inputs_embeds=None)
            ids, q = self._sample_draft_tokens(hidden[:batch], sampling_metadata)
            tokens.append(ids)
            if q is not None:
                probs.append(q)
        if probs:
            self._last_draft_probs = torch.stack(probs, 1)
        return torch.stack(tokens, 1)

    def _sample_from_logits(self, logits: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """As vLLM's: tokens int64 [B] and q float32 [B, V], from logits [B, V] at the requests' temperatures.

        vLLM's draws a random number for every token of the vocabulary, most of what sampling costs on a CPU.
        """
        if self.device.type != "cpu" or sampling_metadata.all_greedy:
            return super()._sample_from_logits(logits, sampling_metadata)
        temperature = sampling_metadata.temperature
        greedy = temperature < GREEDY_BELOW
        q = (logits.float() / torch.where(greedy, 1.0, temperature)[:, None]).softmax(-1)
        tokens = draw_from(q, torch.rand(len(q), dtype=torch.float64))
        return (tokens if sampling_metadata.all_random else torch.where(greedy, q.argmax(-1), tokens)), q

    def _checked(self, logits: Tensor) -> Tensor:
        """`logits` [B, V], rows that are not finite made uniform, and noted."""
        if not self._drafting:  # the canary wants them as they are
            return logits
        broken = ~(logits.amax(-1) < torch.inf)
        if self.device.type != "cpu" or broken.any():
            logits = logits.masked_fill(broken[:, None], 0.0)
            self._broken |= broken.any()
            self._seen_broken.copy_(self._broken, non_blocking=True)
        return logits

    def revive(self) -> None:
        """Draft again: the weights are new."""
        self.set_aside = None
        self._broken.fill_(False)
        self._seen_broken.fill_(False)

    def _fail(self, why: str, error: Exception | None = None) -> None:
        if self.set_aside is None:
            self.set_aside = why
            set_aside(self.vllm_config, "worker", True)
            logger.error(
                "the self-drafter is set aside: %s; decoding plainly from now on", why, exc_info=error
            )

    def _wipe(self, metadata: Any, positions: Tensor, count: int) -> None:
        """Overwrite what the drafter wrote: a NaN left in a block would be read behind a mask."""
        for rows in self._steps(metadata, positions, count):
            for layer in self._layers:
                query = torch.zeros(
                    rows, layer.num_heads * layer.head_size, dtype=self.dtype, device=self.device
                )
                keys = query[:, : layer.num_kv_heads * layer.head_size]
                layer(query, keys, keys[:, : layer.num_kv_heads * layer.head_size_v])

    def _steps(self, metadata: Any, positions: Tensor, count: int) -> Iterator[int]:
        """Advance every request from `positions` [B] by one token `count` times; yields the rows to run, padding
        included, inside the forward context of each step."""
        batch = len(positions)
        metadata = copy.copy(metadata)
        metadata.seq_lens = (positions + 1).to(metadata.seq_lens.dtype)
        if metadata.seq_lens_cpu_upper_bound is not None:
            metadata.seq_lens_cpu_upper_bound = metadata.seq_lens_cpu_upper_bound.clone()
        metadata.num_actual_tokens, metadata.max_query_len = batch, 1
        metadata.query_start_loc = self.arange[: batch + 1]
        metadata.query_start_loc_cpu = torch.from_numpy(self.token_arange_np[: batch + 1].copy())
        mode, rows, across_dp = self._determine_batch_execution_and_padding(batch)
        for step in range(count):
            # From the true positions each time: what comes out has those past the end clamped to 0, and going on from
            # there would write into the first block of the request, which others share.
            self._update_positions_dependent_metadata(
                positions + step, metadata, batch, rows, self.block_size
            )
            _, per_layer = self.build_per_group_and_layer_attn_metadata(metadata, draft_index=step + 1)
            with set_forward_context(
                per_layer,
                self.vllm_config,
                num_tokens=rows,
                num_tokens_across_dp=across_dp,
                cudagraph_runtime_mode=mode,
                slot_mapping=self._get_slot_mapping(rows),
            ):
                yield rows
