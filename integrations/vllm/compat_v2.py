"""The part of `compat` that touches vLLM's V2 model runner, its default on GPUs: docs/vllm-versions.md says what ran there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.hidden_states import shows_nothing
from rollout_spec.integrations.vllm.options import is_self_drafter, options_of
from rollout_spec.integrations.vllm.refusals import V1, refuse, refuse_coupled_v2


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
        if options_of(vllm_config) is not None:
            shows_nothing(runner)
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
        refuse_coupled_v2()
    speculator = getattr(module, "DraftModelSpeculator", None)
    takes = inspect.signature(speculator.propose).parameters if speculator is not None else {}
    if vllm_config.speculative_config is not None and "num_speculative_tokens" not in takes:
        raise invalid(
            "speculative_config",
            vllm_config.speculative_config.method,
            f"the V2 model runner of this vLLM drafts at one length only; install vllm>=0.32, or {V1}",
        )


def watch_proposing(
    runner: Any,
    allowed: Callable[[], bool],
    failed: Callable[[Exception], None],
    told: Callable[[dict[str, Any]], None],
) -> None:
    """What `compat_worker.watch_drafting` is for the V1 runner.

    This runner has promised the scheduler its drafts before it asks for them, so where nothing may be drafted it gets
    guesses. vLLM's own speculators run their models at `K = 0` too, and are not asked then either. Those without a
    model (n-grams) have nothing that could be stale or fail, and are asked as ever.
    """
    speculator = runner.speculator
    if getattr(speculator.propose, "rollout_spec", False):
        return
    execute, propose = runner.execute_model, speculator.propose
    guesses = hasattr(speculator, "draft_logits")
    # Ranks that part would wait for each other.
    alone = runner.vllm_config.parallel_config.tensor_parallel_size == 1

    @functools.wraps(execute)
    def listening(scheduler_output: Any, *args: Any, **options: Any) -> Any:
        figures = getattr(scheduler_output, "rollout_spec", None)
        if figures is not None:
            told(figures)
        return execute(scheduler_output, *args, **options)

    @functools.wraps(propose)
    def watched(input_batch: Any, *args: Any, **options: Any) -> Any:
        count = options.get("num_speculative_tokens")
        if not guesses or options.get("dummy_run"):
            return propose(input_batch, *args, **options)
        if allowed():
            try:
                return propose(input_batch, *args, **options)
            except Exception as error:
                if not alone:
                    raise
                failed(error)
        slots = input_batch.idx_mapping[: input_batch.num_reqs]
        return guess_blindly(speculator, slots, speculator.num_speculative_steps if count is None else count)

    watched.rollout_spec = True  # type: ignore[attr-defined]
    runner.execute_model, speculator.propose = listening, watched


def guess_blindly(speculator: Any, slots: Tensor, count: int) -> Tensor:
    """Drafts int64 [B, K_max] for the requests in `slots` [B], of which `count` columns are token 0.

    They come from a distribution that is certain of it, which is judged as exactly as any other.
    """
    drafts: Tensor = speculator.draft_tokens[: len(slots)]
    drafts[:, :count] = 0
    if speculator.draft_logits is not None:
        speculator.draft_logits[slots.long(), :count] = -torch.inf
        speculator.draft_logits[slots.long(), :count, 0] = 0.0
    return drafts
