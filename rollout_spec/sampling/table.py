"""Per-slot sampling state on the device, and the view of it that one step needs.

The table keeps what persists of a request (parameters, output length, token counts); `select` gathers the rows
of a batch. Which stages a batch needs is decided from flags on the host, so an option nobody uses costs
nothing, and the [capacity, V] penalty state exists only once a request asked for a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rollout_spec.contracts import SamplingParams, invalid
from rollout_spec.sampling.pipeline import SamplingBatch, Stages

_FLOATS = ("temperature", "tail", "min_p", "repetition", "presence", "frequency")
_INTS = ("key", "top_k", "min_tokens", "output_length")
_OUTPUT_LENGTH = _INTS.index("output_length")


def _widen(rows: Tensor, width: int, filler: Tensor) -> Tensor:
    """`rows` [capacity, W], padded with the column `filler` [capacity, 1] to a power of two >= `width`."""
    missing = (1 << max(width - 1, 0).bit_length()) - rows.shape[1]
    return torch.cat([rows, filler.expand(-1, missing)], 1) if missing > 0 else rows


class SamplingTable:
    """Sampling parameters and penalty state of up to `capacity` live sequences.

    Args:
        capacity: Number of slots.
        vocab_size: V, the padded vocabulary (the width of the logits).
        device: Where the state lives.
        true_vocab_size: Number of real tokens; ids from users must lie below. Defaults to `vocab_size`.
    """

    def __init__(
        self, capacity: int, vocab_size: int, device: torch.device | str, true_vocab_size: int | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.true_vocab_size = vocab_size if true_vocab_size is None else true_vocab_size
        self.device = torch.device(device)
        self._floats = torch.zeros(capacity, len(_FLOATS), dtype=torch.float32, device=self.device)
        self._ints = torch.zeros(capacity, len(_INTS), dtype=torch.int64, device=self.device)
        self._bias_ids = torch.zeros(capacity, 1, dtype=torch.int64, device=self.device)
        self._bias = torch.zeros(capacity, 1, dtype=torch.float32, device=self.device)
        self._end_ids = torch.zeros(capacity, 1, dtype=torch.int64, device=self.device)
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None
        self._stages: list[Stages | None] = [None] * capacity

    @property
    def capacity(self) -> int:
        return len(self._stages)

    def assign(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
        key: int,
    ) -> None:
        """Put a request into a slot.

        Args:
            slot: In [0, capacity), free.
            params: Its sampling parameters.
            prompt_token_ids: The prompt, for the repetition penalty.
            output_token_ids: Output tokens so far (not empty when a request is resumed).
            end_token_ids: `stop_token_ids` and, unless `ignore_eos`, the model's end tokens: masked while the
                output is shorter than `min_tokens`. An id outside the vocabulary cannot be sampled and is
                skipped, unless the user asked for it.
            key: int64 noise base, from `noise.fold`.

        Raises:
            InvalidRequest: `logit_bias` or `stop_token_ids` names a token the vocabulary does not have.
        """
        assert self._stages[slot] is None, f"slot {slot} is in use"
        remedy = f"the vocabulary has {self.true_vocab_size} tokens; use ids below that"
        bias = dict(params.logit_bias or {})
        for name, ids in (("logit_bias", bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= self.true_vocab_size:
                    raise invalid(name, token, remedy)
        end = [token for token in end_token_ids if token < self.true_vocab_size]
        stages = Stages.of(params, has_end_tokens=bool(end), vocab_size=self.true_vocab_size)

        floats = {
            "temperature": params.temperature,
            "tail": 1 - params.top_p if stages.top_p else 0.0,
            "min_p": params.min_p if stages.min_p else 0.0,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        ints = {
            "key": key,
            "top_k": stages.top_k,
            "min_tokens": params.min_tokens if stages.min_tokens else 0,
            "output_length": len(output_token_ids),
        }
        self._floats[slot] = torch.tensor([floats[name] for name in _FLOATS], device=self.device)
        self._ints[slot] = torch.tensor([ints[name] for name in _INTS], device=self.device)
        self._write_bias(slot, bias)
        if stages.min_tokens:
            self._end_ids = _widen(self._end_ids, len(end), self._end_ids[:, :1])
            padding = end[:1] * (self._end_ids.shape[1] - len(end))
            self._end_ids[slot] = torch.tensor(end + padding, device=self.device)
        if stages.penalties:
            self._write_penalty_state(slot, prompt_token_ids, output_token_ids)
        self._stages[slot] = stages

    def _write_bias(self, slot: int, bias: dict[int, float]) -> None:
        self._bias_ids = _widen(self._bias_ids, len(bias), self._bias_ids[:, :1])
        self._bias = _widen(self._bias, len(bias), torch.zeros_like(self._bias[:, :1]))
        padding = self._bias.shape[1] - len(bias)
        self._bias_ids[slot] = torch.tensor([*bias, *[0] * padding], device=self.device)
        self._bias[slot] = torch.tensor([*bias.values(), *[0.0] * padding], device=self.device)

    def _write_penalty_state(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        if self._counts is None:
            shape = (self.capacity, self.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        assert self._in_prompt is not None
        output_ids = torch.tensor(output, dtype=torch.int64, device=self.device)
        prompt_ids = torch.tensor(prompt, dtype=torch.int64, device=self.device)
        self._counts[slot].zero_().scatter_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
        self._in_prompt[slot].zero_().scatter_(0, prompt_ids, True)

    def release(self, slot: int) -> None:
        """Free a slot."""
        assert self._stages[slot] is not None, f"slot {slot} is free"
        self._stages[slot] = None

    def record(self, slots: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Append sampled tokens to the output of each sequence.

        Args:
            slots: int64 [B], distinct.
            tokens: int64 [B, S]; the first counts[b] of row b count, the rest is ignored.
            counts: int64 [B], in [0, S].
        """
        lengths = self._ints[:, _OUTPUT_LENGTH]
        lengths.index_add_(0, slots, counts.to(torch.int64))
        if self._counts is not None and any(s is not None and s.penalties for s in self._stages):
            valid = torch.arange(tokens.shape[1], device=self.device) < counts.unsqueeze(1)
            index = (slots.unsqueeze(1).expand_as(tokens), torch.where(valid, tokens, 0))
            self._counts.index_put_(index, valid.to(torch.int32), accumulate=True)

    def select(self, slots: Tensor, host_slots: Sequence[int]) -> SamplingBatch:
        """Gather the rows of a batch.

        Args:
            slots: int64 [B] on the table's device.
            host_slots: The same slots on the host; all in use.

        Returns:
            A snapshot: a later `record` or `assign` does not change it.
        """
        used = []
        for slot in host_slots:
            stages = self._stages[slot]
            assert stages is not None, f"slot {slot} is free"
            used.append(stages)
        stages = Stages.union(used)
        floats = dict(zip(_FLOATS, self._floats[slots].unbind(1), strict=True))
        ints = dict(zip(_INTS, self._ints[slots].unbind(1), strict=True))
        batch = SamplingBatch(stages=stages, **floats, **ints)
        if stages.penalties:
            assert self._counts is not None
            assert self._in_prompt is not None
            batch.counts = self._counts[slots]
            batch.in_prompt = self._in_prompt[slots]
        if stages.logit_bias:
            batch.bias_ids, batch.bias = self._bias_ids[slots], self._bias[slots]
        if stages.min_tokens:
            batch.end_ids = self._end_ids[slots]
        return batch
