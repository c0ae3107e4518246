"""State of the sequences being decoded: one row per slot, as numpy arrays, so that a step costs vector work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout_spec.contracts import FinishReason, SamplingParams

_FIRST_COLUMNS = 1024
PLAIN_STEPS, VERIFY_STEPS, DRAFTED, ACCEPTED = range(4)
KEPT, CONTEXT, READ = range(3)


@dataclass(eq=False)
class Prompt:
    """A prompt and, while samples of it wait, the KV blocks of its first `len - 1` tokens.

    Attributes:
        tokens: Prompt token ids `[P]`, int64.
        waiting: Samples of this prompt that have no slot.
        blocks: KV blocks kept for those samples; None until some sample has prefilled them.
        leader: The sample that is prefilling this prompt, while it is.
        features: Of those blocks, as in `Slots`.
    """

    tokens: np.ndarray
    waiting: int = 0
    blocks: list[int] | None = None
    leader: Sample | None = None
    features: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))


@dataclass(eq=False)
class Sample:
    """One sample of a request, from submission to completion.

    While it has a slot, its output lives there; `output` and `logprobs` hold it before and after.
    """

    request_id: str
    index: int
    prompt: Prompt
    params: SamplingParams
    noise_key: int
    limit: int
    end_tokens: tuple[int, ...]
    slot: int | None = None
    output: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.float32))
    spec: np.ndarray = field(default_factory=lambda: np.zeros(4, np.int64))
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    version_starts: list[tuple[int, int]] = field(default_factory=list)
    rejected: list[int] = field(
        default_factory=list
    )  # positions of drafts that fell, if somebody learns from them
    finish_reason: FinishReason | None = None
    done: bool = False  # nothing of it changes any more: whoever waits for it may read it
    stop_reason: int | str | None = None
    started: float = math.nan  # when it first had a slot, by `time.perf_counter`

    @property
    def length(self) -> int:
        """Tokens known so far, prompt included (only while it has no slot)."""
        return len(self.prompt.tokens) + len(self.output)


class Slots:
    """Arrays over `capacity` slots.

    Invariant of a decoding slot: the cache holds its first `length - 1` tokens; the next pass feeds token
    `length - 1`, whose logits give token `length`.

    Attributes:
        tokens: Token ids `[capacity, columns]`, prompt and output.
        length, prompt_length, computed, limit: Per slot: tokens known, prompt tokens, tokens in the cache,
            longest length allowed.
        tables: Block table `[capacity, max_blocks]`, padded with the scratch block; `num_blocks` are in use.
        logprobs: `[3, capacity, columns]`: full-policy, processed, and mask mass of each token.
        spec: Counters `[capacity, 4]`, see the constants of this module.
        features: `[capacity, 3]`: the first position whose feature is `KEPT`, and of a drafter that reads features
            the `CONTEXT` it sees, from this position on, and the pairs it has `READ`, those before this position.
    """

    def __init__(self, capacity: int, max_model_len: int, block_size: int, scratch_block: int) -> None:
        self.capacity, self.max_model_len, self.block_size = capacity, max_model_len, block_size
        self.scratch_block = scratch_block
        columns = min(max_model_len, _FIRST_COLUMNS)
        self.samples: list[Sample | None] = [None] * capacity
        self.tokens = np.zeros((capacity, columns), np.int64)
        self.logprobs = np.zeros((3, capacity, columns), np.float32)
        self.length = np.zeros(capacity, np.int64)
        self.prompt_length = np.zeros(capacity, np.int64)
        self.computed = np.zeros(capacity, np.int64)
        self.limit = np.zeros(capacity, np.int64)
        self.version = np.full(capacity, -1, np.int64)  # of the last output token; -1 before the first
        self.stop_strings = np.zeros(capacity, bool)  # whether its text has to be looked at
        self.top_logprobs = np.zeros(capacity, bool)  # whether it asked for top logprobs
        self.broken = np.zeros(capacity, bool)  # whether its logits were not finite
        self.tables = np.full((capacity, -(-max_model_len // block_size)), scratch_block, np.int64)
        self.num_blocks = np.zeros(capacity, np.int64)
        self.spec = np.zeros((capacity, 4), np.int64)
        self.features = np.zeros((capacity, 3), np.int64)
        self.end_tokens = np.full((capacity, 1), -1, np.int64)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def free_count(self) -> int:
        return len(self._free)

    def sample(self, slot: int) -> Sample:
        """The sample in a slot that is in use."""
        sample = self.samples[slot]
        assert sample is not None
        return sample

    def occupy(self, sample: Sample, blocks: list[int], computed: int) -> int:
        """Give `sample` a slot with `blocks`, of whose tokens `computed` are in the cache."""
        slot = self._free.pop()
        prompt, length = len(sample.prompt.tokens), sample.length
        self._reserve_columns(length)
        self.tokens[slot, :prompt] = sample.prompt.tokens
        self.tokens[slot, prompt:length] = sample.output
        self.logprobs[:, slot, prompt:length] = sample.logprobs
        self.length[slot], self.prompt_length[slot] = length, prompt
        self.computed[slot], self.limit[slot] = computed, sample.limit
        self.version[slot] = sample.version_starts[-1][1] if sample.version_starts else -1
        self.spec[slot] = sample.spec
        self.features[slot] = sample.prompt.features if computed else 0
        self.stop_strings[slot], self.top_logprobs[slot] = (
            bool(sample.params.stop),
            bool(sample.params.logprobs),
        )
        self.broken[slot] = False
        self.num_blocks[slot] = 0
        self.add_blocks(slot, blocks)
        ends = sample.end_tokens
        if len(ends) > self.end_tokens.shape[1]:
            extra = np.full((self.capacity, len(ends) - self.end_tokens.shape[1]), -1, np.int64)
            self.end_tokens = np.concatenate((self.end_tokens, extra), axis=1)
        self.end_tokens[slot] = -1
        self.end_tokens[slot, : len(ends)] = ends
        self.samples[slot], sample.slot = sample, slot
        return slot

    def vacate(self, slot: int) -> tuple[Sample, list[int]]:
        """Take the sample out of its slot, its output with it; returns it and the blocks it held."""
        sample = self.sample(slot)
        span = slice(self.prompt_length[slot], self.length[slot])
        sample.output = self.tokens[slot, span].copy()
        sample.logprobs = self.logprobs[:, slot, span].copy()
        sample.spec = self.spec[slot].copy()
        blocks = self.tables[slot, : self.num_blocks[slot]].tolist()
        self.tables[slot] = self.scratch_block
        self.num_blocks[slot] = 0
        self.samples[slot], sample.slot = None, None
        self._free.append(slot)
        return sample, blocks

    def add_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        used = self.num_blocks[slot]
        self.tables[slot, used : used + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def blocks_short(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Blocks each slot lacks to hold `lengths` tokens."""
        return -(-lengths // self.block_size) - self.num_blocks[slots]

    def append(
        self, slots: np.ndarray, tokens: np.ndarray, emitted: np.ndarray, logprobs: np.ndarray
    ) -> np.ndarray:
        """Append each slot's first `emitted` tokens, up to and including the first end token.

        Args:
            slots: `[B]`.
            tokens: `[B, S]`.
            emitted: `[B]`, at least 1 each; never beyond the slot's limit.
            logprobs: `[3, B, S]`.

        Returns:
            Tokens really appended `[B]`, negative where the last of them is an end token.
        """
        width = tokens.shape[1]
        columns = np.arange(width)
        ends = (tokens[:, :, None] == self.end_tokens[slots][:, None, :]).any(-1) & (
            columns < emitted[:, None]
        )
        ended = ends.any(1)
        emitted = np.where(ended, ends.argmax(1) + 1, emitted)
        self._reserve_columns(int((self.length[slots] + emitted).max()))
        row, column = np.nonzero(columns < emitted[:, None])
        place, at = slots[row], self.length[slots][row] + column
        self.tokens[place, at] = tokens[row, column]
        self.logprobs[:, place, at] = logprobs[:, row, column]
        self.length[slots] += emitted
        self.computed[slots] = self.length[slots] - 1
        return np.where(ended, -emitted, emitted)

    def truncate(self, slot: int, length: int) -> None:
        """Forget tokens past `length` (after a stop string)."""
        self.length[slot] = length
        self.computed[slot] = min(self.computed[slot], length - 1)

    def _reserve_columns(self, wanted: int) -> None:
        have = self.tokens.shape[1]
        if wanted <= have:
            return
        extra = min(self.max_model_len, max(wanted, 2 * have)) - have
        self.tokens = np.pad(self.tokens, ((0, 0), (0, extra)))
        self.logprobs = np.pad(self.logprobs, ((0, 0), (0, 0), (0, extra)))
