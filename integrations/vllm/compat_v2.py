"""The part of `compat` that touches vLLM's V2 model runner, its default on GPUs.

It was not run on a GPU: see docs/vllm-versions.md for what was.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.options import is_self_drafter, options_of
from rollout_spec.integrations.vllm.refusals import refuse

V1 = "set VLLM_USE_V2_MODEL_RUNNER=0 to run on the V1 runner"


def rebind_init_speculator(module: ModuleType) -> None:
    """Let the V2 runner make the self-drafter, and refuse at start what its plugin parts cannot do there.

    `module` is `vllm.v1.worker.gpu.model_runner`. The runner chooses its speculator in one function, which knows no
    classes from outside, and calls it under the name in its own module.
    """
    stock = module.init_speculator
    construct = module.GPUModelRunner.__init__

    def init_speculator(vllm_config: Any, device: Any, *states: Any) -> Any:
        if options_of(vllm_config) is None or not is_self_drafter(vllm_config):
            return stock(vllm_config, device, *states)
        from rollout_spec.integrations.vllm.self_drafter_v2 import SelfSpeculator

        refuse(vllm_config)
        return SelfSpeculator(vllm_config, device)

    @functools.wraps(construct)
    def construct_checked(runner: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        refuse_v2(vllm_config, module)
        construct(runner, vllm_config, *args, **options)

    module.init_speculator = init_speculator  # type: ignore[attr-defined]
    module.GPUModelRunner.__init__ = construct_checked


def refuse_v2(vllm_config: Any, module: ModuleType) -> None:
    """Refuse what works on the V1 runner only; nothing where the plugin is not configured.

    Raises:
        InvalidRequest: Coupled verification; or drafting in a release whose V2 runner does not hand K to the drafter
            (0.31), so that neither "off" nor a shorter K could be carried out.
    """
    options = options_of(vllm_config)
    if options is None:
        return
    if options.verifier == "coupled":
        raise invalid("verifier", "coupled", f"the V2 model runner samples by its own kernels; {V1}")
    speculator = getattr(module, "DraftModelSpeculator", None)
    takes = inspect.signature(speculator.propose).parameters if speculator is not None else {}
    if vllm_config.speculative_config is not None and "num_speculative_tokens" not in takes:
        raise invalid(
            "speculative_config",
            vllm_config.speculative_config.method,
            f"the V2 model runner of this vLLM drafts at one length only; install vllm>=0.32, or {V1}",
        )
