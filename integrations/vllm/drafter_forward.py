"""The drafter's forward on a CPU, eagerly: this project's decoder, over vLLM's weights and vLLM's attention.

Uncompiled, vLLM spends as long between the products of a layer with one row as in them. The target keeps vLLM's
forward: what is emitted follows from it.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor

from rollout_spec.contracts import UnsupportedModel
from rollout_spec.kernels.library import kernels
from rollout_spec.models.decoder import Decoder, DecoderWeights, LayerWeights
from rollout_spec.models.linear import Linear
from rollout_spec.models.rope import RotaryTable
from rollout_spec.models.spec import ModelSpec

logger = logging.getLogger("rollout_spec")


def use_decoder(model: Any, vllm_config: Any) -> None:
    """Let `model`, vLLM's of a drafter with quantized linears on an eager CPU, compute as a `DrafterForward`.

    It stays as it is where there are no kernels to gain by, on several ranks, and if `Decoder` does not know the model.
    """
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    if kernels() is None or config.dtype not in (torch.float32, torch.bfloat16):
        return
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        return
    try:
        spec = ModelSpec.from_hf_config(config.hf_text_config)
    except UnsupportedModel as reason:
        logger.info("the drafter computes by vLLM's own layers: %s", reason)
        return
    if type(model).__name__ == spec.architecture:  # else vLLM runs transformers' code
        model.forward = DrafterForward(model, spec, config.dtype, config.max_model_len)


class DrafterForward:
    """`forward` of vLLM's `model`: hidden states [R, H] of R tokens, whatever their sequences.

    Args:
        model: A `LlamaForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM` of vLLM.
        spec: What it computes.
        dtype: Of its activations.
        positions: How many there are.
    """

    def __init__(self, model: Any, spec: ModelSpec, dtype: torch.dtype, positions: int) -> None:
        self._model, self._spec = model, spec
        self._rope = RotaryTable(spec, "cpu", dtype, positions)
        layers = model.model.layers
        self._attention = [layer.self_attn.attn for layer in layers]
        self._linears = [
            [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
            for layer in layers
        ]
        self._made_of: list[Any] = []

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """As vLLM's models: token ids and positions [R], inside a forward context."""
        assert intermediate_tensors is None and inputs_embeds is None  # of several ranks, and of images
        made_of = [linear.quantized for layer in self._linears for linear in layer]
        if made_of != self._made_of:  # a weight update quantizes every one of them anew
            self._decoder, self._made_of = Decoder(self._spec, self._weights(), self._rope), made_of
        return self._decoder.hidden(input_ids, positions, self._attend)

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = self._attention[index].forward(q, k, v)
        return attended

    def _weights(self) -> DecoderWeights:
        model = self._model.model
        layers = []
        for layer, linears in zip(model.layers, self._linears, strict=True):
            qkv, o, gate_up, down = map(_linear, linears)
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            layers.append(
                LayerWeights(norms[0], qkv, self._qk_norm(layer.self_attn), o, norms[1], gate_up, down)
            )
        head = cast(Linear, self._model.lm_head)  # not asked: vLLM computes the logits
        return DecoderWeights(model.embed_tokens.weight, tuple(layers), model.norm.weight, head)

    def _qk_norm(self, attention: Any) -> Tensor | None:
        if not self._spec.qk_norm:
            return None
        q, k = attention.q_norm.weight, attention.k_norm.weight
        return torch.cat((q.expand(self._spec.num_heads, -1), k.expand(self._spec.num_kv_heads, -1)))


class _Biased:
    """A quantized linear whose bias vLLM holds; see `models.linear.Linear`."""

    row_invariant, min_rows = False, 1  # which nobody asks of a drafter

    def __init__(self, multiply: Linear, bias: Tensor) -> None:
        self._multiply, self._bias = multiply, bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x).add_(self._bias)

    def dense(self) -> Tensor:
        return self._multiply.dense()

    def for_kernels(self) -> None:
        """None adds a bias to such a product."""


def _linear(layer: Any) -> Linear:
    """What a linear layer of vLLM multiplies with, and adds."""
    multiply: Linear = layer.quantized
    return multiply if layer.bias is None else _Biased(multiply, layer.bias)
