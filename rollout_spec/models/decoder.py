"""The decoder's forward pass over independent rows (one row is one token at one position).

It knows nothing of sequences: a callback stores keys and values and attends. On CPUs, every row's result is
independent of the rows beside it, bit for bit, if the linears and the callback are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.decoder_layer import KernelLayer, LayersAroundAttention, LayersInOneCall
from rollout_spec.models.elementwise import gated_silu, norm, norm_rotate
from rollout_spec.models.linear import Linear
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q[R, Hq, hd], k[R, Hkv, hd], v[R, Hkv, hd]) -> [R, Hq * hd]; k is rotated, v is a strided view.

If it has an attribute `paged` that is not None, a `PagedRows`, a layer of kernels does without calling it.
"""


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

    @cached_property
    def for_kernels(self) -> KernelLayer | None:
        """The block for this project's CPU kernels, if all of it runs on them."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        linears = {name: parts[name].for_kernels() for name in ("qkv", "o", "gate_up", "down")}
        return KernelLayer(**parts | linears) if all(linears.values()) else None


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
        eps, rotated = spec.rms_norm_eps, spec.num_heads + spec.num_kv_heads
        heads = (token_ids.shape[0], rotated + spec.num_kv_heads, spec.head_dim)

        cos, signed_sin = self.rope(positions)
        x = F.embedding(token_ids, weights.embed)
        together = self._layers(x, cos, signed_sin, attend)
        for index, layer in enumerate(weights.layers):
            if tap is not None:
                tap(index, x)
            if together is not None and layer.for_kernels is not None:
                together(index, layer.for_kernels)
                continue
            qkv = layer.qkv(norm(x, layer.input_norm, eps)).view(heads)
            qk = norm_rotate(qkv, rotated, layer.qk_norm, cos, signed_sin, eps)
            x += layer.o(attend(index, qk[:, : spec.num_heads], qk[:, spec.num_heads :], qkv[:, rotated:]))
            x += layer.down(gated_silu(layer.gate_up(norm(x, layer.post_norm, eps))))
        if tap is not None:
            tap(spec.num_layers, x)
        return norm(x, weights.final_norm, eps)

    def _layers(
        self, x: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend
    ) -> LayersInOneCall | LayersAroundAttention | None:
        """What computes layers of kernels in fewer calls, on a CPU."""
        spec, paged = self.spec, getattr(attend, "paged", None)
        if not x.is_cpu or not len(x):
            return None
        if paged is not None:
            return LayersInOneCall(x, spec.num_heads, cos, signed_sin, spec.rms_norm_eps, paged)
        first = self.weights.layers[0].for_kernels
        if first is None or first.dtype != x.dtype:
            return None
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        return LayersAroundAttention(first.kernels, x, heads, cos, signed_sin, spec.rms_norm_eps, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[R, padded vocabulary] logits of hidden[R, H]; columns past the vocabulary are -inf."""
        logits = self.weights.lm_head(hidden).float()
        if logits.shape[1] > self.spec.vocab_size:
            logits[:, self.spec.vocab_size :] = -torch.inf
        return logits
