"""What the backend needs to know about a model, read from a Hugging Face config.

`ModelSpec.from_hf_config` either returns a complete description or refuses: a field that would change the
computation and that the decoder does not implement is never skipped over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rollout_spec.contracts import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_SUPPORTED = "dense LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Fields that other families (or forks under a familiar name) use to change the computation, with the values that
# leave it alone.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None, 0, 0.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
}

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip


def _unsupported(field: str, value: object, remedy: str) -> UnsupportedModel:
    return UnsupportedModel(f"{field}={value!r}: {remedy}")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding parameters; names are those of transformers' `rope_parameters`.

    Attributes:
        type: `default`, `linear`, `llama3` or `yarn`.
        theta: Base wavelength.
        factor: Context extension factor; 1 for `default`.
        original_max_positions: Context length before extension (`llama3`, `yarn`).
        low_freq_factor, high_freq_factor: `llama3` band limits.
        attention_factor: `yarn` scale of cos and sin; None derives it from `factor` or the mscales.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: `yarn` ramp and scale.
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder: token embedding, pre-norm attention and gated-SiLU MLP blocks, RMS norms, RoPE.

    Attributes:
        architecture: The Hugging Face class name.
        vocab_size, hidden_size, num_layers, intermediate_size: Sizes.
        num_heads, num_kv_heads, head_dim: Query heads, key/value heads, and the size of one head.
        rms_norm_eps: Epsilon of every norm.
        tie_word_embeddings: The head is the embedding.
        qkv_bias, o_bias, mlp_bias: Which projections have biases.
        qk_norm: Queries and keys are RMS-normalised per head before RoPE.
        rope: Rotary embedding parameters.
        max_position_embeddings: The config's context length in tokens.
        dtype: The checkpoint's dtype (float32 if it names none).
        eos_token_ids: End tokens the config names; may be empty.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    max_position_embeddings: int
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 64; the rows added to the head are zero."""
        return -(-self.vocab_size // 64) * 64

    @property
    def max_positions(self) -> int:
        """Positions the model is meant for: YaRN configs may keep the unextended `max_position_embeddings`."""
        if self.rope.type == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_positions * self.rope.factor))
        return self.max_position_embeddings

    @property
    def shape_key(self) -> str:
        """Short name of everything that fixes the shapes of a forward pass, for caches of measurements."""
        flags = [("b", self.qkv_bias), ("o", self.o_bias), ("m", self.mlp_bias), ("n", self.qk_norm)]
        return (
            f"L{self.num_layers}-H{self.hidden_size}-F{self.intermediate_size}-q{self.num_heads}-kv{self.num_kv_heads}"
            f"-d{self.head_dim}-V{self.vocab_size}-{''.join(letter for letter, on in flags if on) or 'x'}"
        )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any] | PretrainedConfig) -> ModelSpec:
        """Read a config.json mapping or a transformers config.

        Raises:
            UnsupportedModel: The model computes something the decoder does not; the message names the field.
        """
        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        architecture = _architecture(values)
        family = _FAMILIES[architecture]
        _refuse_other_computations(values, family)

        sizes = {
            field: _positive_int(values, field)
            for field in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
            )
        }
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        kv_heads = _positive_int(
            {"num_key_value_heads": values.get("num_key_value_heads") or heads}, "num_key_value_heads"
        )
        if heads % kv_heads:
            raise _unsupported("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
        positions = _positive_int(values, "max_position_embeddings")
        attention_bias = bool(values.get("attention_bias"))
        return cls(
            architecture=architecture,
            vocab_size=sizes["vocab_size"],
            hidden_size=hidden,
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_head_dim(values, family, hidden, heads),
            intermediate_size=sizes["intermediate_size"],
            rms_norm_eps=_number("rms_norm_eps", values.get("rms_norm_eps", 1e-6), 0.0),
            tie_word_embeddings=bool(values.get("tie_word_embeddings")),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family != "qwen2" and attention_bias,
            mlp_bias=family == "llama" and bool(values.get("mlp_bias")),
            qk_norm=family == "qwen3",
            rope=_rope(values, positions),
            max_position_embeddings=positions,
            dtype=_dtype(values),
            eos_token_ids=_token_ids(values.get("eos_token_id")),
        )


def _architecture(values: Mapping[str, Any]) -> str:
    """The class name; configs built in memory carry only `model_type`."""
    named = values.get("architectures")
    if not named:
        model_type = values.get("model_type")
        by_type = {family: name for name, family in _FAMILIES.items()}
        if model_type not in by_type:
            raise _unsupported(
                "model_type",
                model_type,
                f"the torch backend runs {_SUPPORTED}; use an engine that supports it",
            )
        return by_type[model_type]
    if len(named) != 1 or named[0] not in _FAMILIES:
        raise _unsupported(
            "architectures", named,
            f"the torch backend runs {_SUPPORTED} (no mixture of experts, no state space layers, no vision); "
            "serve others with an engine that supports them",
        )  # fmt: skip
    return named[0]


def _refuse_other_computations(values: Mapping[str, Any], family: str) -> None:
    for field in ("quantization_config", "compression_config"):
        if values.get(field):
            raise _unsupported(
                field, values[field],
                "quantized checkpoints are not loaded; give the bf16/fp16/fp32 checkpoint it was made from "
                "(the drafter is quantized by rollout-spec itself)",
            )  # fmt: skip
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _unsupported(
            "hidden_act", values["hidden_act"], "only 'silu' is implemented; use an engine that supports it"
        )
    for field, neutral in _NEUTRAL.items():
        if field in values and values[field] not in neutral:
            raise _unsupported(
                field, values[field], "the decoder does not compute this; use an engine that supports it"
            )
    others = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    if others:
        raise _unsupported(
            "layer_types", others, "every layer must be 'full_attention'; use an engine that supports it"
        )
    windowed = (
        family != "llama"
        and values.get("layer_types") is None
        and values.get("use_sliding_window")
        and values.get("sliding_window") is not None
        and values.get("max_window_layers", 28) < values.get("num_hidden_layers", 0)
    )
    if windowed:
        raise _unsupported(
            "use_sliding_window", True,
            "sliding-window attention is not implemented; set it to false if sequences stay below "
            f"sliding_window={values['sliding_window']}, or use an engine that supports it",
        )  # fmt: skip


def _positive_int(values: Mapping[str, Any], field: str) -> int:
    value = values.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _unsupported(
            field, value, "must be a positive integer; is this the model's complete config.json?"
        )
    return value


def _number(field: str, value: Any, low: float) -> float:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < low
    ):
        raise _unsupported(field, value, f"must be a number of at least {low:g}")
    return float(value)


