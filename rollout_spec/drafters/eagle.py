"""A trained EAGLE-style drafter: one decoder layer over the target's features (formulas: `eagle_spec`).

The target lends its embedding and, unless the drafter has a head of its own, its lm_head; both are read only, and
read anew in every step, so that they are always those of the policy in force.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.contracts import WeightError, invalid
from rollout_spec.drafters.base import DraftRound, Proposal, draft
from rollout_spec.drafters.eagle_spec import HEAD, EagleSpec
from rollout_spec.drafters.quantizers.base import QuantizedLinear, Quantizer
from rollout_spec.kernels.decoder_layer import KernelLayer, KernelLayers, LayersInOneCall
from rollout_spec.models.decoder import Attend, Decoder
from rollout_spec.models.elementwise import gated_silu, norm, norm_rotate
from rollout_spec.models.linear import Linear, make_linear
from rollout_spec.models.weights import Piece

NAME = "adaptive"
_TABLES = ("d2t", "t2d")
_ACCEPTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = "layers.0."


@dataclass(frozen=True)
class _Weights:
    """The layer; `input_norm`, `hidden_norm` and `norm` are None for kind `eagle`, `head` is None without an own one.

    The dtype of the norms is that of the pass.
    """

    fc: Linear
    input_norm: Tensor | None
    hidden_norm: Tensor | None
    qkv: Linear
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    norm: Tensor | None
    head: Linear | None

    @cached_property
    def for_kernels(self) -> KernelLayers | None:
        """The layer for this project's CPU kernels, if all of it runs on them."""
        linears = [x.for_kernels() for x in (self.qkv, self.o, self.gate_up, self.down)]
        found = [x for x in linears if x is not None]
        if len(found) < len(linears):
            return None
        return KernelLayers([KernelLayer(None, None, self.post_norm, *found)])


