"""Weights from a trainer's process to the server beside it, in buckets of bytes.

On a CPU a bucket travels through Ray's object store, on CUDA as a handle to the sender's memory: both processes use the
same device. The sender waits until a bucket is taken before it fills the next, so one buffer is all it needs.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; a view as a wider dtype must start at a multiple of its size


@dataclass(frozen=True)
class Bucket:
    """Tensors packed into one buffer.

    Attributes:
        entries: Name, dtype, shape and first byte of each tensor.
        data: The bytes as uint8 `[N]`, or what rebuilds them from another process's CUDA memory: a function and its
            arguments.
    """

    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    data: np.ndarray | tuple[Callable[..., Tensor], tuple[Any, ...]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs: views of the buffer, which the sender overwrites later."""
        buffer = self._buffer()
        for name, dtype, shape, start in self.entries:
            stop = start + prod(shape) * dtype.itemsize
            yield name, buffer[start:stop].view(dtype).view(shape)

    def _buffer(self) -> Tensor:
        if isinstance(self.data, np.ndarray):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the array is not writable, and nobody writes
                return torch.from_numpy(self.data)
        rebuild, arguments = self.data
        device = list(arguments)
        device[6] = torch.cuda.current_device()  # the sender may number its devices otherwise
        return rebuild(*device)


async def send(
    weights: AsyncIterator[tuple[str, Tensor]],
    take: Callable[[Bucket], Awaitable[None]],
    bucket_bytes: int,
    device: torch.device,
) -> None:
    """Pack `weights` (DTensors are gathered) into buckets on `device` and have each of them taken.

    Args:
        weights: (name, tensor) pairs; a tensor is copied before the next is asked for.
        take: Returns once the bucket's tensors are no longer needed.
        bucket_bytes: Size of the buffer; a larger tensor travels alone.
        device: Where the receiver has its weights.
    """
    buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
    used = 0
    async for name, value in weights:
        tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if used + tensor.nbytes > bucket_bytes and entries:
            await take(_bucket(entries, buffer[:used]))
            entries, used = [], 0
        room = buffer
        if tensor.nbytes > bucket_bytes:
            room = torch.empty(tensor.nbytes, dtype=torch.uint8, device=device)
        stop = used + tensor.nbytes
        room[used:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        entries.append((name, tensor.dtype, tuple(tensor.shape), used))
        used = -(-stop // ALIGNMENT) * ALIGNMENT
        if room is not buffer:
            await take(_bucket(entries, room))
            entries, used = [], 0
    if entries:
        await take(_bucket(entries, buffer[:used]))


def _bucket(entries: list[tuple[str, torch.dtype, tuple[int, ...], int]], data: Tensor) -> Bucket:
    if data.device.type == "cpu":
        return Bucket(entries, data.numpy())
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.synchronize(data.device)
    return Bucket(entries, reduce_tensor(data))
