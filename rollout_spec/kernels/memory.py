"""Memory that passes stream through, packed weights and KV caches: on large pages, where the system has them.

A processor fetches a stream ahead of its use only up to the end of a page, and looks a page up before that.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21
REGION = 1 << 26  # bytes; what nobody writes to costs none
_LINE = 64


def zeros_on_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros, from the beginning of a large page on; other tensors have no part in their pages.

    Raises:
        MemoryError: The system does not give so much.
    """
    size = count * dtype.itemsize
    try:
        mapped = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -data.data_ptr() % LARGE_PAGE
    return data[start : start + size].view(dtype)


class WeightMemory:
    """Gives out tensors one behind the other: a weight of less than a large page lies on one with others beside it.

    Memory is returned to the system by regions, each when the last of its tensors is gone.
    """

    def __init__(self) -> None:
        self._rest, self._lock = torch.empty(0, dtype=torch.uint8), Lock()

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements, of any value, from the beginning of a cache line on.

        Raises:
            MemoryError: The system does not give so much.
        """
        size = count * dtype.itemsize
        used = -(-size // _LINE) * _LINE
        with self._lock:
            if used > len(self._rest):
                self._rest = zeros_on_large_pages(max(used, REGION), torch.uint8)
            taken, self._rest = self._rest[:size], self._rest[used:]
        return taken.view(dtype)
