"""Episodes laid side by side in rows, so that a batch of very different lengths computes few padded positions.

Pair t of an episode of T tokens is (embedding of token t + 1, feature of position t), at position t; it predicts token
t + 2, which the target drew from the distribution that the feature of position t + 1 determines. Pairs 0 .. T - 3 have
all of these. Segments keep episodes of one row apart, and positions are those within the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import invalid


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs in B rows of L; all tensors are its own.

    Attributes:
        tokens: int64 [B, L]: token t + 1.
        features: [B, L, F]: of position t.
        next_tokens: int64 [B, L]: token t + 2, which the drafter is to predict.
        next_features: [B, L, F]: of position t + 1: what the target predicted that from.
        positions: int64 [B, L]: t.
        segments: int64 [B, L]: equal where pairs are of the same episode; -1 is padding.
        first: int64 [B, L]: the episode's first pair that predicts a token of the response.
        weights: float32 [B, L]: of the pair's prediction in the loss; 0 for prompts and padding.
    """

    tokens: Tensor
    features: Tensor
    next_tokens: Tensor
    next_features: Tensor
    positions: Tensor
    segments: Tensor
    first: Tensor
    weights: Tensor

    def drafts(self, step: int, begin: Tensor | None = None) -> Tensor:
        """bool [B, L]: where step `step` of a round drafts a response's token, its round having begun in it, too.

        Args:
            step: From 0.
            begin: bool [B, L]: where rounds begin; None: everywhere.
        """
        drafted = (self.weights > 0) & (self.positions - step >= self.first)
        if begin is None:
            return drafted
        return drafted & torch.nn.functional.pad(begin, (step, 0))[:, : begin.shape[1]]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack(episodes: Sequence[Episode], row_tokens: int, *, replay: float = 0.0) -> Batch:
    """Lay episodes out in as few rows as a first fit, longest first, finds.

    Args:
        episodes: Of three tokens and more; shorter ones have nothing to learn from and are left out.
        row_tokens: Longest row, L at most; a longer episode is cut, and each part sees itself only.
        replay: What a prediction that verification rejected counts for in the loss, beyond 1.

    Raises:
        InvalidRequest: Nothing is left, or an episode has too few features.
    """
    parts = [
        (episode, start, min(start + row_tokens, len(episode.tokens) - 2))
        for episode in episodes
        for start in range(0, len(episode.tokens) - 2, row_tokens)
    ]
    if not parts:
        raise invalid("episodes", len(episodes), "none has three tokens or more; give longer ones")
    for episode in episodes:
        if len(episode.features) < len(episode.tokens) - 1:
            have = f"{len(episode.features)} for {len(episode.tokens)} tokens"
            raise invalid(f"features of {episode.request_id}", have, "all but the last token need some")
    parts.sort(key=lambda part: part[1] - part[2])
    rows: list[list[tuple[Episode, int, int]]] = []
    room: list[int] = []
    length = parts[0][2] - parts[0][1]
    for part in parts:
        size = part[2] - part[1]
        row = next((i for i, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(part)
        room[row] -= size
    return _laid_out(rows, length, replay)


def _laid_out(rows: list[list[tuple[Episode, int, int]]], length: int, replay: float) -> Batch:
    shape = (len(rows), length)
    example = rows[0][0][0]
    width, dtype, device = example.features.shape[1], example.features.dtype, example.features.device

    def integers(value: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=device)

    tokens, following, positions, segments, first = (integers(value) for value in (0, 0, 0, -1, 0))
    features, next_features = (torch.zeros(*shape, width, dtype=dtype, device=device) for _ in range(2))
    weights = torch.zeros(shape, device=device)
    segment = 0
    for row, parts in enumerate(rows):
        end = 0
        for episode, start, stop in parts:
            begin, end = end, end + stop - start
            place = (row, slice(begin, end))
            tokens[place] = episode.tokens[start + 1 : stop + 1]
            following[place] = episode.tokens[start + 2 : stop + 2]
            features[place] = episode.features[start:stop]
            next_features[place] = episode.features[start + 1 : stop + 1]
            positions[place] = torch.arange(start, stop, device=device)
            segments[place], segment = segment, segment + 1
            opening = max(0, episode.prompt_tokens - 2)
            first[place] = max(start, opening)
            counts = torch.ones(stop - start, device=device)
            counts[: max(0, opening - start)] = 0.0
            fell = episode.rejected.to(device) - 2 - start
            counts[fell[(fell >= 0) & (fell < stop - start)]] *= 1.0 + replay
            weights[place] = counts
    return Batch(tokens, features, following, next_features, positions, segments, first, weights)


class EpisodeBatches:
    """Endless batches of about `batch_tokens` tokens from a fixed set of episodes, in an order drawn anew every epoch.

    Its state is the order and the place in it, so that a resumed run sees the batches it would have seen.
    """

    def __init__(self, episodes: Sequence[Episode], batch_tokens: int, *, seed: int = 0) -> None:
        if not episodes:
            raise invalid("episodes", 0, "give at least one")
        self._episodes, self._budget = episodes, batch_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []
        self.epoch = 0

    def __next__(self) -> list[Episode]:
        batch: list[Episode] = []
        total = 0
        while total < self._budget:
            if not self._order:
                self._order = torch.randperm(len(self._episodes), generator=self._generator).tolist()
                self.epoch += 1
            batch.append(self._episodes[self._order.pop()])
            total += len(batch[-1].tokens)
        return batch

    def __iter__(self) -> EpisodeBatches:
        return self

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        rng = bytes(self._generator.get_state().tolist()).hex()
        return {"order": list(self._order), "epoch": self.epoch, "rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self.epoch = list(state["order"]), state["epoch"]
        self._generator.set_state(torch.tensor(list(bytes.fromhex(state["rng"])), dtype=torch.uint8))
