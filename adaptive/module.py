"""The drafter as a torch module, for training: `EagleSpec.parameter_shapes` and nothing of the target's.

Drafting feeds the drafter its own states. Training unrolls that for many rounds at once (the training-time test of
EAGLE-3, arXiv 2503.01840): step 0 reads the target's features, at every position. A round that begins at position t reads,
in step j, the state that it left in step j - 1, at position t + j, and attends to step 0 up to t, to its own steps 1 to
j - 1, and to itself: exactly what a drafter sees that has read the target's features up to t and has drafted j tokens
since. Rounds need not begin everywhere: those left out save all but step 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollout_spec.adaptive.packing import Batch
from rollout_spec.contracts import invalid
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.rope import inverse_frequencies, rotate


@dataclass(frozen=True, eq=False)
class TargetTensors:
    """What training reads of the target and never writes: embed [V, H], lm_head [V, H], final_norm [H], its epsilon."""

    embed: Tensor
    lm_head: Tensor
    final_norm: Tensor
    rms_norm_eps: float

    @classmethod
    def of(cls, target: Decoder) -> TargetTensors:
        """Those of a decoder; its embedding and norm are referenced, a packed head is unpacked into new memory."""
        weights = target.weights
        head = weights.lm_head.dense()[: target.spec.vocab_size]  # type: ignore[attr-defined]
        head = head.clone() if head.is_inference() else head  # autograd refuses inference tensors
        return cls(weights.embed, head, weights.final_norm, target.spec.rms_norm_eps)

    def logits(self, spec: EagleSpec, features: Tensor) -> Tensor:
        """float32 [..., V]: the target's own logits at positions whose features [..., F] were recorded."""
        state = features[..., -spec.hidden_size :]
        if spec.kind == "eagle3":
            state = torch.rms_norm(
                state.float(), self.final_norm.shape, self.final_norm.float(), self.rms_norm_eps
            )
        return self.head(state)

    def head(self, state: Tensor) -> Tensor:
        """float32 [..., V] of states [..., H]."""
        return F.linear(state.to(self.lm_head.dtype), self.lm_head).float()


class _Attention(nn.Module):
    def __init__(self, spec: EagleSpec, read: int) -> None:
        super().__init__()
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj, self.k_proj = nn.Linear(read, q, bias=False), nn.Linear(read, kv, bias=False)
        self.v_proj, self.o_proj = (
            nn.Linear(read, kv, bias=False),
            nn.Linear(q, spec.hidden_size, bias=False),
        )


