"""How a user configures the plugin: through vLLM's own arguments, nothing else.

`additional_config={"rollout_spec": {...}}` switches it on; the mapping holds fields of `SpeculationConfig`. Without
it every part of the plugin is inert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollout_spec.config import EngineConfig, SpeculationConfig
from rollout_spec.contracts import invalid

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "rollout_spec"
QUANTIZATION_PREFIX = (
    "rollout_spec_"  # of the quantization methods the plugin registers, e.g. rollout_spec_nf4
)

DRAFT_PREFIX = "draft_model."  # vLLM's, of the names of a draft model's layers


def options_of(vllm_config: VllmConfig) -> SpeculationConfig | None:
    """The plugin's options, or None where it is not configured.

    Raises:
        InvalidRequest: An unknown option, or a value out of range; the message names it.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    given = additional[KEY]
    if not isinstance(given, dict):
        raise invalid(f"additional_config[{KEY!r}]", given, 'give a mapping, such as {"drafter": "nf4"}')
    return EngineConfig.from_dict({"speculation": given}).speculation


def is_self_drafter(vllm_config: VllmConfig) -> bool:
    """Whether the drafter is a quantized copy of the target, made by this plugin."""
    speculative: Any = vllm_config.speculative_config
    quantization = getattr(speculative, "quantization", None)
    return isinstance(quantization, str) and quantization.startswith(QUANTIZATION_PREFIX)
