"""Attention over the paged KV cache, for prefill, plain decoding, drafting and verification alike.

On CPU the reduction order is fixed, which stock attention does not promise: each query row meets each KV block
in a product of fixed shape, and the blocks' partial results are added in a pairwise tree, to which trailing
empty blocks add nothing. A row's result therefore depends neither on how many rows are computed with it nor
on how long the table is padded. On CUDA the stock kernel is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.torch_backend.kv_cache import KVCache

_ROW_TILE = 4  # matrix products take another code path below this many rows


@dataclass(frozen=True)
class Rows:
    """The rows of one forward: `R` tokens, of which the first `B * S` (or those in `scatter`) are queries.

    Attributes:
        kv_rows: Where each row's key and value go, flat cache rows `[R * kv_heads]`.
        tables: Block tables `[B, blocks]`, padded with the scratch block.
        hidden: True where a query must not look, `[B, blocks, 1, S, 1, block_size]`.
        scatter: For ragged rows, the place of row r in the `B * S` grid `[R]`; padding rows point past its end.
    """

    kv_rows: Tensor
    tables: Tensor
    hidden: Tensor
    scatter: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(B, S)"""
        return self.hidden.shape[0], self.hidden.shape[3]


def padded_blocks(count: int) -> int:
    """Smallest 2^i or 3 * 2^i that holds `count` blocks: few table shapes, and a short reduction tree."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= count else power


def padded_queries(count: int, heads_per_kv: int) -> int:
    """Query rows per sequence such that a product has a multiple of `_ROW_TILE` rows."""
    step = _ROW_TILE // math.gcd(_ROW_TILE, heads_per_kv)
    return -(-count // step) * step


def hidden_mask(positions: Tensor, blocks: int, block_size: int) -> Tensor:
    """Causal mask for queries at `positions [B, S]`: True where a key lies after the query."""
    keys = torch.arange(blocks * block_size, device=positions.device).view(1, blocks, 1, 1, 1, block_size)
    return keys > positions[:, None, None, :, None, None]


class PagedAttention:
    """Callable given to the decoder: stores a layer's keys and values and attends.

    Args of the call: layer index, q `[R, heads, head_dim]`, k and v `[R, kv_heads, head_dim]`; returns
    `[R, heads * head_dim]`.
    """

    def __init__(self, cache: KVCache, rows: Rows, *, sanitize: bool = False) -> None:
        self.cache, self.rows = cache, rows
        self.sanitize = sanitize  # a drafter must never leave a NaN where a masked read would meet it

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.sanitize:
            k, v = torch.nan_to_num(k), torch.nan_to_num(v)
        self.cache.store(layer, self.rows.kv_rows, k, v)
        batch, queries = self.rows.grid
        count, heads, head_dim = q.shape
        if self.rows.scatter is not None:
            grid = q.new_zeros(batch * queries + 1, heads, head_dim)
            grid.index_copy_(0, self.rows.scatter, q)
            q = grid[:-1]
        else:
            q = q[: batch * queries]
        q = q.view(batch, queries, self.cache.kv_heads, heads // self.cache.kv_heads, head_dim).transpose(
            1, 2
        )
        attend = _fixed_order if q.device.type == "cpu" else _stock
        out = (
            attend(q, self.cache, layer, self.rows).transpose(1, 2).reshape(batch * queries, heads * head_dim)
        )
        if self.rows.scatter is not None:
            return torch.cat((out, out.new_zeros(1, heads * head_dim))).index_select(0, self.rows.scatter)
        return (
            out if len(out) == count else torch.cat((out, out.new_zeros(count - len(out), heads * head_dim)))
        )


def _gather(pages: Tensor, tables: Tensor) -> Tensor:
    """Blocks of `tables [B, n]`, as `[B * n * kv_heads, block_size, head_dim]`."""
    return pages.index_select(0, tables.flatten()).flatten(0, 1)


def _fixed_order(q: Tensor, cache: KVCache, layer: int, rows: Rows) -> Tensor:
    """q `[B, kv_heads, S, group, head_dim]` to outputs of the same shape."""
    batch, kv_heads, queries, group, head_dim = q.shape
    blocks, products = rows.tables.shape[1], padded_queries(queries, group) * group
    if products != queries * group:
        q = F.pad(q, (0, 0, 0, 0, 0, products // group - queries))
    q = q.reshape(batch, 1, kv_heads, products, head_dim).expand(-1, blocks, -1, -1, -1)
    scores = torch.bmm(
        q.reshape(-1, products, head_dim), _gather(cache.keys[layer], rows.tables).transpose(1, 2)
    ).view(batch, blocks, kv_heads, products, cache.block_size)
    scores = scores[:, :, :, : queries * group].float().mul_(head_dim**-0.5)
    scores.view(batch, blocks, kv_heads, queries, group, -1).masked_fill_(rows.hidden, -torch.inf)
    weights = scores.sub_(scores.amax((1, 4), keepdim=True)).exp_()
    total = _tree_sum(weights.sum(-1))
    weights = weights.to(q.dtype)
    if products != queries * group:
        weights = F.pad(weights, (0, 0, 0, products - queries * group))
    out = torch.bmm(weights.view(-1, products, cache.block_size), _gather(cache.values[layer], rows.tables))
    out = out.view(batch, blocks, kv_heads, products, head_dim)[:, :, :, : queries * group]
    out = _tree_sum(out.float()) / total[..., None]
    return out.to(q.dtype).view(batch, kv_heads, queries, group, head_dim)


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over dim 1, whose size is 2^i or 3 * 2^i, in pairs."""
    while x.shape[1] > 3 or x.shape[1] == 2:
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0] if x.shape[1] == 1 else x[:, 0] + x[:, 1] + x[:, 2]


def _stock(q: Tensor, cache: KVCache, layer: int, rows: Rows) -> Tensor:
    batch, kv_heads, queries, group, head_dim = q.shape
    blocks = rows.tables.shape[1]

    def contiguous(pages: Tensor) -> Tensor:
        pages = _gather(pages, rows.tables).view(batch, blocks, kv_heads, cache.block_size, head_dim)
        return pages.transpose(1, 2).reshape(batch, kv_heads, blocks * cache.block_size, head_dim)

    visible = ~rows.hidden.expand(-1, -1, -1, -1, group, -1).permute(0, 2, 3, 4, 1, 5)
    out = F.scaled_dot_product_attention(
        q.reshape(batch, kv_heads, queries * group, head_dim),
        contiguous(cache.keys[layer]),
        contiguous(cache.values[layer]),
        attn_mask=visible.reshape(batch, 1, queries * group, blocks * cache.block_size),
    )
    return out.view(batch, kv_heads, queries, group, head_dim)
