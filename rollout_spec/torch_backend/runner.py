"""Runs forwards: lays rows out, points them at the cache, and calls the target or a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout_spec.models.decoder import Decoder
from rollout_spec.torch_backend.attention import PagedAttention, Rows, padded_blocks
from rollout_spec.torch_backend.features import FeatureStore
from rollout_spec.torch_backend.kv_cache import KVCache
from rollout_spec.torch_backend.scheduler import PrefillChunk
from rollout_spec.torch_backend.slots import Slots


@dataclass(frozen=True)
class Block:
    """A speculative block: for each of `B` sequences the last token and room for `K` drafts behind it.

    Row s of sequence b stands at position `length[b] - 1 + s`; rows past the sequence's own draft length
    are padding, whose keys and values go to the sink block.

    Attributes:
        last_tokens: `[B]`.
        positions: Position of each row `[B, S]`.
        draft_lengths: `[B]`, on the device.
        kv_rows: Flat cache rows `[B, S, kv_heads]`.
        tables: `[B, blocks]`.
    """

    last_tokens: Tensor
    positions: Tensor
    draft_lengths: Tensor
    kv_rows: Tensor
    tables: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S), S = K + 1"""
        batch, width = self.positions.shape
        return batch, width


class Runner:
    """Forwards over one cache on one device; knows nothing about requests.

    A drafter that shares the cache is another `Decoder`; what it writes is provisional: every row of a block
    that a drafter writes is written again by the target's pass over that block, or wiped.

    Attributes:
        features: Where the target's features are kept; None while nobody wants them.
    """

    def __init__(self, target: Decoder, cache: KVCache, device: torch.device) -> None:
        self.target, self.cache, self.device = target, cache, device
        self.features: FeatureStore | None = None

    def prefill(self, slots: Slots, chunks: Sequence[PrefillChunk]) -> None:
        """Compute the target's keys and values for `chunks` (any mix of lengths)."""
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.stop - chunk.start for chunk in chunks])
        rows = np.array([chunk.slot for chunk in chunks])
        column = np.arange(counts.max())
        valid = column < counts[:, None]
        positions = np.where(valid, starts[:, None] + column, 0)
        tables = self.tables(slots.tables[rows], starts + counts)
        self._ragged(self.target, slots.tokens[rows[:, None], positions], positions, valid, tables)

    def score(self, model: Decoder, tokens: np.ndarray, blocks: Sequence[int], start: int = 0) -> Tensor:
        """Logits `[T - start, padded_vocab]` after tokens `start ..` of `tokens [T]`, in one pass.

        The tokens before `start` must be in `blocks` (lent by the pool) already, from an earlier call.
        A drafter sees its own keys and values here, not the target's.
        """
        positions = np.arange(start, len(tokens))[None]
        tables = self.tables(np.array(blocks)[None], np.array([len(tokens)]))
        hidden = self._ragged(model, tokens[None, start:], positions, np.ones_like(positions, bool), tables)
        return model.logits(hidden)[: positions.size]

    def block(self, slots: Slots, rows: np.ndarray, draft_lengths: np.ndarray) -> Block:
        """Lay out one decode pass over `rows` (slots `[B]`) with `draft_lengths [B]` drafts each."""
        width = int(draft_lengths.max()) + 1
        length = slots.length[rows]
        column = np.arange(width)
        inside = column <= draft_lengths[:, None]
        positions = np.where(inside, length[:, None] - 1 + column, 0)
        tables = self.tables(slots.tables[rows], length + draft_lengths)
        return Block(
            last_tokens=self._device(slots.tokens[rows, length - 1]),
            positions=self._device(positions),
            draft_lengths=self._device(draft_lengths),
            kv_rows=self._device(self.cache.at(tables, positions, inside)),
            tables=self._device(tables),
        )

    def forward(
        self,
        model: Decoder,
        block: Block,
        tokens: Tensor,
        first: int | Tensor = 0,
        *,
        cells: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits (float32) of some rows of `block`.

        Args:
            model: The target, or a drafter that shares its cache.
            block: The block; its first `n` sequences take part.
            tokens: What the rows are fed `[n, c]`.
            first: The rows are `first .. first + c`; `[n]` where that differs between sequences.
            cells: For ragged rows, the flat places in the `[n, c]` grid that are computed `[R]`.
            wanted: Of the computed rows, those whose logits are wanted; None: all.

        Returns:
            `[n, c, padded_vocab]`, or `[R, 1, padded_vocab]` with `cells` or `wanted`.
        """
        batch, count = tokens.shape
        if isinstance(first, int):
            span = slice(first, first + count)
            grid, kv_rows = block.positions[:batch, span], block.kv_rows[:batch, span]
        else:
            columns = first[:, None] + torch.arange(count, device=self.device)
            columns = columns.clamp_max(block.shape[1] - 1)  # of cells that are not computed
            grid = block.positions[:batch].gather(1, columns)
            kv_rows = block.kv_rows[:batch].take_along_dim(columns.unsqueeze(-1), 1)
        ids, positions, kv_rows = tokens.flatten(), grid.flatten(), kv_rows.flatten(0, 1)
        if cells is not None:
            ids, positions, kv_rows = ids[cells], positions[cells], kv_rows[cells]
        rows, place = len(ids), cells
        pad = self._least_rows - rows
        if pad > 0 and model is self.target:
            ids, positions = (torch.cat((x, x.new_zeros(pad))) for x in (ids, positions))
            kv_rows = torch.cat((kv_rows.flatten(), self._sink_rows(pad)))
            if place is not None:
                place = torch.cat((place, place.new_full((pad,), batch * count)))
        attention = self._attention(model, Rows(kv_rows.flatten(), block.tables[:batch], grid, place))
        hidden = self._hidden(model, ids, positions, attention)
        if wanted is not None:
            return model.logits(hidden[wanted])[:, None]
        shape = (batch, count) if cells is None else (rows, 1)
        return model.logits(hidden)[:rows].view(*shape, -1)

    def _ragged(
        self, model: Decoder, tokens: np.ndarray, positions: np.ndarray, valid: np.ndarray, tables: np.ndarray
    ) -> Tensor:
        """Hidden states of the `valid` entries of a `[B, S]` grid, row by row, then padding rows."""
        ids, flat = (self._device(x[valid]) for x in (tokens, positions))
        kv_rows = self._device(self.cache.at(tables, positions, valid)[valid]).flatten()
        place = None if valid.all() else self._device(np.flatnonzero(valid))
        pad = self._least_rows - len(ids)
        if pad > 0:
            ids, flat = (torch.cat((x, x.new_zeros(pad))) for x in (ids, flat))
            kv_rows = torch.cat((kv_rows, self._sink_rows(pad)))
            if place is not None:
                place = torch.cat((place, place.new_full((pad,), positions.size)))
        rows = Rows(kv_rows, self._device(tables), self._device(positions), place)
        return self._hidden(model, ids, flat, self._attention(model, rows))

    @property
    def _least_rows(self) -> int:
        return self.target.weights.lm_head.min_rows

    def _hidden(self, model: Decoder, ids: Tensor, positions: Tensor, attention: PagedAttention) -> Tensor:
        if self.features is None or model is not self.target:
            return model.hidden(ids, positions, attention)
        return self.features.run(model, ids, positions, attention)

    def _attention(self, model: Decoder, rows: Rows) -> PagedAttention:
        return PagedAttention(self.cache, rows, drafting=model is not self.target)

    def tables(self, tables: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Block tables cut or padded to what `tokens [B]` need; blocks past a sequence's own are scratch."""
        count = -(-tokens // self.cache.block_size)
        width = padded_blocks(int(count.max()))
        if tables.shape[1] < width:
            tables = np.pad(
                tables, ((0, 0), (0, width - tables.shape[1])), constant_values=self.cache.scratch_block
            )
        return np.where(np.arange(width) < count[:, None], tables[:, :width], self.cache.scratch_block)

    def _sink_rows(self, count: int) -> Tensor:
        blocks = torch.full((count,), self.cache.sink_block, device=self.device)
        return self.cache.rows(blocks, torch.arange(count, device=self.device))

    def _device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
