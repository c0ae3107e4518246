"""What is read from a config, and what is refused."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from rollout_spec.contracts import UnsupportedModel
from rollout_spec.models.spec import ModelSpec, RopeSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}


def test_families_differ_in_biases_and_norms():
    llama, qwen2, qwen3 = (
        ModelSpec.from_hf_config(config)
        for config in (LlamaConfig(), Qwen2Config(), Qwen3Config(attention_bias=True))
    )
    assert [s.architecture for s in (llama, qwen2, qwen3)] == [
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    ]
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (False, False, False, False)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (True, True, False, True)


def test_old_config_files_have_few_fields():
    spec = ModelSpec.from_hf_config(LLAMA)
    assert (spec.num_kv_heads, spec.head_dim, spec.rope, spec.tie_word_embeddings) == (
        4,
        16,
        RopeSpec(),
        False,
    )
    assert (spec.dtype, spec.eos_token_ids) == (torch.float32, ())


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_config_object_its_dict_and_its_file_agree(config_class):
    config = config_class(dtype="bfloat16", eos_token_id=[5, 6], tie_word_embeddings=True, rope_theta=7e4)
    spec = ModelSpec.from_hf_config(config)
    assert spec == ModelSpec.from_hf_config(config.to_dict())
    assert spec == ModelSpec.from_hf_config(json.loads(config.to_json_string(use_diff=False)))
    assert (spec.dtype, spec.eos_token_ids, spec.rope.theta) == (torch.bfloat16, (5, 6), 7e4)


@pytest.mark.parametrize(("vocab", "padded"), [(64, 64), (65, 128), (151_936, 151_936), (151_643, 151_680)])
def test_padded_vocabulary(vocab, padded):
    assert ModelSpec.from_hf_config({**LLAMA, "vocab_size": vocab}).padded_vocab_size == padded


def test_shape_key_tells_shapes_apart():
    changes = [
        {},
        {"hidden_size": 128},
        {"num_key_value_heads": 2},
        {"head_dim": 32},
        {"vocab_size": 10},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"architectures": ["Qwen3ForCausalLM"]},
    ]
    keys = {ModelSpec.from_hf_config({**LLAMA, **change}).shape_key for change in changes}
    assert len(keys) == len(changes)
    assert all(len(key) < 64 for key in keys)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, RopeSpec(theta=5e5)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            RopeSpec("linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
            RopeSpec("llama3", 5e5, 8.0, 64),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
            RopeSpec("yarn", 1e6, 4.0, 256),
        ),
    ],
)
def test_rope_as_transformers_5_and_as_earlier_versions_write_it(old, new, expected):
    assert ModelSpec.from_hf_config({**LLAMA, **old}).rope == expected
    assert ModelSpec.from_hf_config({**LLAMA, "rope_parameters": new}).rope == expected
    assert ModelSpec.from_hf_config({**LLAMA, "rope_parameters": {"full_attention": new}}).rope == expected


def test_yarn_extends_the_positions_a_config_left_unextended():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200, "rope_theta": 1e6}
    assert ModelSpec.from_hf_config({**LLAMA, "rope_parameters": rope}).max_positions == 800
    ratio = {**rope, "factor": None, "original_max_position_embeddings": 128}
    assert ModelSpec.from_hf_config({**LLAMA, "rope_parameters": ratio}).rope.factor == 2.0


WINDOW = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    ("base", "change", "field"),
    [
        (LLAMA, {"architectures": ["MixtralForCausalLM"]}, "architectures"),
        (LLAMA, {"architectures": ["Qwen3MoeForCausalLM"]}, "architectures"),
        (LLAMA, {"architectures": ["MambaForCausalLM"]}, "architectures"),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (LLAMA, {"architectures": None}, "model_type"),
        (LLAMA, {"architectures": None, "model_type": "gemma3"}, "model_type"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (LLAMA, {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        (LLAMA, {"compression_config": {"format": "int"}}, "compression_config"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA, {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        (QWEN2, {**WINDOW, "max_window_layers": 1}, "use_sliding_window"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters"),
        (LLAMA, {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor"),
        (LLAMA, {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"hidden_size": 66}, "hidden_size"),
        (LLAMA, {"head_dim": 15}, "head_dim"),
        (LLAMA, {"vocab_size": None}, "vocab_size"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA, {"dtype": "float8_e4m3fn"}, "dtype"),
    ],
)
def test_refusals_name_the_field_and_a_remedy(base, change, field):
    with pytest.raises(UnsupportedModel, match=f"^{field}=.*: .+"):
        ModelSpec.from_hf_config({**base, **change})


@pytest.mark.parametrize(
    "change",
    [
        {**WINDOW, "max_window_layers": 2},
        {**WINDOW, "use_sliding_window": False},
        {**WINDOW, "sliding_window": None},
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": False},
        {"partial_rotary_factor": 1.0, "attn_logit_softcapping": None, "quantization_config": None},
        {"torch_dtype": torch.bfloat16},
    ],
)
def test_fields_that_change_nothing_are_accepted(change):
    ModelSpec.from_hf_config({**QWEN2, **change})
