"""The torch backend: one model, one device, one step at a time.

A step admits waiting samples, prefills a chunk, and runs one decode pass over every ready sequence: draft,
verify, append. Nothing here knows about threads, text or trainers; the engine on top does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import FinishReason, invalid
from rollout_spec.drafters.base import DraftRound, Proposal
from rollout_spec.drafters.guard import DrafterGuard
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.spec import ModelSpec
from rollout_spec.policy.draft_length import DraftLengthPolicy, FixedDraftLength
from rollout_spec.sampling import verify
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.pipeline import SamplingBatch, token_logprobs, top_logprobs
from rollout_spec.sampling.table import SamplingTable
from rollout_spec.torch_backend.kv_cache import BlockPool, KVCache, OutOfBlocks
from rollout_spec.torch_backend.probe import row_invariance
from rollout_spec.torch_backend.runner import Block, Runner
from rollout_spec.torch_backend.scheduler import Scheduler
from rollout_spec.torch_backend.slots import ACCEPTED, DRAFTED, PLAIN_STEPS, VERIFY_STEPS, Sample, Slots
from rollout_spec.torch_backend.stop_strings import tokens_up_to_stop
from rollout_spec.torch_backend.weights import PolicyWeights, UpdateReport

logger = logging.getLogger("rollout_spec")


@dataclass
class StepTimes:
    """Seconds spent in `step` since start, by phase (on CUDA: host time, the device runs ahead), and its calls."""

    prefill: float = 0.0
    draft: float = 0.0
    target: float = 0.0
    sample: float = 0.0
    total: float = 0.0
    steps: int = 0


class TorchBackend:
    """Decodes samples with a policy it owns.

    Attributes:
        weights: The policy's weights and version, and the drafter made from them.
        policy: Chooses draft lengths; replace it to control speculation.
        guard: Decides whether the drafter may be used, and reports when it may not.
        coupled: Which verifier is in force.
        spec_counters, generated_tokens: Totals so far; the counters are those of `slots`.
        row_invariant: Whether the probe found a token's logits independent of the batch (exactness level E2).
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        dtype: torch.dtype,
        device: torch.device,
        decode_text: Callable[[list[int]], str] | None,
    ) -> None:
        self.spec, self.config, self.dtype, self.device = spec, config, dtype, device
        self.max_model_len = config.max_model_len or spec.max_positions
        if self.max_model_len > spec.max_positions:
            raise invalid(
                "max_model_len", self.max_model_len, f"the model's own limit is {spec.max_positions}"
            )
        self._decode_text = decode_text
        self.guard = DrafterGuard(config.speculation)
        self.weights = PolicyWeights(spec, config.speculation, dtype, device, self.max_model_len)
        self.policy: DraftLengthPolicy = FixedDraftLength(config.speculation.draft_length)
        self.times = StepTimes()
        self.cache = KVCache(
            spec.num_layers,
            self._kv_blocks(),
            spec.num_kv_heads,
            config.block_size,
            spec.head_dim,
            dtype,
            device,
        )
        self.pool = BlockPool(self.cache.num_blocks)
        self.slots = Slots(
            config.max_num_seqs, self.max_model_len, config.block_size, self.cache.scratch_block
        )
        self.table = SamplingTable(config.max_num_seqs, spec.padded_vocab_size, device, spec.vocab_size)
        self.scheduler = Scheduler(
            self.slots, self.pool, config.prefill_chunk, self.cache.copy_block, self._on_release
        )
        self.runner = Runner(self.weights.target, self.cache, device)
        self.row_invariant = self.coupled = self._canary_due = False
        self.spec_counters = np.zeros(4, np.int64)
        self.generated_tokens = 0
        self._nan_reported: int | None = None

    def start(self, weights: Iterable[tuple[str, Tensor]], version: int) -> UpdateReport:
        """Load the first weights, probe the numerics and settle on a verifier."""
        report = self.weights.update(weights, version)
        self._drafter_follows()
        self.row_invariant = row_invariance(self.runner, self.pool, self.max_model_len)
        self.cache.clear()
        verifier = self.config.speculation.verifier
        self.coupled = verifier == "coupled" or (verifier == "auto" and self.row_invariant)
        return report

    def _kv_blocks(self) -> int:
        bs = self.config.block_size
        if self.config.kv_cache_tokens is not None:
            return -(-self.config.kv_cache_tokens // bs)
        itemsize = torch.empty(0, dtype=self.dtype).itemsize
        block_bytes = 2 * self.spec.num_layers * self.spec.num_kv_heads * bs * self.spec.head_dim * itemsize
        wanted = self.config.max_num_seqs * -(-self.max_model_len // bs)
        blocks = min(wanted, self.config.kv_cache_bytes // block_bytes)
        if blocks < 1:
            raise invalid(
                "kv_cache_bytes",
                self.config.kv_cache_bytes,
                f"one block of the KV cache takes {block_bytes} bytes",
            )
        return blocks

    @property
    def kv_tokens(self) -> int:
        """Capacity of the KV cache in tokens; no sequence may need more."""
        return self.pool.num_blocks * self.config.block_size

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """Advance every sequence it can; returns the samples that finished."""
        start = time.perf_counter()
        for sample in self.scheduler.admit():
            self._assign(sample)
        chunks = self.scheduler.prefills()
        if chunks:
            before = time.perf_counter()
            self.runner.prefill(self.slots, chunks)
            self.times.prefill += time.perf_counter() - before
            for chunk in chunks:
                self.scheduler.prefilled(chunk)
        ready = self.scheduler.ready()
        finished = self._decode(ready) if len(ready) else []
        self.times.steps += 1
        self.times.total += time.perf_counter() - start
        return finished

    def abort(self, samples: Iterable[Sample]) -> None:
        """End samples now; each keeps the output it has."""
        for sample in samples:
            if sample.finish_reason is not None:
                continue
            if sample.slot is None:
                self.scheduler.withdraw(sample)
            else:
                self._release(sample.slot)
            sample.finish_reason = FinishReason.ABORT

    def commit(self, report: UpdateReport) -> None:
        """Put staged weights in force and drop what the old ones computed: samples in flight recompute."""
        self.weights.commit(report)
        self.scheduler.preempt_all()
        self._canary_due = self.cache.released
        if not self.cache.released:
            self.cache.clear()
            self._drafter_follows()

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Give up the KV cache, and the weights if asked; samples in flight wait and recompute."""
        self.scheduler.preempt_all()
        self.cache.release()
        if discard_weights:
            self.weights.discard()

    def wake_up(self) -> None:
        """Take the KV cache back; the canary of an update received asleep runs now."""
        self.cache.clear()
        if self._canary_due:
            self._drafter_follows()
            self._canary_due = False

    @torch.inference_mode()
    def score(self, model: Decoder, tokens: np.ndarray) -> Tensor:
        """Logits `[T, padded_vocab]` after each of `tokens [T]`, recomputed from scratch; raises `OutOfBlocks`."""
        blocks = self.pool.allocate(-(-len(tokens) // self.config.block_size))
        try:
            return self.runner.score(model, tokens, blocks)
        finally:
            # A NaN left here would be read behind a mask.
            self.cache.wipe([*blocks, self.cache.scratch_block])
            self.pool.free(blocks)

    def _drafter_follows(self) -> None:
        weights = self.weights
        self.guard.after_update(weights.drafter, weights.version, self.compare, weights.drafter_error)

    def compare(self, context: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """Target and drafter logits `[T, padded_vocab]` after each of `context [T]`; None if it cannot be done now."""
        drafter = self.weights.drafter
        if not isinstance(drafter, QuantizedSelfDrafter):
            return None
        try:
            return self.score(self.weights.target, context), self.score(drafter.model, context)
        except OutOfBlocks:
            return None

    # --- one decode pass -------------------------------------------------------------------------------

    def _decode(self, rows: np.ndarray) -> list[Sample]:
        lengths, limits = self.slots.length[rows], self.slots.limit[rows]
        drafter, draft_lengths = self.weights.drafter, np.zeros(len(rows), np.int64)
        if self.guard.check(drafter, self.weights.version):
            wanted = self.policy.draft_lengths(lengths, limits - lengths)
            draft_lengths = np.clip(wanted, 0, limits - lengths - 1)
        kept = self.scheduler.reserve(rows, draft_lengths)
        rows, draft_lengths = rows[kept], draft_lengths[kept]
        if not len(rows):
            return []

        clock = time.perf_counter()
        block = self.runner.block(self.slots, rows, draft_lengths)
        batch = self.table.select(torch.from_numpy(rows).to(self.device), rows.tolist())
        keys = row_keys(batch.key, self.weights.version, block.positions + 1)
        proposal = None
        if draft_lengths.any():
            assert drafter is not None
            proposal = self.guard.propose(drafter, self._round(block, batch, keys))
            if proposal is None:  # the drafter failed: this pass decodes plainly
                self.cache.wipe_rows(block.kv_rows.flatten())
                draft_lengths = np.zeros(len(rows), np.int64)
                block, keys = self.runner.block(self.slots, rows, draft_lengths), keys[:, :1]
            self.times.draft += (now := time.perf_counter()) - clock
            clock = now

        tokens = block.last_tokens[:, None]
        if proposal is not None:
            tokens = torch.cat((tokens, proposal.tokens), dim=1)
        raw = self.runner.forward(self.weights.target, block, tokens, 0)
        self.times.target += (now := time.perf_counter()) - clock
        clock = now
        verdict, logprobs = self._verify(batch, raw, proposal, block, keys)
        self.times.sample += time.perf_counter() - clock
        return self._append(rows, draft_lengths, verdict, logprobs, raw, proposal)

    def _round(self, block: Block, batch: SamplingBatch, keys: Tensor) -> DraftRound:
        def forward(model, tokens, first):
            return self.runner.forward(model, block, tokens, first)

        width = block.shape[1] - 1
        return DraftRound(block.last_tokens, width, batch, keys[:, :width], self.coupled, forward)

    def _verify(
        self, batch: SamplingBatch, raw: Tensor, proposal: Proposal | None, block: Block, keys: Tensor
    ) -> tuple[verify.Verdict, Tensor]:
        drafts = None if proposal is None else proposal.tokens
        processed = batch.process(raw, block=drafts, first=0)
        if self.coupled:
            noise = keys if batch.stages.sampled else None
            verdict = verify.verify_coupled(processed.logits, drafts, block.draft_lengths, noise)
        else:
            q_logits = None if proposal is None else proposal.logits
            verdict = verify.verify_rejection(processed.logits, drafts, block.draft_lengths, q_logits, keys)
        return verdict, torch.stack(token_logprobs(raw, processed, verdict.tokens))

    def _append(
        self,
        rows: np.ndarray,
        draft_lengths: np.ndarray,
        verdict: verify.Verdict,
        logprobs: Tensor,
        raw: Tensor,
        proposal: Proposal | None,
    ) -> list[Sample]:
        """Bring the verdict to the host, once, and record it."""
        tokens, emitted, accepted = (x.cpu().numpy() for x in verdict)
        host_logprobs = logprobs.cpu().numpy()
        self._contain_nans(rows, host_logprobs)
        appended = self.slots.append(rows, tokens, emitted, host_logprobs)
        ended, appended = appended < 0, np.abs(appended)
        self.table.record(
            torch.from_numpy(rows).to(self.device), verdict.tokens, torch.from_numpy(appended).to(self.device)
        )
        counted = np.zeros((len(rows), 4), np.int64)
        counted[:, VERIFY_STEPS], counted[:, PLAIN_STEPS] = draft_lengths > 0, draft_lengths == 0
        counted[:, DRAFTED], counted[:, ACCEPTED] = draft_lengths, accepted
        self.slots.spec[rows] += counted
        self.spec_counters += counted.sum(0)
        self.generated_tokens += int(appended.sum())
        if proposal is not None:
            tried = int(accepted.sum()) + int((accepted < draft_lengths).sum())
            self.guard.observe(proposal, tried, int(accepted.sum()), self.weights.version)
        self._record_versions(rows, appended)
        self._record_top_logprobs(rows, appended, raw)
        self._check_stop_strings(rows, appended, ended)
        return self._finish(rows, ended)

    def _contain_nans(self, rows: np.ndarray, logprobs: np.ndarray) -> None:
        """Where the policy itself gives NaN: say so once per version, and let no other sequence read it.

        Masked cache entries are read, too, with weight zero. The scratch block is zeroed now, the sequence's own
        blocks when it gives them up.
        """
        broken = ~np.isfinite(logprobs[0]).all(1)
        if not broken.any():
            return
        if self._nan_reported != self.weights.version:
            self._nan_reported = self.weights.version
            logger.error(
                "the policy's logits are not finite (policy version %d): check the trainer",
                self.weights.version,
            )
        self.slots.broken[rows[broken]] = True
        self.cache.wipe([self.cache.scratch_block])

    def _on_release(self, slot: int, freed: list[int]) -> None:
        self.table.release(slot)
        if self.slots.broken[slot]:
            self.cache.wipe(freed)

    def _record_versions(self, rows: np.ndarray, appended: np.ndarray) -> None:
        version = self.weights.version
        for row in np.nonzero(self.slots.version[rows] != version)[0].tolist():
            slot = rows[row]
            start = int(self.slots.length[slot] - appended[row] - self.slots.prompt_length[slot])
            self._sample(slot).version_starts.append((start, version))
            self.slots.version[slot] = version

    def _record_top_logprobs(self, rows: np.ndarray, appended: np.ndarray, raw: Tensor) -> None:
        wanting = np.nonzero(self.slots.top_logprobs[rows])[0].tolist()
        if not wanting:
            return
        most = max(self._sample(rows[row]).params.logprobs or 0 for row in wanting)
        values, ids = top_logprobs(raw[wanting], min(most, self.spec.vocab_size))
        for row, row_values, row_ids in zip(wanting, values.tolist(), ids.tolist(), strict=True):
            sample = self._sample(rows[row])
            for step in range(appended[row]):
                pairs = zip(row_ids[step][: sample.params.logprobs], row_values[step], strict=False)
                sample.top_logprobs.append(dict(pairs))

    def _check_stop_strings(self, rows: np.ndarray, appended: np.ndarray, ended: np.ndarray) -> None:
        for row in np.nonzero(self.slots.stop_strings[rows])[0].tolist():
            slot = int(rows[row])
            sample = self._sample(slot)
            assert self._decode_text is not None
            output = self.slots.tokens[slot, self.slots.prompt_length[slot] : self.slots.length[slot]]
            new = min(int(appended[row]), len(output) - sample.params.min_tokens)
            match = tokens_up_to_stop(output, new, sample.params.stop, self._decode_text)
            if match is not None:
                count, sample.stop_reason = match
                del sample.top_logprobs[count:]
                self.generated_tokens -= len(output) - count
                self.slots.truncate(slot, int(self.slots.prompt_length[slot]) + count)
                ended[row] = True

    def _finish(self, rows: np.ndarray, ended: np.ndarray) -> list[Sample]:
        finished = []
        done = ended | (self.slots.length[rows] >= self.slots.limit[rows])
        for row in np.nonzero(done)[0].tolist():
            sample = self._sample(rows[row])
            last = int(self.slots.tokens[rows[row], self.slots.length[rows[row]] - 1])
            self._release(int(rows[row]))
            sample.finish_reason = FinishReason.STOP if ended[row] else FinishReason.LENGTH
            if ended[row] and sample.stop_reason is None and last in sample.params.stop_token_ids:
                sample.stop_reason = last
            self.guard.remember(np.concatenate((sample.prompt.tokens, sample.output)))
            finished.append(sample)
        return finished

    def _assign(self, sample: Sample) -> None:
        assert sample.slot is not None
        self.table.assign(
            sample.slot,
            sample.params,
            sample.prompt.tokens.tolist(),
            sample.output.tolist(),
            sample.end_tokens,
            sample.noise_key,
        )

    def _release(self, slot: int) -> None:
        self.scheduler.release(slot)

    def _sample(self, slot: int) -> Sample:
        sample = self.slots.samples[slot]
        assert sample is not None
        return sample
