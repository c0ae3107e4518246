"""How vLLM's layers hold and apply quantized weights.

A dense weight is loaded as always and, once it is complete, replaced by a `QuantizedLinear`; an empty parameter stays
in its place. After vLLM's layerwise reload the same happens again; on a GPU the new values go into the old tensors,
which captured graphs hold.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.utils.torch_utils import direct_register_custom_op

from rollout_spec.drafters.quantize import QuantizedLinear, Quantizer, get_quantizer
from rollout_spec.integrations.vllm.marlin import MarlinQuantizer

logger = logging.getLogger("rollout_spec")


def method_for(kind: str, layer: Any, prefix: str, quantize_lm_head: bool) -> QuantizeMethodBase | None:
    """What handles `layer`'s weights; None leaves it as vLLM has it."""
    if isinstance(layer, LinearBase):
        return QuantizedLinearMethod(kind, prefix)
    if isinstance(layer, ParallelLMHead):
        return QuantizedHeadMethod(kind, prefix) if quantize_lm_head else None
    if isinstance(layer, VocabParallelEmbedding):
        return EmbeddingMethod()
    return None


class QuantizedLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is quantized after loading."""

    def __init__(self, kind: str, prefix: str) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        _announce(layer, self.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        quantize(layer, self.kind, layer.weight)
        _release(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _apply(layer, self.prefix, x, bias)


class QuantizedHeadMethod(UnquantizedEmbeddingMethod):
    """An lm_head that is quantized after loading; a tied one whenever the embedding is loaded."""

    def __init__(self, kind: str, prefix: str) -> None:
        self.kind, self.prefix = kind, prefix

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        _announce(layer, self.prefix)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        embed_tokens.quant_method.tied_head = weakref.ref(layer)
        _release(layer)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight.numel():
            quantize(layer, self.kind, layer.weight)
            _release(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _apply(layer, self.prefix, x, bias)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """A dense embedding, which an lm_head may be tied to."""

    tied_head: weakref.ref[Any] | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        head = self.tied_head() if self.tied_head is not None else None
        if head is not None:
            quantize(head, head.quant_method.kind, layer.weight)


@functools.cache
def quantizer_for(kind: str, device: torch.device, dtype: torch.dtype) -> Quantizer:
    """`kind` as this project has it, but int4 on a GPU by vLLM's Marlin kernel, where that runs."""
    if kind == MarlinQuantizer.name and device.type == "cuda":
        reason = MarlinQuantizer().unavailable(device, dtype)
        if reason is None:
            return MarlinQuantizer()
        logger.warning("int4 linears run on PyTorch's kernel, slow from a few rows on; Marlin's %s", reason)
    return get_quantizer(kind, device, dtype)


def quantize(layer: Any, kind: str, weight: Tensor) -> None:
    """Give `layer` a quantized copy of `weight` [N, K], its shard under tensor parallelism."""
    made = quantizer_for(kind, weight.device, weight.dtype).quantize(weight.detach(), None)
    held: QuantizedLinear | None = getattr(layer, "quantized", None)
    if held is None or weight.device.type == "cpu":
        layer.quantized = made
        return
    for name, tensor in held.tensors().items():
        tensor.copy_(made.tensors()[name])


def _release(layer: Any) -> None:
    weight = layer.weight
    layer.weight = torch.nn.Parameter(
        torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False
    )


def _announce(layer: Any, prefix: str) -> None:
    """Let compiled code find the layer by name."""
    layer.out_features = len(layer.weight)
    get_current_vllm_config().compilation_config.static_forward_context[prefix] = layer


def _apply(layer: Any, prefix: str, x: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        y = torch.ops.vllm.rollout_spec_quantized_linear(x, prefix, layer.out_features)
    else:
        y = layer.quantized(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)
    return y if bias is None else y + bias


def _quantized_linear(x: Tensor, prefix: str, out_features: int) -> Tensor:
    layer = get_forward_context().no_compile_layers[prefix]
    y: Tensor = layer.quantized(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], out_features)


def _quantized_linear_fake(x: Tensor, prefix: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


direct_register_custom_op(
    op_name="rollout_spec_quantized_linear",
    op_func=_quantized_linear,
    fake_impl=_quantized_linear_fake,
)
