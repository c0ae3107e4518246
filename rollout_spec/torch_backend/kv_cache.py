"""Paged KV cache: one pool of fixed-size blocks, shared by the target and every drafter that reads its entries."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.kernels.library import Kernels, kernels
from rollout_spec.kernels.memory import zeros_on_large_pages


class OutOfBlocks(Exception):
    """The pool cannot serve an allocation now; the scheduler waits or preempts."""


class BlockPool:
    """Free list and reference counts of KV blocks (host side).

    A block with several owners (siblings of a GRPO group sharing a prompt) is freed with its last owner.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = np.zeros(num_blocks, dtype=np.int32)

    @property
    def available(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one owner; raises `OutOfBlocks` and takes none if there are fewer."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.pop() for _ in range(count)]
        self._owners[blocks] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add one owner to each block."""
        assert (self._owners[blocks] > 0).all(), "sharing a free block"
        self._owners[blocks] += 1

    def free(self, blocks: list[int]) -> list[int]:
        """Remove one owner from each block; blocks without owners return to the pool, and are returned."""
        assert (self._owners[blocks] > 0).all(), "freeing a free block"
        self._owners[blocks] -= 1
        freed = [block for block in blocks if self._owners[block] == 0]
        self._free.extend(freed)
        return freed


class KVCache:
    """Keys and values of all layers, `[layers, kv_heads, blocks + 2, block_size, head_dim]` each.

    Heads come first, so that gathering a sequence's blocks leaves each head's entries in one piece. Two blocks at
    the end belong to nobody: tables are padded with the scratch block, which is never written, and rows that pad
    a batch write to the sink block, which is never read, so that what they compute from a broken sequence reaches
    no other. Entries are addressed by flat rows `(head * (blocks + 2) + block) * block_size + offset`, computed
    once per forward and reused by every layer.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks, self.block_size, self.head_dim = num_blocks, block_size, head_dim
        self._shape = (num_layers, kv_heads, num_blocks + 2, block_size, head_dim)
        self._dtype, self._device = dtype, device
        self.keys = self.values = torch.empty(0)
        self._head_offsets = np.arange(kv_heads) * ((num_blocks + 2) * block_size)
        self.clear()

    @property
    def scratch_block(self) -> int:
        return self.num_blocks

    @property
    def sink_block(self) -> int:
        return self.num_blocks + 1

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.nbytes

    def rows(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Flat rows `[R * kv_heads]` of the entries at (block `[R]`, offset `[R]`)."""
        heads = torch.from_numpy(self._head_offsets).to(blocks.device)
        return ((blocks * self.block_size + offsets)[:, None] + heads).flatten()

    def at(self, tables: np.ndarray, positions: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Flat rows `[B, S, kv_heads]` of `positions [B, S]` by `tables [B, blocks]`; the sink's if not `inside`."""
        blocks = tables[np.arange(len(tables))[:, None], positions // self.block_size]
        flat = np.where(inside, blocks, self.sink_block) * self.block_size + positions % self.block_size
        return flat[:, :, None] + self._head_offsets

    def store(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values `[R, kv_heads, head_dim]` at flat `rows [R * kv_heads]`."""
        if (own := self.kernels()) is not None:
            own.store_entries(keys, values, rows, self.keys[layer], self.values[layer])
            return
        for cache, new in ((self.keys, keys), (self.values, values)):
            cache[layer].view(-1, self.head_dim).index_copy_(0, rows, new.reshape(-1, self.head_dim))

    def kernels(self) -> Kernels | None:
        """This project's kernels, where they can read this cache."""
        fits = self._device.type == "cpu" and self.head_dim % 16 == 0
        return kernels() if fits and self._dtype in (torch.float32, torch.bfloat16) else None

    def copy_block(self, source: int, destination: int) -> None:
        for cache in (self.keys, self.values):
            cache[:, :, destination] = cache[:, :, source]

    def wipe(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaNs: even behind a mask a NaN is read (0 * NaN)."""
        for cache in (self.keys, self.values):
            cache[:, :, blocks] = 0.0

    def wipe_rows(self, rows: Tensor) -> None:
        """The same for flat rows `[R]`."""
        for cache in (self.keys, self.values):
            cache.view(len(cache), -1, self.head_dim).index_fill_(1, rows, 0.0)

    def clear(self) -> None:
        """Zero every entry, so that nothing computed from earlier weights can be read again.

        The tensors stay where they are, as captured graphs need, unless they were released.
        """
        if not self.released:
            self.keys.zero_()
            self.values.zero_()
            return
        try:
            self.keys, self.values = self._zeros(), self._zeros()
        except (RuntimeError, MemoryError) as error:
            self.release()
            remedy = f"no memory for this KV cache; lower kv_cache_tokens or kv_cache_bytes ({error})"
            raise invalid("kv_cache_tokens", self.num_blocks * self.block_size, remedy) from error

    def _zeros(self) -> Tensor:
        if self._device.type == "cpu":
            return zeros_on_large_pages(math.prod(self._shape), self._dtype).view(self._shape)
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    @property
    def released(self) -> bool:
        """Whether the memory is given up."""
        return not self.keys.numel()

    def release(self) -> None:
        """Free the memory; `clear` takes it back."""
        self.keys = self.values = torch.empty(0)
