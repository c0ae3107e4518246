"""The cache of a drafter that reads the target's features, and how it keeps up with the sequences.

Pair t of a sequence is (embedding of token t + 1, feature of position t), at position t: with L tokens known, pairs
0 .. L - 2 can be read, and the last of them predicts token L. What has been read stands in a cache of the drafter's
own, addressed by the target's block tables; `Slots.features` says how far. Before it drafts, the drafter reads what
it has not read yet, whether that is the tokens of one pass or of many in which it was switched off. Of more than
`MOST_UNREAD` pairs it reads the last only and sees nothing of those before: less context, never a wrong one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rollout_spec.drafters.base import FeatureModel
from rollout_spec.torch_backend.attention import PagedAttention, Rows
from rollout_spec.torch_backend.features import FeatureStore
from rollout_spec.torch_backend.kv_cache import KVCache
from rollout_spec.torch_backend.runner import Runner
from rollout_spec.torch_backend.slots import CONTEXT, READ, Slots

MOST_UNREAD = 4096  # pairs of one sequence read at once
_CELLS = 2048  # pairs of all sequences in one forward, padding included: their attention masks take memory


class Follower:
    """Keeps a one-layer drafter's cache for the sequences in `slots`.

    Args:
        features: The target's.
        runner: Lays out tables.
        slots: Their tokens, tables and how far each was read.
        kv_heads, head_dim: Of the drafter.
        dtype, device: Of the target.
    """

    def __init__(
        self,
        features: FeatureStore,
        runner: Runner,
        slots: Slots,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        target = runner.cache
        self.features, self.runner, self.slots, self.device = features, runner, slots, device
        with torch.inference_mode(False):  # it is cleared outside of that mode, too
            self.cache = KVCache(1, target.num_blocks, kv_heads, target.block_size, head_dim, dtype, device)

    def round(self, rows: np.ndarray, lengths: np.ndarray) -> Following:
        """One round of drafting: `lengths [B]`, falling, for the sequences in slots `rows [B]`."""
        return Following(self, rows, lengths)


class Following:
    """`DraftRound.follow` of one round; see there."""

    def __init__(self, follower: Follower, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._features, self._cache, self._slots = follower.features, follower.cache, follower.slots
        self._lengths, self._device = lengths, follower.device
        self._rows = rows = rows[lengths > 0]
        known = self._slots.length[rows]
        self._last = np.maximum(known - 2, 0)  # the pair that predicts the next token
        self._tables = follower.runner.tables(self._slots.tables[rows], known + lengths[: len(rows)])
        self._device_tables = self._to(self._tables)
        self._context = self._slots.features[rows, CONTEXT]
        step = np.arange(int(lengths.max()))
        inside = step < lengths[: len(rows), None]
        positions = np.where(inside, self._last[:, None] + step, 0)
        self._steps = self._to(positions), self._to(self._cache.at(self._tables, positions, inside))

    def __call__(
        self, model: FeatureModel, tokens: Tensor | None, states: Tensor | None, step: int
    ) -> Tensor:
        if tokens is None or states is None:
            return self._read(model)
        count = int((self._lengths > step).sum())
        positions, places = (x[:count, step] for x in self._steps)
        tables, context = self._device_tables[:count], self._device_context[:count]
        attend = PagedAttention(
            self._cache, Rows(places.flatten(), tables, positions[:, None], None, context), drafting=True
        )
        return model.hidden(tokens[:count, 0], positions, states[:count], attend, own=True)

    def _read(self, model: FeatureModel) -> Tensor:
        """States `[B, H]` after the last pair of every sequence; the pairs before it that are not read yet come along."""
        slots, rows, last = self._slots, self._rows, self._last
        kept, context, read = slots.features[rows].T
        start = np.maximum(np.minimum(np.maximum(read, kept), last), last + 1 - MOST_UNREAD)
        blind = (kept > last) | (slots.length[rows] < 2)  # no feature of the last pair: zeros stand for it
        self._context = np.where((start > read) | blind, start, context)
        count = last + 1 - start
        width = max(1, min(int(count.max()), _CELLS // len(rows)))
        states: Tensor | None = None
        for first in range(0, int(count.max()), width):
            column = first + np.arange(width)
            inside = column < count[:, None]
            positions = np.where(inside, start[:, None] + column, self._context[:, None])
            attend, at, places = self._attention(positions, inside)
            sequence, _ = np.nonzero(inside)
            following = np.minimum(positions + 1, slots.length[rows, None] - 1)
            tokens = self._to(slots.tokens[rows[:, None], following][inside])
            features = self._features.at(places)
            if blind.any():
                features = features.masked_fill(self._to(blind[sequence])[:, None], 0.0)
            found = model.hidden(tokens, at, features, attend, own=False)
            ends = positions[inside] == last[sequence]
            if states is None:
                states = found.new_zeros(len(rows), found.shape[1])
            states[self._to(sequence[ends])] = found[self._to(np.flatnonzero(ends))]
        assert states is not None
        self._device_context = self._to(self._context)
        slots.features[rows, CONTEXT] = np.where(blind, context, self._context)
        slots.features[rows, READ] = np.where(blind, read, last + 1)
        return states

    def _attention(self, positions: np.ndarray, inside: np.ndarray) -> tuple[PagedAttention, Tensor, Tensor]:
        """Attention of the cells `inside` a grid of `positions [B, S]`, their positions, and their places in the cache."""
        count = len(positions)
        kv_rows = self._to(self._cache.at(self._tables[:count], positions, inside)[inside])
        place = None if inside.all() else self._to(np.flatnonzero(inside))
        context = self._to(self._context[:count])
        rows = Rows(kv_rows.flatten(), self._device_tables[:count], self._to(positions), place, context)
        return PagedAttention(self._cache, rows, drafting=True), self._to(positions[inside]), kv_rows[:, 0]

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
