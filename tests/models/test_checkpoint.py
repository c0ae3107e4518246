"""Folders, modules and state dicts are read; anything doubtful is an error that names the file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rollout_spec.contracts import WeightError
from rollout_spec.models.checkpoint import read_checkpoint, read_config, state_dict_from
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import load_weights


@pytest.fixture
def saved(tmp_path, small_config, random_model):
    """saved(shard_size): a folder written by transformers, and the model."""

    def make(max_shard_size="1GB", **changes):
        model = random_model(small_config("qwen3", **changes))
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        return tmp_path, model

    return make


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_gives_the_same_logits(shard_size, tied, saved, causal_attend):
    folder, model = saved(shard_size, tie_word_embeddings=tied)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    spec = ModelSpec.from_hf_config(read_config(folder))
    weights = load_weights(spec, read_checkpoint(str(folder)), torch.float32)
    decoder = Decoder(spec, weights, RotaryTable(spec, "cpu", torch.float32))
    tokens = torch.arange(20)
    ours = decoder.logits(decoder.hidden(tokens, tokens, causal_attend(spec)))[:, : spec.vocab_size]
    torch.testing.assert_close(ours, model(tokens[None]).logits[0], rtol=1e-5, atol=5e-5)


def test_end_tokens_of_the_generation_config_take_precedence(saved):
    folder, _ = saved(eos_token_id=3)
    assert ModelSpec.from_hf_config(read_config(folder)).eos_token_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelSpec.from_hf_config(read_config(folder)).eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text("{}")
    assert ModelSpec.from_hf_config(read_config(folder)).eos_token_ids == (3,)


@pytest.mark.parametrize("read", [read_config, read_checkpoint])
def test_a_path_that_is_no_folder(read, tmp_path):
    (tmp_path / "file").touch()
    for path in ("Qwen/Qwen3-0.6B", tmp_path / "file"):
        with pytest.raises(WeightError, match="no such folder; download"):
            read(path)


def test_no_config(tmp_path):
    with pytest.raises(WeightError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_broken_json(text, saved):
    folder, _ = saved("20KB")
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightError, match=r"config\.json: .*download"):
        read_config(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match=r"index\.json: .*download"):
        read_checkpoint(folder)


def test_index_without_map(saved):
    folder, _ = saved("20KB")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightError, match="weight_map"):
        read_checkpoint(folder)


def test_no_weights(tmp_path):
    with pytest.raises(WeightError, match="neither"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickles_are_refused(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(WeightError, match=f"{name}: pickled .*save_pretrained"):
        read_checkpoint(tmp_path)


def test_an_adapter_alone_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightError, match="merge_and_unload"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_found_before_the_first_tensor(keep, saved):
    folder, _ = saved("20KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(WeightError, match=f"{last.name}: truncated or corrupt"):
        read_checkpoint(folder)


def test_a_missing_shard(saved):
    folder, _ = saved("20KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(WeightError, match=f"1 of .* shards missing, among them {last.name}"):
        read_checkpoint(folder)


def test_shards_outside_the_folder_are_not_read(saved, tmp_path):
    folder, _ = saved("20KB")
    index = folder / "model.safetensors.index.json"
    save_file({"a": torch.ones(1)}, tmp_path.parent / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(WeightError, match="shards missing"):
        read_checkpoint(folder)


def test_a_module_is_read_without_copies(small_config, random_model):
    model = random_model(small_config("llama", tie_word_embeddings=True))
    spec, tensors = state_dict_from(model)
    tensors = dict(tensors)
    assert spec == ModelSpec.from_hf_config(model.config)
    assert tensors["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in tensors.values())
    load_weights(spec, tensors.items(), torch.float32)


def test_wrapped_modules_are_unwrapped(small_config, random_model):
    model = random_model(small_config("llama"))
    wrapper = torch.nn.Module()
    wrapper.module = model
    spec, tensors = state_dict_from(wrapper)
    load_weights(spec, tensors, torch.float32)
    spec, tensors = state_dict_from(torch.compile(model))
    load_weights(spec, tensors, torch.float32)


def test_a_state_dict_needs_its_config(small_config, random_model):
    model = random_model(small_config("qwen2"))
    with pytest.raises(WeightError, match="config=None"):
        state_dict_from(model.state_dict())
    spec, tensors = state_dict_from(model.state_dict(), model.config)
    load_weights(spec, tensors, torch.bfloat16)


def test_unmerged_adapters_are_refused(small_config, random_model):
    model = random_model(small_config("qwen2"))
    model.peft_config = {}
    with pytest.raises(WeightError, match="merge_and_unload"):
        state_dict_from(model)
