"""What self-drafting promises on a model is what field-notes' formulas and datasheets say."""

from __future__ import annotations

import pytest

from rollout_spec.policy.devices import DEVICES, NF4_BITS, ModelShape
from rollout_spec.policy.price import (
    LONGEST,
    NO_HEADROOM,
    bytes_read,
    ceiling,
    even_context,
    on_device,
    shape_of,
    weight_bits,
)

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "dtype": "bfloat16",
}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}


@pytest.mark.parametrize(
    ("config", "batch", "context", "expected"),
    [
        ({}, 1, 4096, 0.29),
        ({}, 32, 8192, 0.78),
        (FP8, 1, 0, 0.53),
        (AWQ, 1, 0, 0.99),
    ],
)
def test_the_cost_ratio(config, batch, context, expected):
    price = ceiling(shape_of(LLAMA_8B | config), batch, context)
    assert price.ratio == pytest.approx(expected, abs=0.006)


def test_a_narrower_target_leaves_less_and_4_bits_nothing():
    dense, fp8, awq = (ceiling(shape_of(LLAMA_8B | config), 1, 1024) for config in ({}, FP8, AWQ))
    assert dense.gain > fp8.gain > 1.3
    assert dense.ratio < fp8.ratio < NO_HEADROOM < awq.ratio
    assert awq.gain == 1.0 and awq.draft_length == 0


def test_long_contexts_take_the_gain_away():
    shape = shape_of(LLAMA_8B)
    gains = [ceiling(shape, 8, context).gain for context in (1024, 8192, 32768, 131072)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 2.0 and gains[-1] < 1.1
    assert ceiling(shape, 1, 131072).gain > ceiling(shape, 32, 131072).gain
    even = even_context(shape)
    assert even * shape.kv_bytes == pytest.approx(shape.weight_bytes, rel=1e-4)
    assert ceiling(shape, 1, even).ratio == pytest.approx((1 / 3.8 + 1) / 2, rel=1e-3)


def test_a_mixture_reads_the_experts_that_verification_touches():
    """128 experts, 8 a row: five rows touch 1 - (15/16)^5 of them, 4.4 times as many as one."""
    shape = shape_of(QWEN3_30B_A3B)
    experts = shape.expert_parameters * 2
    for rows in (1, 5, 64):
        touched = (bytes_read(shape, rows, 0) - 2 * shape.parameters) / experts
        assert touched == pytest.approx(1 - (120 / 128) ** rows)
    mixture, dense = ceiling(shape, 1, 1024), ceiling(shape_of(LLAMA_8B), 1, 1024)
    assert mixture.gain < 1.2 < 2.4 < dense.gain
    # One row after another touches other experts, so drafting reads what a narrower model of that size reads.
    assert mixture.ratio == pytest.approx(1 / 3.8, abs=0.03)


def test_the_best_length_is_the_best_of_all():
    shape = shape_of(LLAMA_8B)
    price = ceiling(shape, 4, 8192, alpha=0.9)
    plain = bytes_read(shape, 4, 4 * 8192)
    gains = {
        k: sum(0.9**i for i in range(k + 1))
        / (k * price.ratio + bytes_read(shape, 4 * (k + 1), 4 * 8192) / plain)
        for k in range(1, LONGEST + 1)
    }
    assert price.draft_length == max(gains, key=gains.__getitem__)
    assert price.gain == pytest.approx(max(gains.values()))


@pytest.mark.parametrize("device", sorted(DEVICES))
@pytest.mark.parametrize("config", [LLAMA_8B, QWEN3_30B_A3B, LLAMA_8B | FP8], ids=["dense", "mixture", "fp8"])
def test_no_device_reaches_the_ceiling(device, config):
    shape = shape_of(config)
    for batch in (1, 8, 32):
        for context in (1024, 32768):
            most, real = ceiling(shape, batch, context), on_device(DEVICES[device], shape, batch, context)
            assert 1.0 <= real.gain <= most.gain + 1e-9
            assert (real.draft_length == 0) == (real.gain == 1.0)


def test_arithmetic_ends_it_on_a_device_with_little():
    """An H20's ridge is at 37 rows: at B = 32 verification is dear."""
    shape = shape_of(LLAMA_8B)
    assert (
        on_device(DEVICES["H20"], shape, 32, 1024).gain
        < 1.1
        < on_device(DEVICES["H200"], shape, 32, 1024).gain
    )


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({}, 16.0),
        ({"torch_dtype": "float32"}, 32.0),
        ({"dtype": "bfloat16"}, 16.0),
        (FP8, 8.0),
        (AWQ, 4.25),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, 8.0),
        ({"quantization_config": {"quant_method": "mxfp4"}}, 4.25),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, NF4_BITS),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, 8.0),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
                }
            },
            4.25,
        ),
    ],
)
def test_bits_of_a_stored_weight(config, bits):
    assert weight_bits(config) == bits


def test_shapes_of_configs():
    assert shape_of(LLAMA_8B) == ModelShape.from_config(
        **{k: v for k, v in LLAMA_8B.items() if k != "torch_dtype"}
    )
    nested = {"model_type": "wrapper", "text_config": LLAMA_8B}
    assert shape_of(nested) == shape_of(LLAMA_8B)
    mixtral = {k: v for k, v in LLAMA_8B.items() if k != "torch_dtype"} | {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    shape = shape_of(mixtral)
    assert shape.expert_parameters == 32 * 8 * 3 * 4096 * 14336 and shape.expert_share == 0.25
    assert shape.parameters == shape_of(LLAMA_8B).parameters - 32 * 3 * 4096 * 14336
    shared = shape_of(QWEN3_30B_A3B | {"n_shared_experts": 2})
    assert shared.parameters - shape_of(QWEN3_30B_A3B).parameters == 48 * 3 * 2048 * 2 * 768


def test_a_config_that_tells_too_little_is_refused():
    with pytest.raises(ValueError, match=r"lacks num_hidden_layers, vocab_size"):
        shape_of({"hidden_size": 64, "num_attention_heads": 4})
