"""A start for a drafter: the target's own last layer, behind a linear guess of what that layer will read.

The pair that a drafter reads, the state f of position t and the embedding e of token t + 1, says much of the residual stream
that will enter the target's last layer at position t + 1. A linear map of the pair, fitted to a few rollouts by least
squares, becomes the drafter's `fc`; its attention and MLP are those of the layer. What the layers before would add is left
to learn.

The drafter's state stands for what the target's head reads: w * h / rms(h) of a stream h, w the weight of the final norm.
With the mean of 1 / rms(h) in its place that is linear in h: the drafter's stream is d * h, d = w * mean(1 / rms(h)).
The other norms that the layer has and the drafter lacks, before attention and of queries and keys, become linear alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.adaptive.features import features_of, groups
from rollout_spec.adaptive.module import EagleModule
from rollout_spec.contracts import invalid
from rollout_spec.models.decoder import Decoder

_PRIOR_PAIRS = 10.0  # that a guess of nothing is worth
_TOKENS = 65536  # to fit to
_OFF = 1e-4  # of the largest: a channel that the final norm all but turns off


@torch.no_grad()
def start_as_last_layer(module: EagleModule, target: Decoder, sequences: Sequence[Tensor]) -> None:
    """Overwrite the weights of a drafter of kind `eagle`, on the target's device.

    Args:
        module: Of the target's sizes.
        target: Whose last layer. Biases of its linears are left out: the drafter has none.
        sequences: Token ids int64 [T] that the target has sampled, prompts included. From 131,072 tokens on
            every second sequence is used, from 196,608 on every third, and so on.

    Raises:
        InvalidRequest: The drafter is of another kind, or the sequences have fewer tokens than a pair has channels.
    """
    if module.spec.kind != "eagle":
        raise invalid("kind", module.spec.kind, "only 'eagle' can start as the target's last layer")
    seen, spec, weights = _look(target, sequences), target.spec, target.weights.layers[-1]
    d = target.weights.final_norm.float() * seen.leaving
    back = torch.where(d.abs() > _OFF * d.abs().max(), 1 / d, 0.0)

    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = weights.qkv.dense().float()[: q + 2 * kv] * (weights.input_norm.float() * seen.entering * back)
    if weights.qk_norm is not None:
        qkv[: q + kv] *= (weights.qk_norm.float() * seen.heads[:, None]).view(-1, 1)
    read = weights.post_norm.float() * back * (d.square() @ seen.shares).sqrt()
    gate, up = (weights.gate_up.dense().float()[: 2 * spec.intermediate_size] * read).chunk(2)
    made = {
        "fc": d[:, None] * seen.guess,
        "layers.0.self_attn.q_proj": qkv[:q],
        "layers.0.self_attn.k_proj": qkv[q : q + kv],
        "layers.0.self_attn.v_proj": qkv[q + kv :],
        "layers.0.self_attn.o_proj": d[:, None] * weights.o.dense().float()[:hidden],
        "layers.0.post_attention_layernorm": torch.ones_like(d),
        "layers.0.mlp.gate_proj": gate,
        "layers.0.mlp.up_proj": up,
        "layers.0.mlp.down_proj": d[:, None] * weights.down.dense().float()[:hidden],
    }
    module.load_state_dict({f"{name}.weight": weight for name, weight in made.items()})


class _Seen(NamedTuple):
    """What the target does along the sequences.

    Attributes:
        guess: Of the stream that enters the last layer, from a pair, [H, 2 H].
        entering, leaving: Mean of 1 / rms of the streams that enter and leave the last layer.
        heads: The same of its queries and keys, [Hq + Hkv].
        shares: Of the channels in the square of the entering stream, [H], 1 in all.
    """

    guess: Tensor
    entering: Tensor
    leaving: Tensor
    heads: Tensor
    shares: Tensor


def _look(target: Decoder, sequences: Sequence[Tensor]) -> _Seen:
    spec, weights, last = target.spec, target.weights, target.weights.layers[-1]
    hidden, heads = spec.hidden_size, spec.num_heads + spec.num_kv_heads
    head_weights = last.qkv.dense().float()[: heads * spec.head_dim]
    sums: list[Tensor] = []
    count = 0
    for group in groups([len(ids) for ids in sequences], _TOKENS):
        ids = [sequences[i].to(weights.embed.device) for i in group]
        streams = features_of(target, (spec.num_layers - 1, spec.num_layers), ids)
        pairs, entering, leaving = [], [], []
        for row, stream in zip(ids, streams, strict=True):
            enters, leaves = stream.float().split(hidden, 1)
            state = torch.rms_norm(leaves, (hidden,), weights.final_norm.float(), spec.rms_norm_eps)
            pairs.append(torch.cat((F.embedding(row[1:], weights.embed).float(), state[:-1]), 1))
            entering.append(enters[1:])
            leaving.append(leaves[1:])
        read, enters, leaves = torch.cat(pairs).double(), torch.cat(entering), torch.cat(leaving)
        normed = torch.rms_norm(enters, (hidden,), last.input_norm.float(), spec.rms_norm_eps)
        of_heads = F.linear(normed, head_weights).view(-1, heads, spec.head_dim)
        found = [
            read.T @ read, read.T @ enters.double(), _inverse_rms(enters).sum(), _inverse_rms(leaves).sum(),
            _inverse_rms(of_heads).sum(0), F.normalize(enters).square().sum(0),
        ]  # fmt: skip
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        count += len(read)
    if count < 2 * hidden:
        raise invalid(
            "sequences", f"{count} pairs of tokens", f"give at least {2 * hidden}, better some times as many"
        )
    squares, products, *means = sums
    squares.diagonal().add_(_PRIOR_PAIRS / count * squares.diagonal().mean())
    guess = torch.linalg.solve(squares, products).T.float()
    return _Seen(guess, *(mean / count for mean in means))


def _inverse_rms(x: Tensor) -> Tensor:
    """[...] of x [..., n]."""
    return x.square().mean(-1).rsqrt()