class EagleModel:
    """The forward pass over independent rows, a `FeatureModel`."""

    def __init__(self, spec: EagleSpec, weights: _Weights, target: Decoder) -> None:
        self.spec, self.weights, self._target = spec, weights, target

    def hidden(
        self, tokens: Tensor, positions: Tensor, features: Tensor, attend: Attend, *, own: bool
    ) -> Tensor:
        """States [R, H]: what the next step reads as its features."""
        spec, w = self.spec, self.weights
        embedded = F.embedding(tokens, self._target.weights.embed)
        if w.input_norm is None:
            x = w.fc(torch.cat((embedded, features), 1))
            read = x
        else:
            x = features.clone() if own else w.fc(features)
            read = torch.cat((self._norm(embedded, w.input_norm), self._norm(x, w.hidden_norm)), 1)
        eps, heads, rotated = spec.rms_norm_eps, spec.num_heads, spec.num_heads + spec.num_kv_heads
        cos, signed_sin = self._target.rope(positions)
        paged, block = getattr(attend, "paged", None), w.for_kernels if x.is_cpu else None
        if paged is not None and block is not None and block.dtype == x.dtype:
            LayersInOneCall(block, x, heads, cos, signed_sin, eps, paged, read)(0, 1)
            return x
        qkv = w.qkv(read).view(len(tokens), rotated + spec.num_kv_heads, spec.head_dim)
        qk = norm_rotate(qkv, rotated, None, cos, signed_sin, eps)
        x += w.o(attend(0, qk[:, :heads], qk[:, heads:], qkv[:, rotated:]))
        x += w.down(gated_silu(w.gate_up(norm(x, w.post_norm, eps))))
        return x

    def prediction(self, states: Tensor) -> Tensor:
        """What the head reads [R, H]."""
        return states if self.weights.norm is None else self._norm(states, self.weights.norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return norm(x, weight, self.spec.rms_norm_eps)


class EagleDrafter:
    """One version of a trained drafter; a new version is a new object.

    Args:
        spec: Its shape.
        target: Whose features it reads.
        weights: All of its tensors, by `EagleSpec.parameter_shapes`, and `d2t` (and `t2d`) with an own head; copied.
        version: Its own stamp, larger than `after`.
        after: That of the drafter it replaces.
        quantizer: What its linears and its head are quantized with; None leaves them as they are.

    Attributes:
        model: Its forward pass.

    Raises:
        InvalidRequest: The drafter is not for this target.
        WeightError: A tensor is unknown, repeated, missing, or of the wrong shape or dtype, or the version is not new.
    """

    name = NAME

    def __init__(
        self,
        spec: EagleSpec,
        target: Decoder,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        *,
        after: int = -1,
        quantizer: Quantizer | None = None,
    ) -> None:
        if isinstance(version, bool) or not isinstance(version, int) or version <= after:
            raise WeightError(
                f"version={version!r}: use an integer larger than the drafter's in force, {after}"
            )
        _check_target(spec, target)
        self.spec, self.version, self._target, self._quantizer = spec, version, target, quantizer
        embed = target.weights.embed
        tensors = _received(spec, weights, embed)
        self._ids = None
        if spec.own_head:
            self._ids = torch.arange(spec.draft_vocab_size, device=embed.device) + tensors["d2t"]
        self.model = EagleModel(spec, self._assembled(tensors), target)
        self._lent_head: Linear | QuantizedLinear | None = None
        self._lend_head()

    def logits(self, states: Tensor) -> Tensor:
        """float32 [R, padded vocabulary of the target] after states [R, H]; -inf for tokens it cannot draft."""
        x, own = self.model.prediction(states), self.model.weights.head
        if own is None and self._lent_head is None:
            return self._target.logits(x)
        vocab, padded = self._target.spec.vocab_size, self._target.spec.padded_vocab_size
        if own is None:
            assert self._lent_head is not None
            logits = self._lent_head(x).float()
            logits[:, vocab:] = -torch.inf
            return logits
        assert self._ids is not None
        logits = torch.full((len(x), padded), -torch.inf, device=x.device)
        return logits.index_copy_(1, self._ids, own(x).float())

    def propose(self, round: DraftRound) -> Proposal:
        follow = round.follow
        assert follow is not None, "no features are kept"
        states: Tensor | None = None

        def forward(tokens: Tensor | None, step: int) -> Tensor:
            nonlocal states
            states = follow(self.model, tokens, states, step)
            return self.logits(states)[:, None]

        return draft(round, forward)

    def stage(self, piece: Piece) -> None:
        """Nothing: it is not made from the policy."""

    def commit(self, target: Decoder, version: int) -> None:
        """The target has new weights; a quantized copy of its head is made anew. The drafter's version stays."""
        self._lend_head()

    def rollback(self) -> None:
        """Nothing was staged."""

    def discard(self) -> None:
        """What the target lends is gone until the next `commit`; the drafter keeps its own weights."""
        self._lent_head = None

    def _lend_head(self) -> None:
        if self._quantizer is not None and not self.spec.own_head:
            self._lent_head = self._quantizer.quantize(self._target.weights.lm_head.dense())  # type: ignore[attr-defined]

    def _assembled(self, tensors: dict[str, Tensor]) -> _Weights:
        def linear(*names: str) -> Linear:
            weight = torch.cat([tensors[_LAYER + name + ".weight"] for name in names])
            return self._linear(weight)

        def layer_norm(name: str) -> Tensor | None:
            return tensors.get(_LAYER + name + ".weight")

        return _Weights(
            fc=self._linear(tensors["fc.weight"]),
            input_norm=layer_norm("input_layernorm"),
            hidden_norm=layer_norm("hidden_norm"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=linear("self_attn.o_proj"),
            post_norm=tensors[_LAYER + "post_attention_layernorm.weight"],
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
            norm=tensors.get("norm.weight"),
            head=self._linear(tensors[HEAD]) if self.spec.own_head else None,
        )

    def _linear(self, weight: Tensor) -> Linear:
        if self._quantizer is None:
            return make_linear(weight, device=weight.device)
        return self._quantizer.quantize(weight)  # type: ignore[return-value]


def _check_target(spec: EagleSpec, target: Decoder) -> None:
    own = target.spec
    for name in ("vocab_size", "hidden_size", "head_dim", "rope"):
        if getattr(spec, name) != getattr(own, name):
            raise invalid(
                f"spec.{name}",
                getattr(spec, name),
                f"the policy has {getattr(own, name)}; use EagleSpec.for_target",
            )
    if spec.feature_layers and spec.feature_layers[-1] > own.num_layers:
        raise invalid("spec.feature_layers", spec.feature_layers, f"the policy has {own.num_layers} layers")


def _received(spec: EagleSpec, weights: Iterable[tuple[str, Tensor]], like: Tensor) -> dict[str, Tensor]:
    """The tensors by name, copied to the device (and, tables aside, the dtype) of `like`."""
    shapes = spec.parameter_shapes()
    if spec.own_head:
        shapes |= {"d2t": (spec.draft_vocab_size,), "t2d": (spec.vocab_size,)}
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name not in shapes:
            raise WeightError(f"{name}: not a tensor of this {spec.kind} drafter; it has {', '.join(shapes)}")
        if name in found:
            raise WeightError(f"{name}: received twice; send every tensor once")
        if tuple(tensor.shape) != shapes[name]:
            raise WeightError(f"{name}: shape {tuple(tensor.shape)}, but the spec asks for {shapes[name]}")
        if name not in _TABLES and tensor.dtype not in _ACCEPTED_DTYPES:
            raise WeightError(f"{name}: dtype {tensor.dtype}; send float32, bfloat16 or float16")
        dtype = tensor.dtype if name in _TABLES else like.dtype
        found[name] = tensor.detach().to(device=like.device, dtype=dtype, copy=True)
    missing = [name for name in shapes if name not in found and name != "t2d"]
    if missing:
        raise WeightError(
            f"{len(missing)} tensors are missing, among them {', '.join(missing[:4])}; send all of them"
        )
    if spec.own_head:
        ids = torch.arange(spec.draft_vocab_size, device=like.device) + found["d2t"]
        distinct = len(ids.unique()) == len(ids)
        if not (distinct and int(ids.min()) >= 0 and int(ids.max()) < spec.vocab_size):
            raise WeightError(f"d2t: must map draft tokens to distinct target tokens below {spec.vocab_size}")
        if "t2d" in found and not (found["t2d"][ids].all() and int(found["t2d"].sum()) == len(ids)):
            raise WeightError(
                "t2d: does not mark the target tokens that d2t maps to; send both from one checkpoint"
            )
    return found
