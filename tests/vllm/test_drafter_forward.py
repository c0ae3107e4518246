"""The drafter's forward by this project's decoder is vLLM's, and is left to vLLM where it would not be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_engines import perturbed
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rollout_spec.integrations.vllm import drafter_forward
from rollout_spec.integrations.vllm.arguments import llm_arguments
from rollout_spec.kernels.decoder_layer import LayersAroundAttention
from rollout_spec.kernels.library import kernels
from rollout_spec.models.decoder import Decoder
from tests.vllm.conftest import POLICY, Engine, Engines, prompts

pytest.importorskip("vllm")

from rollout_spec.integrations.vllm.drafter_forward import DrafterForward, use_decoder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
SIZES = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def saved(name: str, folder: Path) -> str:
    """A model whose every parameter, norms and biases too, is random."""
    kind, changes = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes))
    for parameter_name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in parameter_name else 0.0)
    model.save_pretrained(folder)
    return str(folder)


def scores(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The drafter's logits after each of `tokens`."""
    rows, columns, data = engine.llm.collective_rpc("rollout_spec_score", args=(tokens, True))[0]
    return torch.from_numpy(np.frombuffer(data, np.float32).reshape(rows, columns).copy())


def both(engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the decoder and of vLLM's own layers; with a dense drafter, for others round their inputs to 8 bits."""
    model, tokens = engine.drafter.model, prompts(1, 150)[0]
    own = model.forward
    assert isinstance(own, DrafterForward)
    ours = scores(engine, tokens)
    del model.forward  # vLLM's is the class's
    try:
        return ours, scores(engine, tokens)
    finally:
        model.forward = own


def own_calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the decoder, from now on."""
    calls: list[int] = []
    run = DrafterForward.__call__

    def noted(self: DrafterForward, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(input_ids))
        return run(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(DrafterForward, "__call__", noted)
    return calls


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-4), ("bfloat16", 6e-2)])
def test_it_computes_what_vllm_computes(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, near: float
) -> None:
    model = saved(name, tmp_path / name)
    engine = engines(**llm_arguments(model, {"drafter": "dense"}) | {"model": model, "dtype": dtype})
    ours, theirs = both(engine)
    assert theirs.std() > 0.5  # it is not near because it is flat
    assert (ours - theirs).abs().max() < near * theirs.abs().max()

    calls = own_calls(engine, monkeypatch)
    engine.generate(prompts(3), 24)
    assert set(calls) <= {1, 2, 3} and len(calls) > 4  # what drafts is the decoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_around_attention_change_no_bit(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    calls: list[tuple[int, int]] = []
    run = LayersAroundAttention.__call__
    monkeypatch.setattr(LayersAroundAttention, "__call__", lambda *a: (calls.append(a[1:]), run(*a))[1])
    engine = engines(**llm_arguments(POLICY, {"drafter": "nf4"}) | {"dtype": dtype})
    calls.clear()
    tokens = prompts(1, 150)[0]
    around = scores(engine, tokens)
    assert set(calls) == {(0, len(engine.drafter.model.model.layers))}
    monkeypatch.setattr(Decoder, "_layers", lambda *a: partial(Decoder._one_by_one, *a))
    assert torch.equal(scores(engine, tokens), around)


def test_it_follows_an_update(engines: Engines, tmp_path: Path) -> None:
    engine = engines(**llm_arguments(POLICY, {"drafter": "dense"}))
    before, _ = both(engine)
    folder = perturbed(POLICY, tmp_path / "new", 0.3)
    weights = load_file(f"{folder}/model.safetensors")
    for name in weights:
        if "norm" in name:
            weights[name] *= 1.25
    engine.llm.collective_rpc("rollout_spec_begin_update")
    engine.llm.collective_rpc("rollout_spec_load", args=(list(weights.items()),))
    engine.llm.collective_rpc("rollout_spec_finish_update", args=(1,))
    ours, theirs = both(engine)
    assert (ours - before).abs().max() > 1
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


class Qwen3ForCausalLM:
    """Named like a model that the decoder knows."""

    def __init__(self) -> None:
        layer = SimpleNamespace(
            self_attn=SimpleNamespace(attn=None, qkv_proj=None, o_proj=None),
            mlp=SimpleNamespace(gate_up_proj=None, down_proj=None),
        )
        self.model = SimpleNamespace(layers=[layer])

    def forward(self) -> None:
        """vLLM's."""


class TransformersForCausalLM(Qwen3ForCausalLM):
    """What vLLM runs by transformers' code."""


def config_with(dtype: torch.dtype = torch.float32, ranks: int = 1, **changes: Any) -> Any:
    text = Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"])
    for field, value in changes.items():
        setattr(text, field, value)
    model = SimpleNamespace(hf_text_config=text, dtype=dtype, max_model_len=64)
    parallel = SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1)
    return SimpleNamespace(model_config=model, parallel_config=parallel)


@pytest.mark.parametrize(
    ("model", "config", "own"),
    [
        (Qwen3ForCausalLM(), config_with(), True),
        (TransformersForCausalLM(), config_with(), False),
        (Qwen3ForCausalLM(), config_with(dtype=torch.float16), False),
        (Qwen3ForCausalLM(), config_with(ranks=2), False),
        (Qwen3ForCausalLM(), config_with(hidden_act="gelu"), False),
    ],
)
def test_where_the_decoder_is_used(model: Any, config: Any, own: bool) -> None:
    use_decoder(model, config)
    assert isinstance(model.forward, DrafterForward) == own


def test_without_kernels_there_is_nothing_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels() is not None
    monkeypatch.setattr(drafter_forward, "kernels", lambda: None)
    model = Qwen3ForCausalLM()
    use_decoder(model, config_with())
    assert not isinstance(model.forward, DrafterForward)
