"""The decoder's forward pass over independent rows (one row is one token at one position).

It knows nothing of sequences: a callback stores keys and values and attends. On CPUs, every row's result is
independent of the rows beside it, bit for bit, if the linears and the callback are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.kernels.decoder_layer import (
    KernelLayer,
    KernelLayers,
    LayersAroundAttention,
    LayersInOneCall,
)
from rollout_spec.models.elementwise import gated_silu, norm, norm_rotate
from rollout_spec.models.linear import Linear
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q[R, Hq, hd], k[R, Hkv, hd], v[R, Hkv, hd]) -> [R, Hq * hd]; k is rotated, v is a strided view.

If it has an attribute `paged` that is not None, a `PagedRows`, layers of kernels do without calling it.
"""

_NO_TAPS: Mapping[int, Callable[[Tensor], object]] = MappingProxyType({})


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

    @cached_property
    def for_kernels(self) -> KernelLayers | None:
        """The blocks for this project's CPU kernels, if all of them run on these."""
        layers = [layer.for_kernels() for layer in self.layers]
        found = [layer for layer in layers if layer is not None]
        return KernelLayers(found) if found and len(found) == len(layers) else None


class Decoder:
    """A model: spec, weights and rotary table. Assign `weights` to switch to another policy version at once."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, rope: RotaryTable) -> None:
        self.spec, self.weights, self.rope = spec, weights, rope

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        taps: Mapping[int, Callable[[Tensor], object]] = _NO_TAPS,
    ) -> Tensor:
        """Hidden states after the final norm, [R, H], of token_ids int64[R] at positions int64[R].

        Run it under `torch.inference_mode()`; `attend` is called once per layer, in order. `taps[layer]` is shown the
        residual stream [R, H] that enters the layer (`num_layers`: that leaves the last), and must copy it.
        """
        x = F.embedding(token_ids, self.weights.embed)
        run = self._layers(x, *self.rope(positions), attend)
        done = 0
        for layer in sorted({*taps, self.spec.num_layers}):
            run(done, layer)
            if layer in taps:
                taps[layer](x)
            done = layer
        return norm(x, self.weights.final_norm, self.spec.rms_norm_eps)

    def _layers(
        self, x: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend
    ) -> Callable[[int, int], None]:
        """What computes the layers from one up to another, in place of x: kernels in few calls, where they can."""
        spec, paged = self.spec, getattr(attend, "paged", None)
        own = self.weights.for_kernels if x.is_cpu and len(x) else None
        if own is None or own.dtype != x.dtype:
            return partial(self._one_by_one, x, cos, signed_sin, attend)
        if paged is not None:
            return LayersInOneCall(own, x, spec.num_heads, cos, signed_sin, spec.rms_norm_eps, paged)
        heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
        return LayersAroundAttention(own, x, heads, cos, signed_sin, spec.rms_norm_eps, attend)

    def _one_by_one(
        self, x: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend, start: int, stop: int
    ) -> None:
        spec = self.spec
        eps, rotated = spec.rms_norm_eps, spec.num_heads + spec.num_kv_heads
        heads = (len(x), rotated + spec.num_kv_heads, spec.head_dim)
        for index in range(start, stop):
            layer = self.weights.layers[index]
            qkv = layer.qkv(norm(x, layer.input_norm, eps)).view(heads)
            qk = norm_rotate(qkv, rotated, layer.qk_norm, cos, signed_sin, eps)
            x += layer.o(attend(index, qk[:, : spec.num_heads], qk[:, spec.num_heads :], qkv[:, rotated:]))
            x += layer.down(gated_silu(layer.gate_up(norm(x, layer.post_norm, eps))))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32[R, padded vocabulary] logits of hidden[R, H]; columns past the vocabulary are -inf."""
        logits = self.weights.lm_head(hidden).float()
        if logits.shape[1] > self.spec.vocab_size:
            logits[:, self.spec.vocab_size :] = -torch.inf
        return logits
