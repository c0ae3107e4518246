"""Attention over the paged KV cache, for prefill, plain decoding, drafting and verification alike.

The target's attention on CPU has a fixed reduction order, which stock attention does not promise. What torch's
kernels keep by themselves is used as it is: an element of q k' sums over head_dim alone, and a row's softmax takes
no notice of trailing entries that are masked. What they do not keep is the sum over the context, whose grouping
changes with its length: it is taken block by block, in products of one fixed depth, and the blocks are added in a
pairwise tree, to which trailing empty blocks add nothing. A row's result then depends neither on how many rows
are computed with it nor on how far the table is padded; the engine's probe checks that on the machine at hand.
Drafters on CPU may sum in any order, and every model on CUDA uses the stock kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.decoder_layer import PagedRows
from rollout_spec.kernels.library import Kernels
from rollout_spec.torch_backend.kv_cache import KVCache

_LONG_CONTEXT = 1024  # tokens of all sequences together, from where plain products beat the stock CPU kernel
_ROW_TILE = 8  # products of fewer rows take other code paths: below 6 on an Intel CPU with AVX512, below 4 on an AMD one


@dataclass(frozen=True)
class Rows:
    """The rows of one forward: `R` tokens, of which the first `B * S` (or those in `scatter`) are queries.

    Attributes:
        kv_rows: Where each row's key and value go, flat cache rows `[R * kv_heads]`.
        tables: Block tables `[B, blocks]`, padded with the scratch block.
        positions: Of the queries in their sequences `[B, S]`; each sees the entries up to its own.
        scatter: For ragged rows, the place of row r in the `B * S` grid `[R]`; padding rows point past its end.
        first: The first entry that a sequence's queries see `[B]`; None: 0.
    """

    kv_rows: Tensor
    tables: Tensor
    positions: Tensor
    scatter: Tensor | None = None
    first: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(B, S)"""
        batch, queries = self.positions.shape
        return batch, queries

    def mask(self, length: int) -> Tensor:
        """Added to the scores of `length` entries: 0, or -inf where a query must not look, float32 `[B, S, length]`."""
        entries = torch.arange(length, device=self.positions.device)
        hidden = entries > self.positions[:, :, None]
        if self.first is not None:
            hidden |= entries < self.first[:, None, None]
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)

    def seen(self) -> tuple[Tensor, ...]:
        """Of each of the R rows, on a CPU: the line of its table, the first entry it sees, and the one behind the last.

        Padding rows see none.
        """
        batch, queries = self.grid
        last = self.positions.flatten() + 1
        sequences, first = _lines(batch, queries)
        if self.first is not None:
            first = self.first[sequences]
        if self.scatter is not None:
            place = self.scatter.clamp_max(batch * queries)
            return tuple(F.pad(x, (0, 1))[place] for x in (sequences, first, last))
        return sequences, first, last


@lru_cache(maxsize=256)
def _lines(batch: int, queries: int) -> tuple[Tensor, Tensor]:
    """Of each query of a grid its line, and a zero; on the CPU."""
    lines = torch.arange(batch).repeat_interleave(queries)
    return lines, torch.zeros_like(lines)


