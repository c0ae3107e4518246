"""The target's features by cache row: what an EAGLE-style drafter reads, and what it is trained on.

The store has one row for every row of the KV cache and is addressed by the same block tables: whoever shares, copies,
preempts or frees a block has done so with its features. It takes `KVCache.num_blocks * block_size` rows of F numbers
and nothing more. A verify pass writes the features of rejected drafts, too; the pass that computes their position next
writes over them, so that below a sequence's last token every row is that of an emitted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rollout_spec.models.decoder import Decoder
from rollout_spec.torch_backend.attention import PagedAttention
from rollout_spec.torch_backend.kv_cache import KVCache
from rollout_spec.torch_backend.slots import KEPT, Slots


class FeatureStore:
    """Features of the positions that are in the KV cache.

    Args:
        cache: The target's.
        slots: Whose `features` say from which position on a sequence's are kept.
        layers: The residual streams that enter these layers, side by side; empty: the state after the final norm.
        hidden_size: H of the target.
        dtype, device: Of the target.

    Attributes:
        width: F, numbers per position.
    """

    def __init__(
        self,
        cache: KVCache,
        slots: Slots,
        layers: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers, self.width = tuple(layers), hidden_size * max(1, len(layers))
        self._cache, self._slots, self._hidden_size = cache, slots, hidden_size
        self._dtype, self._device = dtype, device
        self._rows = torch.empty(0)
        self.clear()

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def run(self, model: Decoder, ids: Tensor, positions: Tensor, attention: PagedAttention) -> Tensor:
        """`model.hidden`, keeping the features of its rows."""
        places = attention.rows.kv_rows.view(len(ids), -1)[:, 0]
        if not self.layers:
            hidden = model.hidden(ids, positions, attention)
            self._rows.index_copy_(0, places, hidden)
            return hidden
        parts = zip(self.layers, self._rows.split(self._hidden_size, 1), strict=True)
        taps = {layer: partial(part.index_copy_, 0, places) for layer, part in parts}
        return model.hidden(ids, positions, attention, taps)

    def at(self, places: Tensor) -> Tensor:
        """Features `[R, F]` of flat places `block * block_size + offset`, int64 `[R]`."""
        return self._rows.index_select(0, places)

    def of(self, slot: int) -> tuple[int, Tensor]:
        """What is kept of a sequence: the first position, and features `[n, F]` from there to its last token but one.

        They are those of the policy in force: a weight update has them recomputed with everything else.
        """
        slots, size = self._slots, self._cache.block_size
        stop = int(slots.computed[slot])
        start = min(int(slots.features[slot, KEPT]), stop)
        positions = np.arange(start, stop)
        places = slots.tables[slot, positions // size] * size + positions % size
        with torch.inference_mode(False), torch.no_grad():  # training may save them for backward
            return start, self.at(torch.from_numpy(places).to(self._device))

    def copy_block(self, source: int, destination: int) -> None:
        blocks = self._blocks()
        blocks[destination] = blocks[source]

    def wipe(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaNs."""
        self._blocks()[blocks] = 0.0

    def clear(self) -> None:
        """Zero every row; take the memory again if it was released."""
        if self._rows.numel():
            self._rows.zero_()
        else:
            rows = (self._cache.num_blocks + 2) * self._cache.block_size
            with torch.inference_mode(False):  # it is written outside of that mode, too
                self._rows = torch.zeros(rows, self.width, dtype=self._dtype, device=self._device)

    def release(self) -> None:
        """Free the memory; `clear` takes it back."""
        self._rows = torch.empty(0)

    def _blocks(self) -> Tensor:
        return self._rows.view(-1, self._cache.block_size, self.width)
