"""The target's features along finished sequences, in passes over many of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import Completion
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.models.decoder import Decoder

_PASS_TOKENS = 8192  # padding included, in one forward of the target


def episodes_of(target: Decoder, spec: EagleSpec, completions: Sequence[Completion]) -> list[Episode]:
    """Episodes of finished samples, in their order, with features that `target` computes anew, all but the last token's."""
    sequences = [c.prompt_token_ids + c.token_ids for c in completions]
    found: dict[int, Episode] = {}
    for group in groups([len(sequence) for sequence in sequences]):
        tokens = [torch.tensor(sequences[i]) for i in group]
        for i, features, ids in zip(group, features_of(target, spec.feature_layers, tokens), tokens):
            c = completions[i]
            name, version = f"{c.request_id}/{c.index}", c.version_spans[-1].version
            found[i] = Episode(name, ids, features[:-1].clone(), len(c.prompt_token_ids), version)
    return [found[i] for i in range(len(sequences))]


@torch.no_grad()
def features_of(target: Decoder, layers: Sequence[int], sequences: Sequence[Tensor]) -> list[Tensor]:
    """The target's features [T, F] along each of `sequences` int64 [T], in one plain forward pass over all of them.

    `layers` is as `EagleSpec.feature_layers`.
    """
    device = target.weights.embed.device
    length = max(len(sequence) for sequence in sequences)
    ids = torch.stack([F.pad(sequence, (0, length - len(sequence))) for sequence in sequences]).to(device)
    rows = ids.numel()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, ids.shape).transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).reshape(rows, -1)

    positions = torch.arange(length, device=device).expand(ids.shape).flatten()
    streams: dict[int, Tensor] = {}

    def keep(layer: int, stream: Tensor) -> None:
        streams[layer] = stream.clone()

    taps = {layer: partial(keep, layer) for layer in layers}
    hidden = target.hidden(ids.flatten(), positions, attend, taps)
    features = torch.cat([streams[layer] for layer in layers], 1) if streams else hidden
    return [row[: len(sequence)] for row, sequence in zip(features.unflatten(0, ids.shape), sequences)]


def groups(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """Places of sequences of `lengths`, shortest first, in groups that fit a pass when padded to their longest.

    Of sequences with n times `most` tokens, n rounded down, every n-th is in them.
    """
    share = 1 if most is None else max(1, sum(lengths) // most)
    group: list[int] = []
    for i in sorted(range(0, len(lengths), share), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > _PASS_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
