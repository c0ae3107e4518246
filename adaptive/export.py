"""A trained drafter as a folder that vLLM loads: its own names, its own config.

`vllm` is the plain layout of `eagle` and `eagle3` heads: give the folder as `speculative_config={"method": kind,
"model": folder, "num_speculative_tokens": K}`. `speculators` is that project's layout, which names the target as
well and is served by its own path. Tensors are the same in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.models.spec import RopeSpec

Layout = Literal["vllm", "speculators"]
LAYOUTS: tuple[Layout, ...] = ("vllm", "speculators")


def export(
    spec: EagleSpec,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    layout: Layout = "vllm",
    dtype: torch.dtype = torch.bfloat16,
    target: str = "",
    draft_length: int = 5,
) -> Path:
    """Write `config.json` and `model.safetensors`.

    Args:
        spec: Of the drafter.
        weights: A module's state dict: `EagleSpec.parameter_shapes`, and `d2t` with a head of its own.
        folder: Made if need be.
        layout: `vllm` or `speculators`; the latter has no `eagle`.
        dtype: Of the tensors; the target's is best.
        target: `speculators` only: name or path of the target.
        draft_length: `speculators` only: draft tokens it proposes by default.

    Raises:
        InvalidRequest: The layout cannot hold this drafter.
    """
    if layout not in LAYOUTS:
        raise invalid("layout", layout, f"use one of {', '.join(LAYOUTS)}")
    if layout == "speculators" and spec.kind == "eagle":
        raise invalid("layout", layout, "holds kind 'eagle3' only; use layout 'vllm'")
    if layout == "speculators" and not target:
        raise invalid("target", target, "layout 'speculators' names the target; give its name or path")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in spec.parameter_shapes()}
    if spec.own_head:
        d2t = weights["d2t"].cpu()
        t2d = torch.zeros(spec.vocab_size, dtype=torch.bool)
        t2d[d2t + torch.arange(len(d2t))] = True
        tensors |= {"d2t": d2t.contiguous(), "t2d": t2d}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config = (
        _vllm_config(spec, name)
        if layout == "vllm"
        else _speculators_config(spec, name, target, draft_length)
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _layer_config(spec: EagleSpec, dtype: str) -> dict[str, Any]:
    """A one-layer Llama of the drafter's sizes."""
    return {
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": _rope(spec.rope),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _vllm_config(spec: EagleSpec, dtype: str) -> dict[str, Any]:
    eagle3 = {
        "draft_vocab_size": spec.draft_vocab_size,
        "target_hidden_size": spec.hidden_size,
        "num_aux_hidden_states": len(spec.feature_layers),
        "eagle_aux_hidden_state_layer_ids": list(spec.feature_layers),
    }
    return {
        "architectures": ["LlamaForCausalLMEagle3" if spec.kind == "eagle3" else "LlamaForCausalLM"],
        **_layer_config(spec, dtype),
        **(eagle3 if spec.kind == "eagle3" else {}),
    }


def _speculators_config(spec: EagleSpec, dtype: str, target: str, draft_length: int) -> dict[str, Any]:
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": draft_length,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    # What vLLM reads only from the layer's config: the number of streams.
    layer = _layer_config(spec, dtype) | {"num_aux_hidden_states": len(spec.feature_layers)}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        "draft_vocab_size": spec.draft_vocab_size,
        "target_hidden_size": spec.hidden_size,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": list(spec.feature_layers),
        "transformer_layer_config": layer,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _rope(rope: RopeSpec) -> dict[str, Any]:
    """As transformers 5 writes it."""
    found: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type != "default":
        found["factor"] = rope.factor
    if rope.type in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = rope.original_max_positions
    if rope.type == "llama3":
        found |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        found |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    return found