class _Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(hidden, inner, bias=False),
            nn.Linear(hidden, inner, bias=False),
        )
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class _Layer(nn.Module):
    def __init__(self, spec: EagleSpec) -> None:
        super().__init__()
        size, eps, eagle3 = spec.hidden_size, spec.rms_norm_eps, spec.kind == "eagle3"
        self.input_layernorm = nn.RMSNorm(size, eps) if eagle3 else None
        self.hidden_norm = nn.RMSNorm(size, eps) if eagle3 else None
        self.self_attn = _Attention(spec, 2 * size if eagle3 else size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = _Mlp(size, spec.intermediate_size)


class EagleModule(nn.Module):
    """A one-layer drafter in float32. Its state dict has the checkpoint's names.

    Args:
        spec: Its shape.
        draft_tokens: int64 [draft_vocab_size], ascending: the target tokens it can draft; None without an own head.
        seed: Of the initial weights.

    Attributes:
        draft_tokens: As given, or None.
    """

    def __init__(self, spec: EagleSpec, draft_tokens: Tensor | None = None, *, seed: int = 0) -> None:
        super().__init__()
        if spec.own_head == (draft_tokens is None):
            given = None if draft_tokens is None else len(draft_tokens)
            raise invalid("draft_tokens", given, f"must name {spec.draft_vocab_size} tokens, or none for all")
        self.spec = spec
        self.fc = nn.Linear(
            spec.feature_size if spec.kind == "eagle3" else 2 * spec.hidden_size, spec.hidden_size, bias=False
        )
        self.layers = nn.ModuleList([_Layer(spec)])
        self.norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps) if spec.kind == "eagle3" else None
        self.lm_head: nn.Linear | None = None
        if draft_tokens is not None:
            self.lm_head = nn.Linear(spec.hidden_size, spec.draft_vocab_size, bias=False)
            self.register_buffer("d2t", draft_tokens - torch.arange(spec.draft_vocab_size))
        frequencies, scale = inverse_frequencies(spec.rope, spec.head_dim)
        self._rope_scale = scale
        self.register_buffer("_frequencies", frequencies, persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @property
    def draft_tokens(self) -> Tensor | None:
        d2t: Tensor | None = getattr(self, "d2t", None)
        return None if d2t is None else d2t + torch.arange(len(d2t), device=d2t.device)

    def head_from(self, target: TargetTensors) -> None:
        """Start the head of its own, if it has one, from the target's rows."""
        if self.lm_head is not None:
            with torch.no_grad():
                self.lm_head.weight.copy_(target.lm_head[self.draft_tokens])

    def unroll(
        self, target: TargetTensors, batch: Batch, steps: int, begin: Tensor | None = None
    ) -> Iterator[Tensor]:
        """States [B, L, H] of `steps` steps, see the module's text; those of step j count where `batch.drafts(j, begin)`.

        Args:
            target: What it lends.
            batch: B rows of L pairs.
            steps: K.
            begin: bool [B, L]: where rounds begin; None: wherever they can.
        """
        size = self.fc.weight.dtype
        embedded = F.embedding(batch.tokens, target.embed).to(size)
        cos, sin = self._rotation(batch.positions)
        attention = _UnrolledAttention(batch.segments)
        states = self._layer(embedded, batch.features.to(size), (cos, sin), attention, own=False)
        yield states
        if steps == 1:
            return
        length = batch.tokens.shape[1]
        starts = _places(batch.drafts(0, begin))
        attention.begin(starts)
        chain = _take(states, starts.clamp(max=length - 1))
        for step in range(1, steps):
            at = (starts + step).clamp(max=length)
            inside = at.clamp(max=length - 1)
            rotation = _take(cos[:, 0], inside)[:, None], _take(sin[:, 0], inside)[:, None]
            chain = self._layer(_take(embedded, inside), chain, rotation, attention, own=True)
            spread = chain.new_zeros(
                len(at), length + 1, chain.shape[2]
            )  # the last column takes what is outside
            yield spread.scatter(1, at[..., None].expand_as(chain), chain)[:, :length]

    def logits(self, target: TargetTensors, states: Tensor) -> Tensor:
        """float32 [..., draft_vocab_size] of states [..., H]."""
        x = states if self.norm is None else self.norm(states)
        return target.head(x) if self.lm_head is None else self.lm_head(x).float()

    def _layer(
        self,
        embedded: Tensor,
        features: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: _UnrolledAttention,
        *,
        own: bool,
    ) -> Tensor:
        spec, layer = self.spec, self.layers[0]
        if spec.kind == "eagle":
            x = read = self.fc(torch.cat((embedded, features), -1)).to(features.dtype)  # under autocast, too
        else:
            x = features if own else self.fc(features).to(features.dtype)
            read = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(x)), -1)  # type: ignore[operator]
        weights: _Attention = layer.self_attn  # type: ignore[assignment]
        rows, length, _ = read.shape

        def heads(linear: nn.Linear, count: int) -> Tensor:
            return linear(read).view(rows, length, count, spec.head_dim).transpose(1, 2)

        q = rotate(heads(weights.q_proj, spec.num_heads), *rotation)
        k = rotate(heads(weights.k_proj, spec.num_kv_heads), *rotation)
        found = attention(q, k, heads(weights.v_proj, spec.num_kv_heads))
        x = x + weights.o_proj(found.transpose(1, 2).reshape(rows, length, -1))
        mlp: _Mlp = layer.mlp  # type: ignore[assignment]
        y = layer.post_attention_layernorm(x)  # type: ignore[operator]
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors for `rotate`, [B, 1, L, head_dim]."""
        angles = positions[:, None, :, None] * self.get_buffer("_frequencies")
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5, generator=generator)


class _UnrolledAttention:
    """Attention of one unrolled batch; call it once per step. `segments` int64 [B, L]: rows see their own only."""

    def __init__(self, segments: Tensor) -> None:
        at = torch.arange(segments.shape[1], device=segments.device)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        self._visible = same & (at[:, None] >= at)
        self._steps: list[tuple[Tensor, Tensor]] = []

    def begin(self, starts: Tensor) -> None:
        """Steps from now on are of the rounds that begin at `starts` int64 [B, S], L where there is none."""
        length = self._visible.shape[2]
        index = starts.clamp(max=length - 1)[:, None, :, None].expand(-1, 1, -1, length)
        self._visible = self._visible.gather(2, index)[:, :, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, L, hd] in step 0, [B, Hq, S, hd] later, of this step's q, k and v [B, Hkv, L or S, hd]."""
        self._steps.append((k, v))
        if len(self._steps) == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self._visible, enable_gqa=True)
        (k0, v0), *own = self._steps
        rows, kv_heads, count, size = k.shape
        length = k0.shape[2]
        grouped = (q * size**-0.5).view(rows, kv_heads, -1, count, size)
        scores = grouped @ k0[:, :, None].transpose(-1, -2)
        scores = scores.masked_fill(~self._visible, -torch.inf)
        mine = [(grouped * key[:, :, None]).sum(-1, keepdim=True) for key, _ in own]
        shares = torch.cat((scores, *mine), -1).softmax(-1)
        found = shares[..., :length] @ v0[:, :, None]
        for i, (_, value) in enumerate(own):
            found = found + shares[..., length + i, None] * value[:, :, None]
        return found.view(q.shape)


def _places(where: Tensor) -> Tensor:
    """int64 [B, S]: in each row the columns at which `where` bool [B, L] holds, ascending, then L."""
    length = where.shape[1]
    count = max(1, int(where.sum(1).max()))
    columns = torch.arange(length, device=where.device).expand(where.shape)
    return columns.masked_fill(~where, length).sort(1).values[:, :count]


def _take(x: Tensor, at: Tensor) -> Tensor:
    """[B, S, n] of x [B, L, n] at columns int64 [B, S]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
