"""Quantization methods for vLLM: `rollout_spec_nf4`, `_int8`, `_int4`, and `_dense` as the control.

A checkpoint of full-precision weights goes in; each linear is quantized by this project's own quantizers when it has
been loaded, and again whenever weights are reloaded.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rollout_spec.drafters.quantize import QUANTIZERS
from rollout_spec.integrations.vllm.options import QUANTIZATION_PREFIX, options_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


def register(vllm_quantization: ModuleType) -> None:
    """Add a method per kind to the module `vllm.model_executor.layers.quantization`."""
    for kind in QUANTIZERS:
        vllm_quantization.register_quantization_config(QUANTIZATION_PREFIX + kind)(_config_class(kind))


def _config_class(kind: str) -> type:
    # Nothing but this may be imported here: vLLM may be in the middle of importing its layers.
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class SelfQuantization(QuantizationConfig):
        """vLLM's view of one kind of quantized linear."""

        @classmethod
        def get_name(cls) -> Any:
            return QUANTIZATION_PREFIX + kind

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0  # the quantizers try their kernels on the device and say what is missing

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> SelfQuantization:
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
            from rollout_spec.integrations.vllm import quantized_layers

            return quantized_layers.method_for(kind, layer, prefix, _quantizes_lm_head())

    SelfQuantization.__name__ = f"SelfQuantization_{kind}"
    return SelfQuantization


def _quantizes_lm_head() -> bool:
    from vllm.config import get_current_vllm_config

    options = options_of(get_current_vllm_config())
    return options is None or options.quantize_lm_head
