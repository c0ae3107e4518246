"""Costs from datasheets reproduce what is known from arithmetic alone."""

from __future__ import annotations

import pytest

from rollout_spec.policy.cost_model import TARGET, CostModel
from rollout_spec.policy.devices import DEVICES, NF4, NF4_BITS, QWEN2_5_7B, ModelShape, from_datasheet

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 0,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
IDEAL = {
    "memory_efficiency": 1.0,
    "compute_efficiency": 1.0,
    "drafter_efficiency": 1.0,
    "launch_per_layer": 0.0,
}
K = 1024


def ratio(model: CostModel, batch: int, context: int) -> float:
    """r = T_D / T_T."""
    return model.draft(NF4, batch, batch * context) / model.target(batch, batch, batch * context)


def best_gain(model: CostModel, batch: int, context: int, alpha: float) -> float:
    """Largest tau * T_T / (K * T_D + T_V(K)) over K."""
    kv = batch * context
    return max(
        (1 - alpha ** (k + 1)) / (1 - alpha) * model.target(batch, batch, kv)
        / (k * model.draft(NF4, batch, kv) + model.target(batch, batch * (k + 1), kv))
        for k in range(1, 16)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "ridge"), [("A100-80GB", 153), ("H100-SXM", 295), ("H200", 206), ("H20", 37)]
)
def test_ridges(device, ridge):
    assert round(DEVICES[device].ridge) == ridge


def test_shapes_of_models():
    qwen = QWEN2_5_7B
    embedding, biases_and_norms = 152064 * 3584, 0.2e6
    assert qwen.parameters + embedding == pytest.approx(7.6156e9, abs=2 * biases_and_norms)
    assert qwen.weight_bytes == 2 * qwen.parameters
    assert qwen.active_parameters == qwen.parameters
    assert qwen.kv_bytes == 57344
    llama = ModelShape.from_config(**LLAMA_8B)
    assert llama.parameters + 128256 * 4096 == pytest.approx(8.030e9, rel=1e-3)
    assert llama.kv_bytes == 131072
    moe = ModelShape.from_config(**QWEN3_30B_A3B)
    assert moe.parameters + moe.expert_parameters + 151936 * 2048 == pytest.approx(30.5e9, rel=0.01)
    assert moe.active_parameters + 151936 * 2048 == pytest.approx(3.35e9, rel=0.01)


@pytest.mark.parametrize(("batch", "context", "expected"), [(1, 4 * K, 0.29), (32, 8 * K, 0.78)])
def test_a_shared_cache_raises_the_drafters_cost_ratio(batch, context, expected):
    """r = (W / 3.8 + KV) / (W + KV), with the arithmetic of a row out of the way."""
    shape = ModelShape.from_config(**LLAMA_8B)
    kv = batch * context * shape.kv_bytes
    formula = (shape.weight_bytes / 3.8 + kv) / (shape.weight_bytes + kv)
    assert formula == pytest.approx(expected, abs=0.006)
    memory_bound = from_datasheet(DEVICES["H200"], shape, **{**IDEAL, "compute_efficiency": 1e6})
    assert ratio(memory_bound, batch, context) == pytest.approx(formula, rel=1e-6)
    assert ratio(from_datasheet(DEVICES["H200"], shape, **IDEAL), batch, context) == pytest.approx(
        formula, rel=0.05
    )


def test_a_drafter_gains_less_on_narrower_targets():
    """A target in 8 bits leaves r = 0.53 without context, one in 4 bits nothing."""
    for bits, expected in ((8.0, 0.53), (NF4_BITS, 1.0)):
        shape = ModelShape.from_config(**LLAMA_8B, weight_bits=bits)
        model = from_datasheet(DEVICES["H200"], shape, **{**IDEAL, "compute_efficiency": 1e6})
        assert ratio(model, 1, 0) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("batch", "context", "ceiling", "lowest"),
    [(1, 4 * K, 1.97, 0.98), (8, 8 * K, 1.55, 0.94), (32, 8 * K, 1.20, 0.90)],
)
def test_ceilings_on_an_h200(batch, context, ceiling, lowest):
    """A sharp roofline gives the ceilings; this one is rounded, so that verification costs more at larger batches."""
    gain = best_gain(from_datasheet(DEVICES["H200"], QWEN2_5_7B, **IDEAL), batch, context, 0.9)
    assert lowest * ceiling < gain <= ceiling
    assert best_gain(from_datasheet(DEVICES["H200"], QWEN2_5_7B), batch, context, 0.9) < gain


def test_quantized_kernels_that_are_slow_cost_the_drafter_alone():
    slow, fast = (
        from_datasheet(DEVICES["A100-80GB"], QWEN2_5_7B, drafter_efficiency=part) for part in (0.5, 1.0)
    )
    assert slow.passes[TARGET] == fast.passes[TARGET]
    assert slow.passes[NF4].weights == 2 * fast.passes[NF4].weights
    assert slow.passes[NF4].per_kv_token == fast.passes[NF4].per_kv_token


def test_a_mixture_reads_the_experts_that_its_rows_touch():
    """Verification touches more experts than a plain pass: K is dearer than for a dense model of the same size."""
    shape = ModelShape.from_config(**QWEN3_30B_A3B)
    model = from_datasheet(DEVICES["H200"], shape, **IDEAL)
    dense = ModelShape.from_config(**LLAMA_8B)
    other = from_datasheet(DEVICES["H200"], dense, **IDEAL)
    assert model.target(1, 1, 0) * 4.8e12 == pytest.approx(2 * shape.active_parameters, rel=0.02)
    everything = 2 * (shape.parameters + shape.expert_parameters)
    assert model.target(128, 128, 0) * 4.8e12 == pytest.approx(everything, rel=0.1)
    assert (
        model.target(1, 5, 0) / model.target(1, 1, 0)
        > 1.8
        > 1.1
        > other.target(1, 5, 0) / other.target(1, 1, 0)
    )
