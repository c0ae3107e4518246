"""Who is decoded now: admission, shared prompts, chunked prefill, block reservation, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rollout_spec.torch_backend.kv_cache import BlockPool, OutOfBlocks
from rollout_spec.torch_backend.slots import CONTEXT, KEPT, Prompt, Sample, Slots


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `[start, stop)` of `slot` to be computed now."""

    slot: int
    start: int
    stop: int


class Scheduler:
    """Continuous batching over a bounded pool of KV blocks.

    A sample needs a slot and blocks for the tokens it has; when blocks run out, the sample admitted last goes
    back to the head of the queue and recomputes later. Samples of one prompt share its blocks: the first
    computes them, the others wait for it, then share the full blocks and copy the partial one.

    Args:
        slots: Per-slot state.
        pool: The blocks.
        chunk: Most prompt tokens prefilled between two decode passes.
        copy_block: `(source, destination)`: copy one block's entries.
        on_release: `(slot, freed)`: a sample has left its slot, for whatever reason, and these blocks are free.
    """

    def __init__(
        self,
        slots: Slots,
        pool: BlockPool,
        chunk: int,
        copy_block: Callable[[int, int], None],
        on_release: Callable[[int, Sample, list[int]], None],
    ) -> None:
        self.slots, self.pool, self.chunk = slots, pool, chunk
        self.waiting: deque[Sample] = deque()
        self.running: list[int] = []  # slots, in order of admission
        self.preemptions = 0
        self._copy_block, self._on_release = copy_block, on_release
        self._prompts: dict[bytes, Prompt] = {}  # prompts with waiting samples
        self._keeping: set[Prompt] = set()  # prompts that keep blocks for them

    def prompt(self, tokens: np.ndarray) -> Prompt:
        """The shared record of this prompt."""
        return self._prompts.setdefault(tokens.tobytes(), Prompt(tokens))

    def submit(self, sample: Sample) -> None:
        sample.prompt.waiting += 1
        self.waiting.append(sample)

    def admit(self) -> list[Sample]:
        """Give slots and blocks to waiting samples, in order; returns those admitted."""
        admitted, passed = [], []
        while self.waiting and self.slots.free_count:
            sample = self.waiting.popleft()
            if sample.prompt.blocks is None and sample.prompt.leader is not None:
                passed.append(sample)
                continue
            try:
                blocks, computed = self._blocks_for(sample)
            except OutOfBlocks:
                self.waiting.appendleft(sample)
                if self.running or not self._drop_prompts():
                    break
                continue
            self._leave_queue(sample)
            slot = self.slots.occupy(sample, blocks, computed)
            self.running.append(slot)
            if computed < len(sample.prompt.tokens) - 1:
                sample.prompt.leader = sample
            admitted.append(sample)
        self.waiting.extendleft(reversed(passed))
        return admitted

    def adopt(self, sample: Sample, blocks: list[int]) -> None:
        """Let in a sample whose cache entries are in `blocks` already; there must be a free slot."""
        self.running.append(self.slots.occupy(sample, blocks, sample.length - 1))

    def prefills(self) -> list[PrefillChunk]:
        """Prompt (or recomputed) tokens for this step, at most `chunk` in all."""
        budget, chunks = self.chunk, []
        running = np.asarray(self.running, np.int64)
        for slot in running[self.slots.computed[running] < self.slots.length[running] - 1].tolist():
            start = int(self.slots.computed[slot])
            stop = min(int(self.slots.length[slot]) - 1, start + budget)
            if stop == start:
                break
            budget -= stop - start
            chunks.append(PrefillChunk(slot, start, stop))
        return chunks

    def prefilled(self, chunk: PrefillChunk) -> None:
        """Record a computed chunk; a leader past its prompt lets the samples waiting for it in."""
        self.slots.computed[chunk.slot] = chunk.stop
        sample = self.slots.samples[chunk.slot]
        assert sample is not None
        if sample.prompt.leader is sample and chunk.stop >= len(sample.prompt.tokens) - 1:
            sample.prompt.leader = None
            if sample.prompt.waiting:
                shared = -(-(len(sample.prompt.tokens) - 1) // self.slots.block_size)
                sample.prompt.blocks = self.slots.tables[chunk.slot, :shared].tolist()
                sample.prompt.features = self.slots.features[chunk.slot].clip(
                    max=len(sample.prompt.tokens) - 1
                )
                self.pool.share(sample.prompt.blocks)
                self._keeping.add(sample.prompt)

    def ready(self) -> np.ndarray:
        """Slots whose next pass decodes, in order of admission `[B]`."""
        running = np.asarray(self.running, np.int64)
        return running[self.slots.computed[running] == self.slots.length[running] - 1]

    def reserve(self, slots: np.ndarray, draft_lengths: np.ndarray) -> np.ndarray:
        """Make sure every slot owns the blocks that its next pass writes, lookahead included.

        Preempts the samples admitted last while blocks are short. Returns a mask over `slots` of those that
        still have their slot.
        """
        short = self.slots.blocks_short(slots, self.slots.length[slots] + draft_lengths)
        for row in np.nonzero(short > 0)[0].tolist():
            slot = int(slots[row])
            while self.slots.samples[slot] is not None:
                try:
                    self.slots.add_blocks(slot, self.pool.allocate(int(short[row])))
                    break
                except OutOfBlocks:
                    if not self._drop_prompts():
                        self.preempt(self.running[-1])
        return np.isin(slots, self.running)

    def preempt(self, slot: int) -> None:
        """Send a sample back to the head of the queue; its blocks are freed and recomputed later."""
        sample = self.release(slot)
        sample.prompt.waiting += 1
        self._prompts.setdefault(sample.prompt.tokens.tobytes(), sample.prompt)
        self.waiting.appendleft(sample)
        self.preemptions += 1

    def preempt_all(self) -> None:
        """Forget every cache entry (the weights have changed); all samples recompute."""
        for slot in reversed(list(self.running)):
            self.preempt(slot)
        self._drop_prompts()

    def features_from_now(self) -> None:
        """Nothing computed so far has features: they are kept from the next pass on."""
        running = np.asarray(self.running, np.int64)
        self.slots.features[running, KEPT] = self.slots.computed[running]
        for prompt in self._keeping:
            prompt.features[KEPT] = len(prompt.tokens) - 1

    def unread(self) -> None:
        """What a drafter has read of the features counts no more."""
        self.slots.features[:, CONTEXT:] = 0
        for prompt in self._keeping:
            prompt.features[CONTEXT:] = 0

    def release(self, slot: int) -> Sample:
        """Take a finished, aborted or preempted sample out of its slot."""
        sample, blocks = self.slots.vacate(slot)
        self.running.remove(slot)
        self._on_release(slot, sample, self.pool.free(blocks))
        if sample.prompt.leader is sample:
            sample.prompt.leader = None
        return sample

    def withdraw(self, sample: Sample) -> None:
        """Remove a sample that is still waiting."""
        self.waiting.remove(sample)
        self._leave_queue(sample)

    def _blocks_for(self, sample: Sample) -> tuple[list[int], int]:
        """Blocks for the sample's tokens and the next one, and how many tokens of them are computed."""
        total = -(-(sample.length + 1) // self.slots.block_size)
        total = min(total, self.slots.tables.shape[1])
        prompt = sample.prompt
        if prompt.blocks is None:
            return self.pool.allocate(total), 0
        computed = len(prompt.tokens) - 1
        full = computed // self.slots.block_size
        own = self.pool.allocate(total - full)
        self.pool.share(prompt.blocks[:full])
        if full < len(prompt.blocks):
            self._copy_block(prompt.blocks[full], own[0])
        return prompt.blocks[:full] + own, computed

    def _leave_queue(self, sample: Sample) -> None:
        prompt = sample.prompt
        prompt.waiting -= 1
        if not prompt.waiting:
            self._forget_blocks(prompt)
            self._prompts.pop(prompt.tokens.tobytes(), None)

    def _forget_blocks(self, prompt: Prompt) -> None:
        if prompt in self._keeping:
            assert prompt.blocks is not None
            self.pool.free(prompt.blocks)
            prompt.blocks = None
            self._keeping.remove(prompt)

    def _drop_prompts(self) -> bool:
        """Give back the blocks kept for waiting samples; True if there were any."""
        keeping = list(self._keeping)
        for prompt in keeping:
            self._forget_blocks(prompt)
        return bool(keeping)
