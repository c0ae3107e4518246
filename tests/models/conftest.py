"""Tiny models of every family, and attention callbacks simple enough to trust."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from rollout_spec.models.checkpoint import state_dict_from
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import load_weights

_FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_SMALL = {
    "vocab_size": 150,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def small_config() -> Callable[..., PretrainedConfig]:
    """small_config(family, **changes): a transformers config of a few thousand parameters."""

    def make(family: str, **changes: object) -> PretrainedConfig:
        if family == "qwen2":  # its head size is always hidden_size / num_attention_heads
            changes = {"hidden_size": 64, **changes}
        return _FAMILIES[family](**{**_SMALL, **changes})

    return make


@pytest.fixture
def random_model() -> Callable[..., torch.nn.Module]:
    """random_model(config, seed): a transformers model whose every parameter, norms and biases too, is random.

    Its values are bfloat16's, so that `cast_parameters` loses nothing.
    """

    def make(config: PretrainedConfig, seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0)
            parameter.data = values.bfloat16().float()
        model.tie_weights()
        return model

    return make


@pytest.fixture
def cast_parameters() -> Callable[[torch.nn.Module, torch.dtype], torch.nn.Module]:
    """A copy with parameters in `dtype`, as from_pretrained makes it; `.to(dtype)` would round `inv_freq` as well."""

    def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return cast


@pytest.fixture
def decoder_of() -> Callable[..., Decoder]:
    """decoder_of(model, dtype): the same model as a `Decoder`."""

    def make(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Decoder:
        spec, tensors = state_dict_from(model)
        return Decoder(spec, load_weights(spec, tensors, dtype), RotaryTable(spec, "cpu", dtype))

    return make


@pytest.fixture
def causal_attend() -> Callable[[ModelSpec], Callable[..., Tensor]]:
    """causal_attend(spec): full attention over one sequence whose rows come in order."""

    def make(spec: ModelSpec) -> Callable[..., Tensor]:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows, group = q.shape[0], spec.num_heads // spec.num_kv_heads
            k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))  # [Hq, R, hd]
            scores = q.transpose(0, 1) @ k.transpose(1, 2) * spec.head_dim**-0.5
            scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool).triu(1), -torch.inf)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            return (weights @ v).transpose(0, 1).reshape(rows, -1)

        return attend

    return make
