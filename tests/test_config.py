"""Keyword arguments, dicts and YAML land in one validated configuration; nothing is silently ignored."""

import dataclasses
import math
import pickle

import pytest
import yaml

from rollout_spec import RolloutEngine
from rollout_spec.config import DRAFTERS, DTYPES, VERIFIERS, EngineConfig, SpeculationConfig
from rollout_spec.contracts import InvalidRequest

FULL = {
    "backend": "vllm", "device": "cpu", "dtype": "bfloat16", "seed": 11, "max_model_len": 100, "max_num_seqs": 7, "kv_cache_tokens": 640,
    "kv_cache_bytes": 1 << 20, "block_size": 32, "prefill_chunk": 9, "graph_bytes": 0,
    "vllm": {"enforce_eager": True},
    "speculation": {
        "drafter": "int8", "draft_length": 6, "verifier": "rejection", "quantize_lm_head": False, "canary": False,
        "canary_min_acceptance": 0.5, "longest_draft": 9, "objective": "throughput", "margin": 0.1, "history": False,
        "history_tokens": 1000, "probe_share": 0.02, "explore_share": 0.03, "adaptive": True, "adaptive_quantizer": "int8",
        "shadow": False,
    },
}  # fmt: skip


def write(tmp_path, content):
    file = tmp_path / "engine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def test_full_names_every_field():
    assert FULL.keys() == {f.name for f in dataclasses.fields(EngineConfig)}
    assert FULL["speculation"].keys() == {f.name for f in dataclasses.fields(SpeculationConfig)}
    defaults = EngineConfig().to_dict()
    assert not any(FULL[name] == defaults[name] for name in FULL)


def test_every_way_in_gives_the_same_configuration(tmp_path):
    config = EngineConfig(**FULL)
    assert config == EngineConfig.from_dict(FULL) == EngineConfig.from_yaml(write(tmp_path, FULL))
    assert config == EngineConfig(**FULL | {"speculation": SpeculationConfig(**FULL["speculation"])})
    assert isinstance(config.speculation, SpeculationConfig)
    assert config.to_dict() == FULL
    assert EngineConfig.from_dict(config.to_dict()) == config == pickle.loads(pickle.dumps(config))


def test_defaults(tmp_path):
    config = EngineConfig()
    assert config == EngineConfig.from_dict({}) == EngineConfig.from_yaml(write(tmp_path, "# nothing set\n"))
    assert config == EngineConfig.from_yaml(write(tmp_path, "speculation: {}\n"))
    assert EngineConfig.from_dict(config.to_dict()) == config
    assert config.speculation == SpeculationConfig() and config.max_model_len is None


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 3


def test_an_integer_is_fine_where_a_float_is_meant():
    floor = EngineConfig.from_dict(
        {"speculation": {"canary_min_acceptance": 1}}
    ).speculation.canary_min_acceptance
    assert floor == 1.0 and isinstance(floor, float)


@pytest.mark.parametrize(
    ("field", "values"), [("drafter", DRAFTERS), ("verifier", VERIFIERS), ("dtype", DTYPES), ("block_size", (16, 32, 64, 128))]
)  # fmt: skip
def test_every_choice_is_accepted(field, values):
    for value in values:
        options = {field: value} if field in FULL else {"speculation": {field: value}}
        EngineConfig.from_dict(options)