def _head_dim(values: Mapping[str, Any], family: str, hidden: int, heads: int) -> int:
    if values.get("head_dim") is not None:
        head_dim = _positive_int(values, "head_dim")
    elif family == "qwen3":
        head_dim = 128  # the default of transformers' Qwen3Config
    elif hidden % heads:
        raise _unsupported(
            "hidden_size", hidden, f"must be a multiple of num_attention_heads={heads}, or set head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise _unsupported("head_dim", head_dim, "rotary embedding needs an even head size")
    return head_dim


def _dtype(values: Mapping[str, Any]) -> torch.dtype:
    named = values.get("dtype") or values.get("torch_dtype") or "float32"
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise _unsupported("dtype", named, f"must be one of {', '.join(_DTYPES)}; convert the checkpoint")
    return _DTYPES[name]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rope(values: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """Rotary parameters from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if given and all(isinstance(value, Mapping) for value in given.values()):  # one dict per kind of layer
        if set(given) != {"full_attention"}:
            raise _unsupported(
                "rope_parameters", given, "rotary parameters that differ by layer are not implemented"
            )
        given = dict(given["full_attention"])
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise _unsupported(
            "rope_type", kind, f"must be one of {', '.join(_ROPE_TYPES)}; use an engine that supports it"
        )
    unknown = sorted(set(given) - _ROPE_KEYS)
    if unknown:
        raise _unsupported(
            "rope_parameters", unknown, "unknown rotary parameters; use an engine that supports it"
        )
    theta = given.get("rope_theta", values.get("rope_theta"))
    theta = _number("rope_theta", 10_000.0 if theta is None else theta, 1.0)
    partial = given.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise _unsupported(
            "partial_rotary_factor", partial, "rotary embedding must cover the whole head (1.0)"
        )
    if kind == "default":
        return RopeSpec(theta=theta)
    original = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = _positive_int(
        {"original_max_position_embeddings": original or max_positions}, "original_max_position_embeddings"
    )
    factor = given.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
    factor = _number("rope factor", factor, 1.0)
    if kind == "linear":
        return RopeSpec(type=kind, theta=theta, factor=factor)
    if kind == "llama3":
        low = _number("low_freq_factor", given.get("low_freq_factor"), 1e-6)
        high = _number("high_freq_factor", given.get("high_freq_factor"), 1e-6)
        if high <= low:
            raise _unsupported("high_freq_factor", high, f"must exceed low_freq_factor={low}")
        return RopeSpec(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)

    def optional(name: str) -> float | None:
        return None if given.get(name) is None else _number(name, given[name], 0.0)

    return RopeSpec(
        kind,
        theta,
        factor,
        original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=bool(given.get("truncate", True)),
    )
