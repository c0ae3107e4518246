"""The shape of an EAGLE-style drafter: one decoder layer over the target's features, in vLLM's module layout.

`eagle` (Li et al. 2024, arXiv 2401.15077) reads the state after the target's final norm; `eagle3` (arXiv 2503.01840)
reads several residual streams. Parameter names are those of the checkpoints that vLLM's `eagle` and `eagle3` load, so
that export renames nothing. With embedding e, feature f and pair t = (e of token t + 1, f of position t) at position t:

- `eagle`: x = fc([e; f]); x += attn(x); x += mlp(post_attention_layernorm(x)). There is no input norm and no final
  norm: x is the state that the next step reads as f, and target_head(x) are the logits of token t + 2.
- `eagle3`: x = fc(f), or the state of the step before, without fc; x += attn([input_layernorm(e); hidden_norm(x)]);
  x += mlp(post_attention_layernorm(x)). x is the state that the next step reads, and head(norm(x)) are the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rollout_spec.contracts import invalid
from rollout_spec.models.spec import ModelSpec, RopeSpec

Kind = Literal["eagle", "eagle3"]
KINDS: tuple[Kind, ...] = ("eagle", "eagle3")

HEAD = "lm_head.weight"
_LAYER = "layers.0."


@dataclass(frozen=True)
class EagleSpec:
    """A one-layer drafter for a target. Norms are RMS norms, the MLP is gated SiLU, no projection has a bias.

    Attributes:
        kind: `eagle` or `eagle3`.
        vocab_size, hidden_size: Of the target, whose embedding the drafter reads.
        num_heads, num_kv_heads, head_dim, intermediate_size: Of the layer.
        rms_norm_eps: Epsilon of every norm.
        rope, max_position_embeddings: The target's; the drafter's positions are the target's.
        feature_layers: For `eagle3`, ascending: the residual stream that enters target layer i, and for i = number of
            layers the one that leaves the last, before the final norm (vLLM's `eagle_aux_hidden_state_layer_ids`).
            The last of them is that one, so that the target's distribution can be computed from the features.
            Empty for `eagle`.
        draft_vocab_size: Rows of the drafter's own head. `vocab_size`: it has none and uses the target's.
    """

    kind: Kind
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    feature_layers: tuple[int, ...]
    draft_vocab_size: int

    @classmethod
    def for_target(
        cls,
        target: ModelSpec,
        kind: Kind = "eagle3",
        *,
        feature_layers: Sequence[int] | None = None,
        draft_vocab_size: int | None = None,
    ) -> EagleSpec:
        """A drafter of the target's sizes.

        Args:
            target: The target.
            kind: `eagle` or `eagle3`.
            feature_layers: `eagle3` only; None: an early, a middle and the last stream.
            draft_vocab_size: `eagle3` only; None: the whole vocabulary.

        Raises:
            InvalidRequest: An option does not fit the kind or the target.
        """
        if kind not in KINDS:
            raise invalid("kind", kind, f"use one of {', '.join(KINDS)}")
        layers = tuple(feature_layers or ())
        size = target.vocab_size if draft_vocab_size is None else draft_vocab_size
        if kind == "eagle":
            if layers:
                raise invalid(
                    "feature_layers", layers, "kind 'eagle' reads the final state only; leave it out"
                )
            if size != target.vocab_size:
                raise invalid(
                    "draft_vocab_size", size, "kind 'eagle' has no head of its own; use kind 'eagle3'"
                )
        elif feature_layers is None:
            layers = tuple(
                sorted({min(2, target.num_layers // 2), target.num_layers // 2, target.num_layers})
            )
        if layers != tuple(sorted(set(layers))) or any(not 0 <= i <= target.num_layers for i in layers):
            raise invalid("feature_layers", layers, f"give ascending numbers within 0 .. {target.num_layers}")
        if kind == "eagle3" and layers[-1:] != (target.num_layers,):
            remedy = (
                f"end them with {target.num_layers}: training needs the last stream for the target's logits"
            )
            raise invalid("feature_layers", layers, remedy)
        if not 0 < size <= target.vocab_size:
            raise invalid("draft_vocab_size", size, f"must be within 1 .. {target.vocab_size}")
        return cls(
            kind,
            target.vocab_size,
            target.hidden_size,
            target.num_heads,
            target.num_kv_heads,
            target.head_dim,
            target.intermediate_size,
            target.rms_norm_eps,
            target.rope,
            target.max_positions,
            layers,
            size,
        )

    @property
    def feature_size(self) -> int:
        """F: numbers of the target's features per position."""
        return self.hidden_size * max(1, len(self.feature_layers))

    @property
    def own_head(self) -> bool:
        """Whether the drafter has a head over a vocabulary of its own."""
        return self.draft_vocab_size != self.vocab_size

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by checkpoint name, in checkpoint order: all that is trained, saved and exported.

        A drafter with a head of its own is saved with `d2t` int64 [draft_vocab_size] beside them, target token minus
        draft token, and exported with `t2d` bool [vocab_size] as well, which target tokens can be drafted.
        """
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        eagle3 = self.kind == "eagle3"
        read = 2 * h if eagle3 else h
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (h, self.feature_size if eagle3 else 2 * h)}
        if eagle3:
            shapes |= {_LAYER + "input_layernorm.weight": (h,), _LAYER + "hidden_norm.weight": (h,)}
        shapes |= {
            _LAYER + "self_attn.q_proj.weight": (q, read),
            _LAYER + "self_attn.k_proj.weight": (kv, read),
            _LAYER + "self_attn.v_proj.weight": (kv, read),
            _LAYER + "self_attn.o_proj.weight": (h, q),
            _LAYER + "post_attention_layernorm.weight": (h,),
            _LAYER + "mlp.gate_proj.weight": (m, h),
            _LAYER + "mlp.up_proj.weight": (m, h),
            _LAYER + "mlp.down_proj.weight": (h, m),
        }
        if eagle3:
            shapes["norm.weight"] = (h,)
        if self.own_head:
            shapes[HEAD] = (self.draft_vocab_size, h)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"feature_layers": list(self.feature_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EagleSpec:
        """From `to_dict`."""
        known = {"rope": RopeSpec(**values["rope"]), "feature_layers": tuple(values["feature_layers"])}
        return cls(**{**values, **known})
