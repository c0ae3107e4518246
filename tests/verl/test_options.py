"""A user who misconfigures the rollout is told at start: field, value, remedy."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from verl_configs import model_config, rollout_config

from rollout_spec.contracts import InvalidRequest, UnsupportedModel, WeightError
from rollout_spec.integrations.verl import compat
from rollout_spec.integrations.verl.options import KEY, MODEL, ROLLOUT, read_options


def ours(**options: Any) -> dict[str, Any]:
    return {"engine_kwargs": {"rollout_spec": options}}


def test_verls_fields_and_ours_make_one_configuration() -> None:
    options = read_options(
        rollout_config(**ours(kv_cache_tokens=4096, speculation={"drafter": "int8"})),
        model_config(),
        replica_rank=3,
    )
    assert (options.engine.dtype, options.engine.max_num_seqs, options.engine.max_model_len) == (
        "float32",
        16,
        192,
    )
    assert options.engine.seed == 45, "replicas draw different noise"
    assert options.engine.kv_cache_tokens == 4096 and options.engine.speculation.drafter == "int8"
    assert options.bucket_bytes == 2 << 30 and options.free_cache and not options.raw_logprobs


def test_lengths_and_graphs() -> None:
    options = read_options(rollout_config(max_model_len=500, enforce_eager=True), model_config())
    assert options.engine.max_model_len == 500 and options.engine.graph_bytes == 0
    options = read_options(rollout_config(enforce_eager=True, **ours(graph_bytes=5)), model_config())
    assert options.engine.graph_bytes == 5


def test_a_drafter_that_is_trained_is_used() -> None:
    given = {"batch_tokens": 128}
    options = read_options(
        rollout_config(**ours(spot_training=given, speculation={"drafter": "int8"})), model_config()
    )
    assert options.spot_training is not None and options.spot_training.batch_tokens == 128
    assert options.engine.speculation.adaptive and options.engine.speculation.drafter == "int8"
    assert given == {"batch_tokens": 128}
    for nothing in ({}, {"spot_training": False}):
        options = read_options(rollout_config(**ours(**nothing)), model_config())
        assert options.spot_training is None and not options.engine.speculation.adaptive


def test_a_backend_that_is_not_configured_has_defaults() -> None:
    assert read_options(rollout_config(engine_kwargs={}), model_config()).engine.speculation.drafter == "auto"
    assert read_options(rollout_config(engine_kwargs={"rollout_spec": None}), model_config())


ON = SimpleNamespace(enable=True, enable_rollout=True)
ROLLOUT_MISTAKES = {
    "unknown option": (ours(speculatoin={}), f"{KEY}.speculatoin", "unknown option"),
    "unknown option of speculation": (ours(speculation={"drafer": 1}), f"{KEY}.speculation.drafer", "unknown option"),
    "wrong value": (ours(speculation={"drafter": "int3"}), f"{KEY}.speculation.drafter='int3'", "use one of"),
    "wrong type": (ours(kv_cache_bytes="much"), f"{KEY}.kv_cache_bytes='much'", "of type int"),
    "no mapping": ({"engine_kwargs": {"rollout_spec": 7}}, f"{KEY}=7", "give a mapping"),
    "wrong place": ({"custom": {"rollout_spec": {}}}, f"{ROLLOUT}.custom.rollout_spec", f"put it under {KEY}"),
    "verl's dtype": (ours(dtype="float32"), f"{KEY}.dtype='float32'", f"set {ROLLOUT}.dtype"),
    "verl's seed": (ours(seed=3), f"{KEY}.seed=3", f"set {ROLLOUT}.seed"),
    "verl's length": (ours(max_model_len=9), f"{KEY}.max_model_len=9", f"set {ROLLOUT}.max_model_len"),
    "verl's batch": (ours(max_num_seqs=9), f"{KEY}.max_num_seqs=9", f"set {ROLLOUT}.max_num_seqs"),
    "vllm here": (ours(backend="vllm"), f"{KEY}.backend='vllm'", f"{ROLLOUT}.name=vllm"),
    "vllm's arguments": (ours(vllm={}), f"{KEY}.vllm", f"{ROLLOUT}.name=vllm"),
    "spot training": (ours(spot_training=3), f"{KEY}.spot_training=3", "use True"),
    "unknown option of it": (ours(spot_training={"batch": 1}), f"{KEY}.spot_training.batch", "unknown option"),
    "its batch": (ours(spot_training={"batch_tokens": 0}), f"{KEY}.spot_training.batch_tokens=0", "integer >= 1"),
    "its rate": (ours(spot_training={"learning_rate": 0}), f"{KEY}.spot_training.learning_rate=0", "number > 0"),
    "its kind": (ours(spot_training={"kind": "mtp"}), f"{KEY}.spot_training.kind='mtp'", "eagle3"),
    "its path": (ours(spot_training={"checkpoint": "/no/such"}), f"{KEY}.spot_training.checkpoint='/no/such'", "drafter train"),
    "its drafter": (
        ours(spot_training=True, speculation={"adaptive": False}), f"{KEY}.speculation.adaptive=False", "leave it out",
    ),
    "unknown dtype": ({"dtype": "fp8"}, f"{ROLLOUT}.dtype='fp8'", "use one of"),
    "tensor parallel": ({"tensor_model_parallel_size": 2}, f"{ROLLOUT}.tensor_model_parallel_size=2", "use 1"),
    "data parallel": ({"data_parallel_size": 2}, f"{ROLLOUT}.data_parallel_size=2", "use 1"),
    "pipeline parallel": ({"pipeline_model_parallel_size": 2}, f"{ROLLOUT}.pipeline_model_parallel_size=2", "use 1"),
    "expert parallel": ({"expert_parallel_size": 2}, f"{ROLLOUT}.expert_parallel_size=2", "use 1"),
    "quantized": ({"quantization": "fp8"}, f"{ROLLOUT}.quantization='fp8'", "leave it out"),
    "quantized in training": ({"qat": {"enable": True}}, f"{ROLLOUT}.qat.enable=True", "use False"),
    "expert replay": ({"enable_rollout_routing_replay": True}, f"{ROLLOUT}.enable_rollout_routing_replay", "False"),
    "graph sizes": ({"cudagraph_capture_sizes": [1]}, f"{ROLLOUT}.cudagraph_capture_sizes=[1]", "graph_bytes"),
    "priorities": ({"scheduling_policy": "priority"}, f"{ROLLOUT}.scheduling_policy='priority'", "use fcfs"),
    "logprobs": ({"logprobs_mode": "raw_logits"}, f"{ROLLOUT}.logprobs_mode='raw_logits'", "use processed_logprobs"),
    "mtp": ({"mtp": ON}, f"{MODEL}.mtp.enable_rollout=True", "use False"),
    "prometheus": ({"prometheus": ON}, f"{ROLLOUT}.prometheus.enable=True", "use False"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ROLLOUT_MISTAKES)
def test_a_mistake_in_the_rollout(mistake: str) -> None:
    changes, field, remedy = ROLLOUT_MISTAKES[mistake]
    with pytest.raises(InvalidRequest) as caught:
        read_options(rollout_config(**changes), model_config())
    assert str(caught.value).startswith(field) and remedy in str(caught.value)


MODEL_MISTAKES = {
    "adapters": ({"lora_rank": 8}, f"{MODEL}.lora.merge=False", "use True"),
    "adapters elsewhere": ({"lora": {"rank": 8}}, f"{MODEL}.lora.merge=False", "use True"),
    "another model": (
        {"override_config": {"rope_theta": 1}},
        f"{MODEL}.override_config.rope_theta=1",
        "config.json",
    ),
    "another nested": (
        {"override_config": {"model_config": {"rope_theta": 1}}},
        f"{MODEL}.override_config.rope_theta=1",
        "config.json",
    ),
}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_about_the_model(mistake: str) -> None:
    changes, field, remedy = MODEL_MISTAKES[mistake]
    with pytest.raises(InvalidRequest) as caught:
        read_options(rollout_config(), model_config(**changes))
    assert str(caught.value).startswith(field) and remedy in str(caught.value)


def test_merged_adapters_and_other_attention_are_fine() -> None:
    merged = {"lora_rank": 8, "lora": {"merge": True}, "override_config": {"attn_implementation": "eager"}}
    assert read_options(rollout_config(), model_config(**merged))


def test_an_unsupported_model(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    )
    with pytest.raises(UnsupportedModel, match=r"(?i)mamba"):
        read_options(rollout_config(), model_config(local_path=str(tmp_path)))


def test_no_model_there(tmp_path: Any) -> None:
    with pytest.raises(WeightError, match=r"config\.json"):
        read_options(rollout_config(), model_config(local_path=str(tmp_path)))


@pytest.mark.parametrize("version", ["0.9.0", "0.10.0", "0.8.0.dev0"])
def test_another_verl(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: version)
    with pytest.raises(
        compat.UnsupportedVerl, match=f"verl=={version}.*supports verl==0.9.1.*install that version"
    ):
        compat.check_version()


def test_no_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise compat.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(compat.UnsupportedVerl, match="no verl is installed"):
        compat.check_version()
