"""From rollouts to episodes: the target's features at the tokens that were emitted, on the host.

The torch backend keeps features beside the KV cache, by the same blocks, so that what a rejected draft left is written
over by the pass that computes its position again. Nothing is moved while a sequence is being decoded: when it has
finished, one gather takes its rows, and one copy brings them to the host (from CUDA into pinned memory, while decoding
goes on). A weight update has all features of the sequences in flight computed anew, so an episode never mixes versions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollout_spec.adaptive.buffer import EpisodeBuffer
from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import invalid
from rollout_spec.torch_backend.slots import Sample

if TYPE_CHECKING:
    from rollout_spec.engine import RolloutEngine
    from rollout_spec.integrations.vllm.hidden_states import HiddenStates


class _ToHost:
    """Copies to the host in order, without waiting; what has arrived is handed on."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    def copy(self, tensor: Tensor, then: Callable[[Tensor], None]) -> None:
        if not tensor.is_cuda:
            then(tensor)
            return
        with torch.inference_mode(False), torch.no_grad():  # training may save it for backward
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((event, lambda: then(host)))
        self.deliver()

    def deliver(self, *, wait: bool = False) -> None:
        while self._under_way and (wait or self._under_way[0][0].query()):
            event, then = self._under_way.popleft()
            event.synchronize()
            then()


class FeatureCapture:
    """Hands on every finished sequence of an engine (torch backend) as an episode.

    Sequences that were under way when the capture began, and whose first tokens have no features therefore, are left
    out and counted; aborted ones are left out.

    Args:
        engine: Whose rollouts.
        receive: What takes an episode, such as `EpisodeBuffer.add`; called in the thread that decodes.
        layers: As `EagleSpec.feature_layers`.

    Attributes:
        captured, incomplete: Sequences so far.
    """

    def __init__(
        self, engine: RolloutEngine, receive: Callable[[Episode], object], layers: Sequence[int] = ()
    ) -> None:
        self.captured, self.incomplete = 0, 0
        self._receive, self._engine, self._host = receive, engine, _ToHost()
        self._store = engine.keep_features(layers, self._finished)
        self._backend = engine.backend

    def flush(self) -> None:
        """Wait for the copies under way."""
        self._host.deliver(wait=True)

    def stop(self) -> None:
        """Capture no more; the features stay, for a drafter may read them."""
        self._engine.keep_features(self._store.layers, None)
        self.flush()

    def _finished(self, sample: Sample, slot: int) -> None:
        start, features = self._store.of(slot)
        if start or not len(features):
            self.incomplete += 1
            return
        slots, version = self._backend.slots, self._backend.weights.version
        length, request = int(slots.length[slot]), f"{sample.request_id}/{sample.index}"
        with torch.inference_mode(False):
            tokens = torch.from_numpy(slots.tokens[slot, :length].copy())
            rejected = torch.tensor(sorted({x for x in sample.rejected if x < length}), dtype=torch.int64)
        prompt = len(sample.prompt.tokens)

        def arrived(host: Tensor) -> None:
            self.captured += 1
            self._receive(Episode(request, tokens, host, prompt, version, rejected))

        self._host.copy(features, arrived)


@dataclass
class _Partial:
    """Rows of a sequence under way, by position: (version, token, state)."""

    rows: dict[int, tuple[int, int, Tensor]]
    nbytes: int = 0


class VllmCapture:
    """The same from vLLM: give it to `rollout_spec.integrations.vllm.hidden_states.capture`.

    vLLM does not tell the hook when a sequence ends: whoever reads the outputs calls `finished`. Rows whose states an
    older policy computed are left out: an episode is the longest run of positions up to the last one with states of
    the version it is stamped with. It begins later than the sequence where the prefix cache had the first ones.

    Args:
        buffer: Where episodes go.
        version: Gives the policy version in force.
        budget_bytes: Of rows of sequences under way; when they take more, the shortest is given up.

    Attributes:
        given_up: Sequences dropped for lack of room.
    """

    def __init__(
        self, buffer: EpisodeBuffer, version: Callable[[], int], budget_bytes: int = 1 << 30
    ) -> None:
        if budget_bytes < 1:
            raise invalid("budget_bytes", budget_bytes, "use an integer >= 1")
        self.buffer, self.budget_bytes, self.given_up = buffer, budget_bytes, 0
        self._version, self._host = version, _ToHost()
        self._partial: dict[str, _Partial] = {}
        self._ignored: set[str] = set()

    def __call__(self, captured: HiddenStates) -> None:
        """Keep the rows of one step."""
        version, ids, counts = self._version(), captured.request_ids, captured.counts.tolist()
        tokens, positions = (
            captured.tokens.tolist(),
            captured.positions.reshape(-1)[-len(captured.tokens) :].tolist(),
        )
        self._host.copy(
            captured.states, lambda states: self._keep(version, ids, counts, tokens, positions, states)
        )

    def finished(self, request_id: str, tokens: Iterable[int], prompt_tokens: int) -> Episode | None:
        """A sequence has ended with these tokens, prompt included; its episode, if there is one, is in the buffer.

        Args:
            request_id: vLLM's own id, as in `HiddenStates.request_ids`.
        """
        self._host.deliver(wait=True)
        self._ignored.discard(request_id)
        partial = self._partial.pop(request_id, None)
        known = list(tokens)
        if partial is None:
            return None
        rows = {at: row for at, row in partial.rows.items() if at < len(known) and row[1] == known[at]}
        if not rows:
            return None
        stop = max(rows) + 1
        version = rows[stop - 1][0]
        start = stop
        while start - 1 in rows and rows[start - 1][0] == version:
            start -= 1
        features = torch.stack([rows[at][2] for at in range(start, stop)])
        ids = torch.tensor(known[start : stop + 1], dtype=torch.int64)
        episode = Episode(request_id, ids, features, max(0, prompt_tokens - start), version)
        self.buffer.add(episode)
        return episode

    def _keep(
        self,
        version: int,
        ids: tuple[str, ...],
        counts: list[int],
        tokens: list[int],
        positions: list[int],
        states: Tensor,
    ) -> None:
        bounds = np.cumsum([0, *counts])
        for request, first, last in zip(ids, bounds[:-1], bounds[1:], strict=True):
            if request in self._ignored:
                continue
            partial = self._partial.setdefault(request, _Partial({}))
            for row in range(int(first), int(last)):
                if positions[row] not in partial.rows:
                    partial.nbytes += states[row].nbytes
                partial.rows[positions[row]] = version, tokens[row], states[row].clone()
        while sum(x.nbytes for x in self._partial.values()) > self.budget_bytes:
            shortest = min(self._partial, key=lambda request: self._partial[request].nbytes)
            del self._partial[shortest]
            self._ignored.add(shortest)
            self.given_up += 1
