"""An exported drafter: its tensors under their own names, and a config that says how to run it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rollout_spec.adaptive.export import export
from rollout_spec.contracts import InvalidRequest
from rollout_spec.models.spec import RopeSpec

from .training_toys import KINDS, make_module, make_target


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_the_modules_and_no_more(kind, tmp_path):
    module, _ = make_module(make_target(), kind)
    spec, state = module.spec, module.state_dict()
    tensors = load_file(export(spec, state, tmp_path / "out", dtype=torch.float32) / "model.safetensors")
    for name in spec.parameter_shapes():
        assert torch.equal(tensors.pop(name), state[name])
    if kind == "reduced":
        can = tensors.pop("t2d").nonzero()[:, 0]
        assert torch.equal(tensors.pop("d2t") + torch.arange(20), can) and torch.equal(
            can, module.draft_tokens
        )
    assert tensors == {}


def test_the_config_names_the_streams_and_the_vocabulary(tmp_path):
    module, _ = make_module(make_target(), "reduced")
    export(module.spec, module.state_dict(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == list(module.spec.feature_layers)
    assert config["num_aux_hidden_states"] == len(module.spec.feature_layers)
    assert config["draft_vocab_size"] == 20 and config["vocab_size"] == 37 and config["dtype"] == "bfloat16"


def test_rotary_parameters_are_written_as_they_are_read(tmp_path):
    from rollout_spec.models.spec import _rope

    for rope in (
        RopeSpec(theta=5e5),
        RopeSpec("linear", 1e4, 4.0),
        RopeSpec("llama3", 5e5, 8.0, 8192),
        RopeSpec("yarn", 1e6, 4.0, 4096, mscale=0.7, truncate=False),
    ):
        module, _ = make_module(make_target(), "eagle")
        export(replace(module.spec, rope=rope), module.state_dict(), tmp_path)
        read = _rope(json.loads((tmp_path / "config.json").read_text()), 64)
        if rope.type == "linear":
            read = replace(read, original_max_positions=0)
        assert read == rope


@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        ("eagle", {"layout": "speculators", "target": "x"}, "layout"),
        ("eagle3", {"layout": "speculators"}, "target"),
        ("eagle3", {"layout": "onnx"}, "layout"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(kind, options, field, tmp_path):
    module, _ = make_module(make_target(), kind)
    with pytest.raises(InvalidRequest, match=f"^{field}="):
        export(module.spec, module.state_dict(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