UNKNOWN = [
    ({"max_seqs": 3}, "max_seqs=3: unknown option; known here: backend, device"),
    ({"draft_length": 3}, "draft_length=3: unknown option"),  # it belongs under speculation
    ({"speculation": {"k": 3}}, "speculation.k=3: unknown option; known here: drafter, draft_length"),
    ({"speculation": {"seed": 3}}, "speculation.seed=3: unknown option"),
    ({3: 4}, "3=4: unknown option"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN)
def test_unknown_names(tmp_path, options, message):
    for make in (EngineConfig.from_dict, lambda o: EngineConfig.from_yaml(write(tmp_path, o))):
        with pytest.raises(InvalidRequest, match=message.replace(".", r"\.")):
            make(options)


WRONG = [
    ("device", [None, 3, True, "tpu", "cuda:", "cuda:x", "cuda:-1", " cpu", "", ["cpu"]]),
    ("dtype", [None, "fp32", "float64", 32, ["float32"]]),
    ("seed", [None, 1.0, "1", True, math.nan]),
    ("max_model_len", [0, 1, -5, 2.0, "128", True]),
    ("max_num_seqs", [None, 0, -1, 2.0, "8", True]),
    ("kv_cache_tokens", [0, 1, -64, 1e6, "1e6", False]),
    ("kv_cache_bytes", [None, 0, 1e9, "2GB"]),
    ("graph_bytes", [-1, 1e9, True, "1GB"]),
    ("block_size", [None, 0, 1, 48, 256, 16.0, "16"]),
    ("prefill_chunk", [None, 0, -1, 1.5]),
    ("speculation", [None, "nf4", 4, ["nf4"], True]),
    ("speculation.drafter", [None, "eagle", "NF4", 4, ["nf4"]]),
    ("speculation.draft_length", [0, -1, 65, 4.0, "4", True]),
    ("speculation.longest_draft", [None, 0, 65, 4.0]),
    ("speculation.objective", ["fast", None, 3]),
    ("speculation.margin", [-0.1, 1.1, None, "0.1", True]),
    ("speculation.probe_share", [-0.1, 1.1, None]),
    ("speculation.explore_share", [-0.1, 2.0, None]),
    ("speculation.history", [None, 1, "yes"]),
    ("speculation.history_tokens", [0, None, 1.5]),
    ("speculation.verifier", [None, "exact", True]),
    ("speculation.quantize_lm_head", [None, 1, "yes"]),
    ("speculation.canary", [None, 0, "off"]),
    ("speculation.canary_min_acceptance", [None, -0.1, 1.1, math.nan, math.inf, "0.5", True]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG for value in values])
def test_wrong_values(tmp_path, field, value):
    """Said the same way however the value came in: the field, the value, what to give instead."""
    outer, _, inner = field.partition(".")
    options = {outer: {inner: value} if inner else value}
    ways = [
        EngineConfig.from_dict,
        lambda o: EngineConfig(**o),
        lambda o: EngineConfig.from_yaml(write(tmp_path, o)),
    ]
    if inner:
        ways.append(lambda o: SpeculationConfig(**o[outer]))
    for make in ways:
        with pytest.raises(InvalidRequest) as error:
            make(options)
        message = str(error.value)
        assert message.startswith(f"{field}={value!r}: ") and ("use " in message or "give " in message)


@pytest.mark.parametrize("values", [None, 5, "device: cpu", ["device"], [("device", "cpu")]])
def test_what_is_no_mapping(values):
    with pytest.raises(InvalidRequest, match=r"^config=.*: give a mapping"):
        EngineConfig.from_dict(values)


@pytest.mark.parametrize(
    "content", ["- device\n- cpu\n", "just text", "3", "device: [cpu", "\tdevice: cpu", "a: b: c"]
)
def test_yaml_that_is_no_configuration(tmp_path, content):
    with pytest.raises(InvalidRequest, match=r"^config=.*give a (mapping|readable YAML file)"):
        EngineConfig.from_yaml(write(tmp_path, content))


def test_a_yaml_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "engine.yaml", tmp_path):
        with pytest.raises(InvalidRequest, match=r"^config=.*give a readable YAML file"):
            EngineConfig.from_yaml(str(path))


def test_a_yaml_file_that_is_no_text(tmp_path):
    (tmp_path / "engine.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidRequest, match=r"^config=.*give a readable YAML file"):
        EngineConfig.from_yaml(str(tmp_path / "engine.yaml"))


def test_options_override_a_config():
    """Checked before anything is loaded, so no model is needed."""
    with pytest.raises(InvalidRequest, match="max_num_seqs=0"):
        RolloutEngine.from_model({}, EngineConfig(), hf_config=_config_of_no_model(), max_num_seqs=0)
    with pytest.raises(InvalidRequest, match="bogus=1: unknown option"):
        RolloutEngine.from_model({}, {"seed": 3}, hf_config=_config_of_no_model(), bogus=1)


def _config_of_no_model():
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 61, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