def padded_blocks(count: int) -> int:
    """Smallest 2^i or 3 * 2^i that holds `count` blocks: few table shapes, and a short reduction tree."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= count else power


class PagedAttention:
    """Callable given to the decoder: stores a layer's keys and values and attends.

    Args of the call: layer index, q `[R, heads, head_dim]`, k and v `[R, kv_heads, head_dim]`; returns
    `[R, heads * head_dim]`.

    Args:
        cache: Where keys and values live.
        rows: The rows of this forward.
        drafting: A drafter calls, and any kernel will do.

    Attributes:
        paged: For this project's CPU kernels, where they can read the cache.
    """

    def __init__(self, cache: KVCache, rows: Rows, *, drafting: bool = False) -> None:
        self.cache, self.rows, self.drafting = cache, rows, drafting
        own = cache.kernels()
        self.paged = None if own is None else _paged(own, cache, rows)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store(layer, self.rows.kv_rows, k, v)
        if (at := self.paged) is not None:
            seen = at.sequences, at.first, at.last
            return at.kernels.attention(q, at.keys[layer], at.values[layer], at.tables, *seen)
        batch, queries = self.rows.grid
        count, heads, head_dim = q.shape
        if self.rows.scatter is not None:
            grid = q.new_zeros(batch * queries + 1, heads, head_dim)
            q = grid.index_copy_(0, self.rows.scatter, q)
        q = q[: batch * queries].view(batch, queries, -1, heads // k.shape[1], head_dim)
        attend = self._kernel(q)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = attend(q, keys, values, self.rows.tables, self._mask).view(-1, heads * head_dim)
        if self.rows.scatter is not None:
            return F.pad(out, (0, 0, 0, 1)).index_select(0, self.rows.scatter)
        return out if len(out) == count else F.pad(out, (0, 0, 0, count - len(out)))

    @cached_property
    def _mask(self) -> Tensor:
        return self.rows.mask(self.rows.tables.shape[1] * self.cache.block_size)

    def _kernel(self, q: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        if q.is_cuda:
            return _stock
        if not self.drafting:
            return _fixed_order
        return _stock if self.rows.tables.numel() * self.cache.block_size < _LONG_CONTEXT else _free_order


def _paged(kernels: Kernels, cache: KVCache, rows: Rows) -> PagedRows:
    seen = rows.seen()
    count = len(rows.kv_rows) // cache.keys.shape[1]
    if short := count - len(seen[0]):  # padding rows without a place in the grid
        seen = tuple(F.pad(x, (0, short)) for x in seen)
    return PagedRows(kernels, cache.keys, cache.values, rows.kv_rows, rows.tables, *seen)


def _weights(q: Tensor, keys: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the context, in q's dtype `[kv_heads * B, S * group, blocks * block_size]`.

    Args:
        q: `[B, S, kv_heads, group, head_dim]`.
        keys: `[kv_heads, blocks + 2, block_size, head_dim]`.
        tables: See `Rows`.
        mask: The same.
    """
    batch, queries, kv_heads, group, head_dim = q.shape
    q = q.permute(2, 0, 1, 3, 4).reshape(kv_heads * batch, queries * group, head_dim)
    q = F.pad(q, (0, 0, 0, short)) if (short := _short(q)) else q
    k = keys.index_select(1, tables.flatten()).view(kv_heads * batch, -1, head_dim)
    scores = torch.bmm(q, k.transpose(1, 2))[:, : queries * group]
    scores = scores.view(kv_heads, batch, queries, group, -1)
    weights = torch.add(mask[:, :, None], scores, alpha=1 / math.sqrt(head_dim)).softmax(-1).to(q.dtype)
    return weights.view(kv_heads * batch, queries * group, -1)


def _short(x: Tensor) -> int:
    """Rows that `x [.., rows, columns]` lacks to a multiple of the row tile."""
    return -x.shape[-2] % _ROW_TILE


def _fixed_order(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """q `[B, S, kv_heads, group, head_dim]`, keys and values `[kv_heads, blocks + 2, block_size, head_dim]`.

    Returns `[B, S, kv_heads, group, head_dim]`, contiguous.
    """
    batch, queries, kv_heads, group, head_dim = q.shape
    blocks, block_size = tables.shape[1], keys.shape[2]
    weights = _weights(q, keys, tables, mask).unflatten(2, (blocks, block_size)).transpose(1, 2).flatten(0, 1)
    weights = F.pad(weights, (0, 0, 0, short)) if (short := _short(weights)) else weights
    out = torch.bmm(weights, values.index_select(1, tables.flatten()).view(-1, block_size, head_dim))
    out = out.view(kv_heads, batch, blocks, -1, head_dim)
    out = out.squeeze(2) if blocks == 1 else _tree_sum(out.float(), 2).to(q.dtype)
    out = out[:, :, : queries * group].view(kv_heads, batch, queries, group, head_dim)
    return out.permute(1, 2, 0, 3, 4).contiguous()


def _free_order(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """The same in as few products as possible, for CPU drafters: faster than the stock kernel on long contexts."""
    batch, queries, kv_heads, group, head_dim = q.shape
    v = values.index_select(1, tables.flatten()).view(kv_heads * batch, -1, head_dim)
    out = torch.bmm(_weights(q, keys, tables, mask), v).view(kv_heads, batch, queries, group, head_dim)
    return out.permute(1, 2, 0, 3, 4).contiguous()


def _tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over a dim whose size is 2^i or 3 * 2^i, in pairs."""
    while (size := x.shape[dim]) > 1:
        if size == 3:
            return x.select(dim, 0) + x.select(dim, 1) + x.select(dim, 2)
        pairs = x.unflatten(dim, (size // 2, 2))
        x = pairs.select(dim + 1, 0) + pairs.select(dim + 1, 1)
    return x.squeeze(dim)


def _stock(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """The same with `scaled_dot_product_attention`; the queries of a group count as rows of its key/value head."""
    batch, queries, kv_heads, group, head_dim = q.shape

    def gather(pages: Tensor) -> Tensor:
        return pages.index_select(1, tables.flatten()).view(kv_heads, batch, -1, head_dim).transpose(0, 1)

    q = q.transpose(1, 2).reshape(batch, kv_heads, queries * group, head_dim)
    mask = mask.to(q.dtype)  # CUDA's kernels want the dtypes to agree; 0 and -inf lose nothing
    mask = (mask if queries == 1 else mask.repeat_interleave(group, 1))[:, None]
    out = F.scaled_dot_product_attention(q, gather(keys), gather(values), attn_mask=mask)
    return out.view(batch, kv_heads, queries, group, head_dim).transpose(1, 2).contiguous()
