"""The decoder's forward pass over independent rows (one row is one token at one position).

It knows nothing of sequences: a callback stores keys and values and attends. On CPUs, every row's result is
independent of the rows beside it, bit for bit, if the linears and the callback are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.models.linear import Linear
from rollout_spec.models.rope import RotaryTable, rotate
from rollout_spec.models.spec import ModelSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q[R, Hq, hd], k[R, Hkv, hd], v[R, Hkv, hd]) -> [R, Hq * hd]; k is rotated, v is a strided view."""


@dataclass(frozen=True)
class LayerWeights:
    """One block. Norm weights are [H]; `qk_norm` is [Hq + Hkv, hd], the query norm's row repeated, then the key's."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model. Another instance may share any tensor or linear with this one (a drafter's does).

    Attributes:
        embed: Token embedding [V, H].
        layers: The blocks.
        final_norm: [H].
        lm_head: [R, H] to [R, padded vocabulary].
    """

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Linear


class Decoder:
    """A model: spec, weights and rotary table. Assign `weights` to switch to another policy version at once."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, rope: RotaryTable) -> None:
        self.spec, self.weights, self.rope = spec, weights, rope

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        tap: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [R, H], of token_ids int64[R] at positions int64[R].

        Run it under `torch.inference_mode()`; `attend` is called once per layer, in order. `tap` is shown the residual
        stream [R, H] that enters each layer, by layer index (`num_layers`: that leaves the last), and must copy it.
        """
        spec, weights = self.spec, self.weights
        size, eps = (spec.hidden_size,), spec.rms_norm_eps
        head_size, rotated = (spec.head_dim,), spec.num_heads + spec.num_kv_heads
        heads = (token_ids.shape[0], rotated + spec.num_kv_heads, spec.head_dim)

        cos, signed_sin = self.rope(positions)
        x = F.embedding(token_ids, weights.embed)
        for index, layer in enumerate(weights.layers):
            if tap is not None:
                tap(index, x)
            # The weight is applied outside `rms_norm`: transformers' rounding in bf16, and no slower.
            qkv = layer.qkv(torch.rms_norm(x, size, None, eps).mul_(layer.input_norm)).view(heads)
            qk = qkv[:, :rotated]
            if layer.qk_norm is not None:
                qk = torch.rms_norm(qk, head_size, None, eps).mul_(layer.qk_norm)
            qk = rotate(qk, cos, signed_sin)
            x += layer.o(attend(index, qk[:, : spec.num_heads], qk[:, spec.num_heads :], qkv[:, rotated:]))
            x += layer.down(
                _gated_silu(layer.gate_up(torch.rms_norm(x, size, None, eps).mul_(layer.post_norm)))
            )
        if tap is not None:
            tap(spec.num_layers, x)
        return torch.rms_norm(x, size, None, eps).mul_(weights.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[R, padded vocabulary] logits of hidden[R, H]; columns past the vocabulary are -inf."""
        logits = self.weights.lm_head(hidden).float()
        if logits.shape[1] > self.spec.vocab_size:
            logits[:, self.spec.vocab_size :] = -torch.inf
        return logits


_GRAIN = 32768  # at::internal::GRAIN_SIZE: elements an elementwise CPU kernel leaves to one thread


def _gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up[R, 2F], gate first; [R, F] contiguous."""
    gate, up = gate_up.chunk(2, dim=1)
    rows, width = gate.shape
    if rows * width <= _GRAIN or not gate.is_cpu or torch.get_num_threads() == 1:
        return F.silu(gate).mul_(up)
    # torch cuts the elements into equal ranges, one per thread, and computes the end of a range with scalar code,
    # whose exp differs in the last bit. Runs of rows that split evenly keep each row's cut points fixed.
    activated = torch.empty((rows, width), dtype=gate.dtype)
    start = 0
    while start < rows:
        stop = start + _even_run(rows - start, width, torch.get_num_threads())
        torch.ops.aten.silu.out(gate[start:stop], out=activated[start:stop])
        start = stop
    return activated.mul_(up)


def _even_run(rows: int, width: int, threads: int) -> int:
    """The most rows, at most `rows`, that torch's threads share in whole rows."""
    run = rows
    while run > 1 and run % min(threads, -(-run * width // _GRAIN)):
        run -= 1
    return run
