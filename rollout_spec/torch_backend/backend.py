"""The torch backend: one model, one device, one step at a time.

A step admits waiting samples, prefills a chunk, and runs one decode pass over every ready sequence: draft,
verify, append. Nothing here knows about threads, text or trainers; the engine on top does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import FinishReason, SamplingParams, invalid
from rollout_spec.drafters.base import Proposal
from rollout_spec.drafters.eagle import EagleDrafter
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.drafters.guard import DrafterGuard
from rollout_spec.drafters.history import History
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.spec import ModelSpec
from rollout_spec.observe.trace import TraceRecorder
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.calibration import Calibration
from rollout_spec.policy.records import Plan, Reason, SpeculationPolicy, StepOutcome, StepState, TraceRequest
from rollout_spec.sampling import verify
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.pipeline import Processed, SamplingBatch, token_logprobs
from rollout_spec.sampling.table import SamplingTable
from rollout_spec.torch_backend.adaptive import Adaptive
from rollout_spec.torch_backend.choose_policy import choose_policy
from rollout_spec.torch_backend.completions import spec_counts
from rollout_spec.torch_backend.drafting import Drafts
from rollout_spec.torch_backend.features import FeatureStore
from rollout_spec.torch_backend.graph_passes import GraphPasses, choose_graphs
from rollout_spec.torch_backend.kv_cache import BlockPool, KVCache, OutOfBlocks
from rollout_spec.torch_backend.outputs import cut_at_stop_strings, record_top_logprobs, record_versions
from rollout_spec.torch_backend.pass_clock import PassClock
from rollout_spec.torch_backend.probe import row_invariance
from rollout_spec.torch_backend.runner import Block, Runner
from rollout_spec.torch_backend.scheduler import Scheduler
from rollout_spec.torch_backend.slots import (
    ACCEPTED,
    DRAFTED,
    PLAIN_STEPS,
    VERIFY_STEPS,
    Prompt,
    Sample,
    Slots,
)
from rollout_spec.torch_backend.weights import PolicyWeights, UpdateReport

logger = logging.getLogger("rollout_spec")


@dataclass
class StepTimes:
    """Seconds spent in `step` since start, by phase (on CUDA: host time, the device runs ahead), and its calls.

    What is drafted in shadow is in `total` alone.
    """

    prefill: float = 0.0
    draft: float = 0.0
    target: float = 0.0
    total: float = 0.0
    steps: int = 0


class TorchBackend:
    """Decodes samples with a policy it owns.

    Attributes:
        weights: The policy's weights and version, and the drafter made from them.
        policy: Chooses draft lengths; replace it to control speculation.
        guard: Decides whether the drafter may be used, and reports when it may not.
        adaptive: The trained drafter that was published, with its own guard; None before the first.
        graphs: Runs passes on captured graphs; None where there are none. On a CPU, where tests set it, plain calls
            stand in for graphs.
        on_finished: Called with a finished sample and the slot it is about to leave.
        coupled: Which verifier is in force.
        spec_counters, generated_tokens: Totals so far; the counters are those of `slots`.
        row_invariant: Whether the probe found a token's logits independent of the batch (exactness level E2).
        updates_in_place, whole: New weights come beside the old ones, which stay in force whatever happens.
    """

    updates_in_place = False
    whole = True

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
        if config.graph_bytes and device.type != "cuda":
            raise invalid(
                "graph_bytes", config.graph_bytes, "graphs need a CUDA device; leave it out on a CPU"
            )
        self._decode_text = decode_text
        self.guard = DrafterGuard(config.speculation)
        self.weights = PolicyWeights(spec, config.speculation, dtype, device, self.max_model_len)
        self.policy: SpeculationPolicy = Off()
        self.history: History | None = None
        self.calibration: Calibration | None = None
        self.recorder: TraceRecorder | None = None
        self.graphs: GraphPasses | None = None
        self.adaptive: Adaptive | None = None
        self.on_finished: Callable[[Sample, int], None] | None = None
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
            self.slots, self.pool, config.prefill_chunk, self._copy_block, self._on_release
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
        self.graphs = choose_graphs(self)
        if self.graphs is not None:
            self.graphs.capture()
        self.policy, self.history, self.calibration = choose_policy(self)
        self._decodes_plainly = isinstance(self.policy, Off)
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
            self.assign(sample)
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

    def prompt(self, tokens: np.ndarray) -> Prompt:
        """The record that samples of one prompt share."""
        return self.scheduler.prompt(tokens)

    def check_params(self, params: SamplingParams) -> None:
        """Refuse parameters this backend cannot honour: there are none."""

    def submit(self, sample: Sample) -> None:
        self.scheduler.submit(sample)

    def stage(
        self, weights: Iterable[tuple[str, Tensor]], version: int, hold: Callable[[], None]
    ) -> UpdateReport:
        """Receive new weights beside those in force, while decoding goes on: `hold` is not needed."""
        return self.weights.stage(weights, version)

    def commit(self, report: UpdateReport) -> UpdateReport:
        """Put staged weights in force and drop what the old ones computed: samples in flight recompute."""
        if self.graphs is not None:
            self.graphs.release()
        self.weights.commit(report)
        self.scheduler.preempt_all()
        self._canary_due = self.cache.released
        if not self.cache.released:
            self._clear()
            if self.graphs is not None:
                self.graphs.capture()
            self._drafter_follows()
        return report

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Give up the KV cache, and the weights if asked; samples in flight wait and recompute."""
        self.scheduler.preempt_all()
        if self.graphs is not None:
            self.graphs.release()
        for memory in self._memory:
            memory.release()
        if discard_weights:
            self.weights.discard()
            self._canary_due = False
            if self.adaptive is not None:
                self.adaptive.drafter.discard()

    def wake_up(self) -> None:
        """Take the KV cache back; the canary of an update received asleep runs now."""
        self._clear()
        if self.graphs is not None:
            self.graphs.capture()
        if self._canary_due:
            self._drafter_follows()
            self._canary_due = False

    def logprobs(self, tokens: np.ndarray) -> list[float]:
        """Logprob of each token after the first, from plain passes like those of a prefill (T=1); raises `OutOfBlocks`."""
        found: list[float] = []
        with self._lent_blocks(len(tokens)) as blocks:
            for start in range(0, len(tokens) - 1, self.config.prefill_chunk):
                stop = min(start + self.config.prefill_chunk, len(tokens) - 1)
                logits = self.runner.score(self.weights.target, tokens[:stop], blocks, start)[None]
                following = torch.from_numpy(tokens[None, start + 1 : stop + 1]).to(logits.device)
                found += token_logprobs(logits, Processed(logits), following).logprob[0].tolist()
        return found

    def figures(self) -> dict[str, Any]:
        """What `EngineStats` says of a backend."""
        drafter, found = self.weights.drafter, self.calibration
        usable = self.guard.usable(drafter, self.weights.version)
        return {
            "version": self.weights.version,
            "verifier": "coupled" if self.coupled else "rejection",
            "exactness": ("E2" if self.row_invariant else "E1") if self.coupled else "E0",
            "drafter": drafter.name if usable and drafter is not None else None,
            "reports": tuple(self.guard.reports) + (() if self.adaptive is None else self.adaptive.reports),
            "adaptive": None if self.adaptive is None else self.adaptive.in_use,
            "calibration": None if found is None else "brief" if found.brief else "full",
            "canary_acceptance": self.guard.canary_acceptance,
            "live": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "kv_tokens": self.kv_tokens,
            "kv_tokens_free": self.pool.available * self.config.block_size,
            "preemptions": self.scheduler.preemptions,
            "generated_tokens": self.generated_tokens,
            "spec": spec_counts(self.spec_counters),
            "times": replace(self.times),
        }

    @torch.inference_mode()
    def score(self, model: Decoder, tokens: np.ndarray) -> Tensor:
        """Logits `[T, padded_vocab]` after each of `tokens [T]`, recomputed from scratch; raises `OutOfBlocks`."""
        with self._lent_blocks(len(tokens)) as blocks:
            return self.runner.score(model, tokens, blocks)

    @contextmanager
    def _lent_blocks(self, tokens: int) -> Iterator[list[int]]:
        """Blocks for so many tokens that are no sample's; raises `OutOfBlocks`."""
        blocks = self.pool.allocate(-(-tokens // self.config.block_size))
        try:
            yield blocks
        finally:
            # A NaN left here would be read behind a mask.
            for memory in self._memory:
                memory.wipe(blocks)
            self.pool.free(blocks)

    def _drafter_follows(self) -> None:
        weights = self.weights
        self.policy.after_update()
        if self.history is not None:
            self.history.after_update()
        if self.recorder is not None:
            self.recorder.event(f"policy version {weights.version}")
        self.guard.after_update(weights.drafter, weights.version, self.compare, weights.drafter_error)
        if self.adaptive is not None:
            self.adaptive.after_update(weights.target, weights.version)

    @torch.inference_mode()
    def make_drafter(
        self, weights: Iterable[tuple[str, Tensor]], version: int | None, spec: EagleSpec | None
    ) -> EagleDrafter:
        """A drafter from its tensors, not in force yet; see `RolloutEngine.publish_drafter`."""
        options, current = self.config.speculation, None if self.adaptive is None else self.adaptive.drafter
        if self._decodes_plainly:
            remedy = "set it to true; if it is, the log says why drafts have no place here"
            raise invalid("speculation.adaptive", options.adaptive, remedy)
        if spec is None:
            if current is None:
                raise invalid("spec", None, "give the EagleSpec of the first drafter that is published")
            spec = current.spec
        before = -1 if current is None else current.version
        return EagleDrafter(
            spec, self.weights.target, weights, before + 1 if version is None else version, after=before,
            quantizer=self.weights.quantizer(options.adaptive_quantizer),
        )  # fmt: skip

    @torch.inference_mode()
    def publish(self, drafter: EagleDrafter) -> None:
        """Put a drafter in force, between two steps."""
        if self.adaptive is None or not self.adaptive.serves(drafter.spec):
            self.adaptive = Adaptive(self, drafter)
        self.adaptive.publish(drafter)
        if self.cache.released:
            for memory in self._memory:
                memory.release()

    def keep_features(self, layers: Sequence[int]) -> FeatureStore:
        """Keep the target's features from the next pass on, see `FeatureStore`; costs its memory.

        Raises:
            InvalidRequest: Those of other layers are kept already.
        """
        kept = self.runner.features
        if kept is None:
            kept = self.runner.features = FeatureStore(
                self.cache, self.slots, layers, self.spec.hidden_size, self.dtype, self.device
            )
            self.scheduler.features_from_now()
            if self.graphs is not None:
                self.graphs.capture()
        elif kept.layers != tuple(layers):
            raise invalid("layers", tuple(layers), f"features of layers {kept.layers} are kept; use the same")
        return kept

    @property
    def _memory(self) -> list[KVCache | FeatureStore]:
        """All that is addressed by block."""
        adaptive = [] if self.adaptive is None else [self.adaptive.follower.cache]
        features = [] if self.runner.features is None else [self.runner.features]
        return [self.cache, *features, *adaptive]

    def _clear(self) -> None:
        for memory in self._memory:
            memory.clear()

    def _copy_block(self, source: int, destination: int) -> None:
        for memory in self._memory:
            memory.copy_block(source, destination)

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
        shadow = None if self.adaptive is None else self.adaptive.shadow(rows, self.table)
        clock = PassClock(self.device)
        state = self._state(rows)
        plan = self.policy.plan(state)
        clock.stop_deciding()
        state, plan = self._reserve(state, plan)
        if not len(state.slots):
            return []
        rows = state.slots

        block = self.runner.block(self.slots, rows, plan.draft_lengths)
        batch = self.table.select(torch.from_numpy(rows).to(self.device), rows.tolist())
        keys = row_keys(batch.key, self.weights.version, block.positions + 1)
        drafts = self._drafts(plan, state, block, batch, keys)
        clock.start_drafting()
        if (plan.draft_lengths > plan.from_history).any():
            proposal = self._propose(plan, state, drafts)
            if proposal is None:  # the drafter failed: this pass decodes plainly
                self.cache.wipe_rows(block.kv_rows.flatten())
                plan = Plan.plain(len(rows), Reason.NO_DRAFTER)
                block, keys = self.runner.block(self.slots, rows, plan.draft_lengths), keys[:, :1]
                drafts = self._drafts(plan, state, block, batch, keys)
            else:
                drafts.add(proposal)
                if plan.stop is not None:
                    if not proposal.healthy:  # what it wrote is not all overwritten below
                        self.cache.wipe_rows(block.kv_rows.flatten())
                    plan = replace(plan, draft_lengths=plan.from_history + plan.stop.lengths)
                    block = self.runner.block(self.slots, rows, plan.draft_lengths)
                    drafts.shorten(plan.draft_lengths, block)
                    keys = drafts.keys
        clock.stop_drafting()

        tokens = torch.cat((block.last_tokens[:, None], drafts.tokens), dim=1)
        ragged = drafts.ragged
        raw = None if self.graphs is None else self.graphs.forward(block, tokens, ragged)
        if raw is None:
            cells = None if ragged is None else ragged.cells
            raw = self.runner.forward(self.weights.target, block, tokens, cells=cells)
        processed = self._process(batch, raw, drafts)
        verdict = drafts.verify(processed.logits)
        if shadow is not None:
            shadow.judge(rows, processed.logits, ragged, verdict)
        if ragged is None:
            logprobs = torch.stack(token_logprobs(raw, processed, verdict.tokens))
        else:
            logprobs = torch.stack(token_logprobs(raw, processed, ragged.rows(verdict.tokens)))
            logprobs = ragged.grid(logprobs)
        return self._append(state, plan, verdict, logprobs, raw, drafts, clock)

    def _state(self, rows: np.ndarray) -> StepState:
        """What is live, for the policy."""
        slots, drafter = self.slots, self.weights.drafter
        drafters: tuple[str, ...] = ()
        lengths = slots.length[rows]
        allowed = slots.limit[rows] - lengths
        if self.guard.check(drafter, self.weights.version) and drafter is not None:
            drafters = (drafter.name,)
        if self.adaptive is not None and self.adaptive.usable:
            drafters = (*drafters, self.adaptive.drafter.name)
        matches = None
        if self.history is not None and self.policy.looks(len(rows)):
            matches = self.history.match(rows, allowed - 1)
        return StepState(
            rows,
            lengths,
            lengths - slots.prompt_length[rows],
            allowed,
            drafters,
            matches,
            len(self.scheduler.waiting),
            # Elsewhere asking would synchronize the device in every step, and a captured loop cannot end early.
            stoppable=self.graphs is None and self.device.type == "cpu",
        )

    def _reserve(self, state: StepState, plan: Plan) -> tuple[StepState, Plan]:
        """State and plan of the sequences that get the memory they need, in order of falling own draft length."""
        lengths = np.clip(plan.draft_lengths, 0, state.allowed - 1)
        before = np.minimum(plan.from_history, lengths)
        if plan.drafter not in state.drafters:
            lengths = before
        elif self.adaptive is not None and plan.drafter == self.adaptive.drafter.name:
            lengths = np.where(before > 0, before, lengths)  # it cannot draft behind history
        order = np.argsort(before - lengths, kind="stable")
        kept = order[self.scheduler.reserve(state.slots[order], lengths[order])]
        stop = None if plan.stop is None else plan.stop.take(kept, (lengths - before)[kept])
        done = replace(plan, draft_lengths=lengths[kept], from_history=before[kept], stop=stop)
        return state.take(kept), done

    def _drafts(
        self, plan: Plan, state: StepState, block: Block, batch: SamplingBatch, keys: Tensor
    ) -> Drafts:
        history = None
        if plan.from_history.any():
            assert self.history is not None
            history = self.history.propose(state.slots, plan.from_history)
        return Drafts(
            plan.draft_lengths,
            plan.from_history,
            history,
            block,
            batch,
            keys,
            self.runner,
            self.coupled,
            plan.stop,
        )

    def _propose(self, plan: Plan, state: StepState, drafts: Drafts) -> Proposal | None:
        """What the drafter of a plan proposes, or None if it raised."""
        drafter, adaptive = self.weights.drafter, self.adaptive
        if adaptive is not None and plan.drafter == adaptive.drafter.name:
            return adaptive.propose(drafts.round, state.slots, plan.draft_lengths - plan.from_history)
        assert drafter is not None

        def run() -> Proposal:
            captured = None if self.graphs is None else self.graphs.propose(drafts)
            return drafter.propose(drafts.round) if captured is None else captured

        return self.guard.propose(drafter, run)

    def _process(self, batch: SamplingBatch, raw: Tensor, drafts: Drafts) -> Processed:
        """The processed distribution of the block's rows, or of those that are computed."""
        if drafts.ragged is None:
            return batch.process(raw, block=drafts.tokens)
        width = drafts.tokens.shape[1] + 1
        sequence, step = drafts.ragged.cells // width, drafts.ragged.cells % width
        return batch.take(sequence).process(raw, block=drafts.tokens[sequence], first=step)

    def _append(
        self,
        state: StepState,
        plan: Plan,
        verdict: verify.Verdict,
        logprobs: Tensor,
        raw: Tensor,
        drafts: Drafts,
        clock: PassClock,
    ) -> list[Sample]:
        """Bring the verdict to the host, once, and record it."""
        rows, draft_lengths = state.slots, plan.draft_lengths
        starts = self.slots.length[rows]
        tokens, emitted, accepted = (x.cpu().numpy() for x in verdict)
        host_logprobs = logprobs.cpu().numpy()
        self._contain_nans(rows, host_logprobs, emitted)
        appended = self.slots.append(rows, tokens, emitted, host_logprobs)
        ended, appended = appended < 0, np.abs(appended)
        self.table.record(
            torch.from_numpy(rows).to(self.device), verdict.tokens, torch.from_numpy(appended).to(self.device)
        )
        counted = np.zeros((len(rows), 4), np.int64)
        counted[:, VERIFY_STEPS], counted[:, PLAIN_STEPS] = draft_lengths > 0, draft_lengths == 0
        counted[:, DRAFTED] = draft_lengths
        if self.on_finished is not None:
            for row in np.flatnonzero(accepted < draft_lengths).tolist():
                self.slots.sample(int(rows[row])).rejected.append(int(starts[row] + accepted[row]))
        self.generated_tokens += int(appended.sum())
        if drafts.healthy is not None:
            behind = np.where(plan.from_history < draft_lengths, accepted - plan.from_history, -1)
            tried = int((behind >= 0).sum() - ((accepted == draft_lengths) & (behind >= 0)).sum())
            hits = int(behind.clip(0).sum())
            if self.adaptive is not None and plan.drafter == self.adaptive.drafter.name:
                self.adaptive.observe(bool(drafts.healthy), tried + hits, hits)
            else:
                self.guard.observe(bool(drafts.healthy), tried + hits, hits, self.weights.version)
        record_versions(self.slots, rows, appended, self.weights.version)
        if self.slots.top_logprobs[rows].any():
            grid = raw if drafts.ragged is None else raw.squeeze(1)[drafts.ragged.place]
            record_top_logprobs(self.slots, rows, appended, grid, self.spec.vocab_size)
        if self.slots.stop_strings[rows].any():
            assert self._decode_text is not None
            self.generated_tokens -= cut_at_stop_strings(self.slots, rows, appended, ended, self._decode_text)
        counted[:, ACCEPTED] = np.minimum(accepted, appended)  # some may lie behind an end
        self.slots.spec[rows] += counted
        self.spec_counters += counted.sum(0)
        if self.history is not None:
            self.history.extend(rows, tokens, appended)
        finished, done = self._finish(rows, ended)
        draft_seconds, seconds = clock.read()
        self.times.draft += draft_seconds
        self.times.target += seconds - draft_seconds
        rest = seconds - draft_seconds - clock.decided
        outcome = StepOutcome(
            accepted, appended, done, draft_seconds, rest, clock.decided, drafts.drafted, drafts.leads
        )
        self.policy.observe(state, plan, outcome)
        if self.recorder is not None:
            self.recorder.step(state, plan, outcome)
        return finished

    def _contain_nans(self, rows: np.ndarray, logprobs: np.ndarray, emitted: np.ndarray) -> None:
        """Where the policy itself gives NaN: say so once per version, and let no other sequence read it.

        Masked cache entries are read, too, with weight zero: the sequence's own blocks are zeroed when it gives
        them up.
        """
        meant = np.arange(logprobs.shape[2]) < emitted[:, None]
        broken = ~(np.isfinite(logprobs[0]) | ~meant).all(1)
        if not broken.any():
            return
        if self._nan_reported != self.weights.version:
            self._nan_reported = self.weights.version
            logger.error(
                "the policy's logits are not finite (policy version %d): check the trainer",
                self.weights.version,
            )
        self.slots.broken[rows[broken]] = True

    def _on_release(self, slot: int, sample: Sample, freed: list[int]) -> None:
        self.table.release(slot)
        self.policy.forget(np.array([slot]))
        if self.history is not None:
            self.history.finish(slot, keep=sample.finish_reason is not None)
        if self.slots.broken[slot]:
            for memory in self._memory:
                memory.wipe(freed)

    def _finish(self, rows: np.ndarray, ended: np.ndarray) -> tuple[list[Sample], np.ndarray]:
        """The samples that are done, and which of `rows` they were."""
        finished = []
        done = ended | (self.slots.length[rows] >= self.slots.limit[rows])
        for row in np.nonzero(done)[0].tolist():
            slot = int(rows[row])
            sample = self.slots.sample(slot)
            last = int(self.slots.tokens[slot, self.slots.length[slot] - 1])
            sample.finish_reason = FinishReason.STOP if ended[row] else FinishReason.LENGTH
            if self.on_finished is not None:
                try:
                    self.on_finished(sample, slot)
                except Exception:
                    logger.exception(
                        "what receives finished samples raised; %s is lost to it", sample.request_id
                    )
            self._release(slot)
            if ended[row] and sample.stop_reason is None and last in sample.params.stop_token_ids:
                sample.stop_reason = last
            self.guard.remember(np.concatenate((sample.prompt.tokens, sample.output)))
            finished.append(sample)
            if self.recorder is not None:
                self.recorder.request(_traced(sample, self.recorder))
        return finished, done

    def assign(self, sample: Sample) -> None:
        """Tell sampling and history of a sample that was given a slot."""
        assert sample.slot is not None
        self.table.assign(
            sample.slot,
            sample.params,
            sample.prompt.tokens.tolist(),
            sample.output.tolist(),
            sample.end_tokens,
            sample.noise_key,
        )
        if math.isnan(sample.started):
            sample.started = time.perf_counter()
        if self.history is not None:
            self.history.begin(sample.slot, sample.prompt.tokens, sample.output)

    def _release(self, slot: int) -> None:
        self.scheduler.release(slot)


def _traced(sample: Sample, recorder: TraceRecorder) -> TraceRequest:
    """What a trace keeps of a finished sample; one that began before the trace counts from its start."""
    return TraceRequest(
        request=f"{sample.request_id}/{sample.index}",
        prompt_tokens=len(sample.prompt.tokens),
        output_tokens=len(sample.output),
        started=max(sample.started - recorder.began, 0.0),
        finished=recorder.now,
        drafted=int(sample.spec[DRAFTED]),
        accepted=int(sample.spec[ACCEPTED]),
    )
