"""What a quantized copy of a model promises as its drafter, before anything is measured.

Decoding reads bytes: the weights once per pass, of a mixture the experts that the pass's rows touch, and the keys and
values of every live context. A self-drafter reads the same with narrower weights, and shares the keys and values:

    r = (weights' + experts'(B) + KV) / (weights + experts(B) + KV)       what one draft step costs, of a plain one
    v = (weights + experts(B (K+1)) + KV) / (weights + experts(B) + KV)   what verification costs
    ceiling = max over K of tau(alpha, K) / (K r + v)

The ceiling has no arithmetic, no launches and perfect kernels in it; `on_device` adds those from a datasheet. Both are
predictions. The policy decides from measured times and decodes plainly where speculation does not pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_spec.policy.baselines import expected_emitted
from rollout_spec.policy.devices import NF4, NF4_BITS, Device, ModelShape, from_datasheet

ALPHA = 0.96  # of 4-bit copies; published for 7 to 14 billion parameters in RL: 0.958 to 0.982
LONGEST = 16
NO_HEADROOM = 0.9  # r from which on not even the ceiling leaves anything worth having
_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0}
_BITS_OF_METHOD = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25, "awq": 4.25, "gptq": 4.25}


@dataclass(frozen=True)
class Price:
    """The prospects of self-drafting at one operating point.

    Attributes:
        batch: Sequences decoding, B.
        context: Mean context in tokens, S.
        ratio: r, the cost of a draft step over that of a plain step.
        draft_length: Best K; 0 is plain decoding.
        gain: Time per token of plain decoding over that with this K, at least 1.
    """

    batch: int
    context: int
    ratio: float
    draft_length: int
    gain: float


def ceiling(
    shape: ModelShape, batch: int, context: int, alpha: float = ALPHA, drafter_bits: float = NF4_BITS
) -> Price:
    """The most that self-drafting can gain, from the bytes alone."""
    plain = bytes_read(shape, batch, batch * context)
    ratio = bytes_read(shape, batch, batch * context, drafter_bits) / plain
    verify = [bytes_read(shape, batch * (k + 1), batch * context) / plain for k in range(LONGEST + 1)]
    return _best(batch, context, ratio, verify, alpha)


def on_device(
    device: Device,
    shape: ModelShape,
    batch: int,
    context: int,
    alpha: float = ALPHA,
    drafter_bits: float = NF4_BITS,
) -> Price:
    """What self-drafting gains on a device by its datasheet, kernels of usual efficiency and launches included."""
    costs = from_datasheet(device, shape, drafter_bits=drafter_bits)
    kv = batch * context
    plain = costs.target(batch, batch, kv)
    verify = [costs.target(batch, batch * (k + 1), kv) / plain for k in range(LONGEST + 1)]
    return _best(batch, context, costs.draft(NF4, batch, kv) / plain, verify, alpha)


def bytes_read(shape: ModelShape, rows: int, kv_tokens: int, weight_bits: float | None = None) -> float:
    """Bytes that a pass over `rows` token rows reads, `kv_tokens` being the live context tokens of all sequences.

    Args:
        weight_bits: Bits of a weight; None takes the target's own.
    """
    touched = 1.0 - (1.0 - shape.expert_share) ** rows
    bits = shape.weight_bits if weight_bits is None else weight_bits
    return (shape.parameters + shape.expert_parameters * touched) * bits / 8 + kv_tokens * shape.kv_bytes


def even_context(shape: ModelShape) -> int:
    """Live context tokens, of all sequences together, whose keys and values are as many bytes as the weights.

    Of a mixture, the weights that one row reads.
    """
    return round(bytes_read(shape, 1, 0) / shape.kv_bytes)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the decoder that a Hugging Face `config.json` describes; keys and values are in 16 bits.

    Raises:
        ValueError: Fields are missing that decide the cost; they are named.
    """
    text = {**config, **config.get("text_config", {})}
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if name not in text]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, from which costs are reckoned")
    experts = int(_first(text, "num_experts", "num_local_experts", "n_routed_experts") or 0)
    width = text.get("intermediate_size", 0)
    expert_width = text.get("moe_intermediate_size") or width if experts else 0
    if experts:
        width = text.get("shared_expert_intermediate_size") or expert_width * (
            text.get("n_shared_experts") or 0
        )
    return ModelShape.from_config(
        hidden_size=text["hidden_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        intermediate_size=width,
        vocab_size=text["vocab_size"],
        head_dim=text.get("head_dim"),
        num_experts=experts,
        num_experts_per_tok=int(_first(text, "num_experts_per_tok", "num_experts_per_token") or 0),
        moe_intermediate_size=expert_width,
        weight_bits=weight_bits(text),
    )


def weight_bits(config: Mapping[str, Any]) -> float:
    """Bits of a stored weight: by `quantization_config`, with the scales of 4-bit groups, else by dtype."""
    quantization = config.get("quantization_config")
    if not quantization:
        return _BITS.get(str(_first(config, "dtype", "torch_dtype")), 16.0)
    given = quantization.get("bits") or quantization.get("weight_bits")
    for group in quantization.get("config_groups", {}).values():
        given = given or (group.get("weights") or {}).get("num_bits")
    if given is None and quantization.get("load_in_4bit"):
        return NF4_BITS
    if given is None and quantization.get("load_in_8bit"):
        given = 8
    if given is None:
        return _BITS_OF_METHOD.get(str(quantization.get("quant_method")), 16.0)
    return float(given) + (0.25 if given <= 4 else 0.0)


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _best(batch: int, context: int, ratio: float, verify: list[float], alpha: float) -> Price:
    gains = [1.0] + [expected_emitted(alpha, k) / (k * ratio + verify[k]) for k in range(1, len(verify))]
    length = max(range(len(gains)), key=gains.__getitem__)
    return Price(batch, context, ratio, length, gains[length])
