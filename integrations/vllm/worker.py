"""What the plugin adds to vLLM's worker: new weights for target and drafter together, the canary, plain passes.

`worker_extension_cls="rollout_spec.integrations.vllm.worker.WorkerExtension"` mixes it in. Its methods run in every
worker process, through `collective_rpc`; with tensor parallelism each rank sees the same tensors and the same logits,
and so comes to the same decisions.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rollout_spec.config import SpeculationConfig
from rollout_spec.contracts import WeightError, invalid
from rollout_spec.drafters.guard import DrafterGuard
from rollout_spec.integrations.vllm import compat_worker as compat
from rollout_spec.integrations.vllm.hidden_states import Callback, capture
from rollout_spec.integrations.vllm.metrics import set_aside, set_versions
from rollout_spec.integrations.vllm.options import is_self_drafter, options_of
from rollout_spec.integrations.vllm.weights import read_shared_file


@dataclass
class StampedDrafter:
    """vLLM's drafter, with the policy version it was made from."""

    name: str
    version: int


@dataclass
class WorkerPolicy:
    """The policy in one worker: which version is in force, and whether its drafter may be used.

    Attributes:
        version: Policy version of the target.
        whole: False while an update is under way, or after it failed: no policy is in force then.
        drafter: The drafter, None without one. A drafter that is not a copy of the policy keeps its version; only
            its acceptance is judged.
        follows: Whether the drafter is a copy of the policy, which every update makes anew.
        decisions: What the scheduler had decided when it told last: see `PolicyScheduler.figures`. It tells when the
            policy looks, and now and then while it rests.
        quantize_seconds: What the drafter's part of the update under way has taken.
        canary_due: Whether the canary waits for the KV cache to wake.
    """

    version: int
    drafter: StampedDrafter | None
    follows: bool
    guard: DrafterGuard
    whole: bool = True
    decisions: dict[str, Any] = field(default_factory=dict)
    quantize_seconds: float = 0.0
    loading: list[nn.Module] = field(default_factory=list)
    canary_due: bool = False

    @property
    def drafts(self) -> bool:
        """Whether the drafter may be used now."""
        version = self.version if self.follows or self.drafter is None else self.drafter.version
        return self.whole and self.guard.usable(self.drafter, version)


class WorkerExtension:
    """Methods of every worker; a mixin, so all of it lives under names of its own."""

    model_runner: Any
    vllm_config: Any
    rollout_spec_cache_asleep = False

    def rollout_spec_start(self, version: int) -> None:
        """Stamp the loaded policy, and the drafter made from it, with a version."""
        config = self.vllm_config
        speculative = config.speculative_config
        follows = is_self_drafter(config)
        drafter = None
        if speculative is not None:
            name = speculative.quantization if follows else speculative.method
            drafter = StampedDrafter(name.removeprefix("rollout_spec_"), version)
        guard = DrafterGuard(options_of(config) or SpeculationConfig())
        policy = WorkerPolicy(version, drafter, follows, guard)
        compat.attach_policy(self.model_runner, policy)
        if drafter is not None:
            compat.watch_drafting(
                self.model_runner,
                lambda: policy.drafts,
                self._rollout_spec_failed,
                lambda figures: setattr(policy, "decisions", figures),
            )
        self._rollout_spec_publish()

    def rollout_spec_state(self) -> dict[str, Any]:
        """Versions, the guard's reports, the canary's finding and the scheduler's decisions, as plain values.

        `canary_due` says that the last update came while the KV cache slept: the canary runs when it wakes.
        Of `decisions` there is nothing before the first step after the first call, and nothing without a drafter.
        """
        policy = self._rollout_spec_policy()
        drafter = policy.drafter
        reports = [asdict(report) for report in policy.guard.reports]
        broken = getattr(compat.drafter_of(self.model_runner), "set_aside", None)
        if broken is not None:
            message = (
                f"the self-drafter is set aside: {broken}; decoding plainly until the next weight update"
            )
            cause = "raised" if broken.startswith("it raised") else "nan"
            reports.append({"cause": cause, "message": message, "version": policy.version})
        return {
            "version": policy.version,
            "whole": policy.whole,
            "drafter": None if drafter is None else drafter.name,
            "drafter_version": None if drafter is None else drafter.version,
            "drafts": policy.drafts and broken is None,
            "reports": reports,
            "decisions": policy.decisions,
            "canary_acceptance": policy.guard.canary_acceptance,
            "canary_due": policy.canary_due,
        }

    def rollout_spec_capture(self, function: str) -> None:
        """Give `module:function`, importable here, the hidden states of every step: see `hidden_states.capture`.

        Raises:
            InvalidRequest: There is no such function, or the runner is vLLM's V2.
        """
        module, _, name = function.partition(":")
        try:
            callback: Callback = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise invalid("function", function, "give module:function, importable in the workers") from error
        capture(callback)

    # --- new weights -----------------------------------------------------------------------------------

    def rollout_spec_begin_update(self) -> None:
        """Take the models apart for new weights. Nothing may be computed before `rollout_spec_finish_update`."""
        policy = self._rollout_spec_policy()
        policy.whole, policy.quantize_seconds = False, 0.0
        policy.loading = [model for model, _ in self._rollout_spec_models()]
        for model in policy.loading:
            compat.begin_reload(model)

    def rollout_spec_load(self, chunk: str | list[tuple[str, Tensor]]) -> None:
        """Load some tensors, by their Hugging Face names, into target and drafter: given, or in a shared file."""
        policy = self._rollout_spec_policy()
        tensors = read_shared_file(chunk) if isinstance(chunk, str) else chunk
        with compat.current_config(self.vllm_config):
            for place, model in enumerate(policy.loading):
                before = time.perf_counter()
                model.load_weights(iter(tensors))  # type: ignore[operator]
                policy.quantize_seconds += (time.perf_counter() - before) * (place > 0)

    def rollout_spec_finish_update(
        self, version: int, contexts: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any]:
        """Put what was loaded in force under `version`, and run the canary, or note that it waits for the KV cache,
        which must be empty.

        Raises:
            WeightError: Weights are missing; nothing is in force until a complete update succeeds.
        """
        policy = self._rollout_spec_policy()
        missing = [name for model in policy.loading for name in compat.incomplete_layers(model)]
        if missing:
            raise WeightError(
                f"weights: incomplete in {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; "
                "send every tensor of the policy"
            )
        with compat.current_config(self.vllm_config):
            for model, model_config in self._rollout_spec_models():
                if not any(model is loaded for loaded in policy.loading):
                    continue
                before = time.perf_counter()
                compat.finish_reload(model, model_config)
                if model is not self.model_runner.get_model():
                    policy.quantize_seconds += time.perf_counter() - before
                    assert policy.drafter is not None
                    policy.drafter.version = version
        self.model_runner.reset_lora_state()
        policy.version, policy.whole, policy.loading = version, True, []
        self._rollout_spec_judge(contexts)
        self._rollout_spec_publish()
        return {"quantize_seconds": policy.quantize_seconds} | self.rollout_spec_state()

    def rollout_spec_cache_woke(self) -> None:
        """The KV cache has memory, and nothing in it that is needed: run the canary that waits for it, if one does."""
        policy = compat.attached_policy(self.model_runner)
        if policy is not None and policy.canary_due:
            self._rollout_spec_judge(())
            self._rollout_spec_publish()

    def rollout_spec_abandon_update(self) -> None:
        """Put the models together again after a failed update; their weights are a mixture and of no version."""
        policy = self._rollout_spec_policy()
        with compat.current_config(self.vllm_config):
            for model, model_config in self._rollout_spec_models():
                if any(model is loaded for loaded in policy.loading):
                    compat.abandon_reload(model, model_config)
        policy.loading = []

    # --- passes from outside ---------------------------------------------------------------------------

    def rollout_spec_score(
        self, token_ids: Sequence[int], drafter: bool = False
    ) -> tuple[int, int, bytes] | None:
        """T, V and the float32 logits `[T, V]` after each of `token_ids [T]`, from a plain pass of target or drafter.

        The pass takes blocks of the KV cache that nobody may be using: pause, and reset the prefix cache before
        and after. None where the model's cache has several kinds of layers.
        """
        logits = self._rollout_spec_logits(list(token_ids), drafter)
        return None if logits is None else (*logits.shape, logits.cpu().numpy().tobytes())  # type: ignore[return-value]

    @torch.inference_mode()
    def _rollout_spec_logits(self, tokens: list[int], drafter: bool) -> Tensor | None:
        model = self.model_runner.get_draft_model() if drafter else self.model_runner.get_model()
        logits = compat.plain_pass(self.model_runner, self.vllm_config, model, tokens)
        return None if logits is None else logits.float()

    def _rollout_spec_failed(self, error: Exception) -> None:
        policy = self._rollout_spec_policy()
        assert policy.drafter is not None
        policy.guard.failed(policy.drafter, error)
        self._rollout_spec_publish()

    def _rollout_spec_publish(self) -> None:
        """Let Prometheus know."""
        policy = self._rollout_spec_policy()
        drafter = policy.drafter
        set_versions(self.vllm_config, policy.version, None if drafter is None else drafter.version)
        set_aside(self.vllm_config, "worker", drafter is not None and not policy.drafts)

    def _rollout_spec_judge(self, contexts: Sequence[Sequence[int]]) -> None:
        policy = self._rollout_spec_policy()
        if policy.drafter is None:
            return
        for tokens in contexts:
            policy.guard.remember(np.asarray(tokens))
        version = policy.version if policy.follows else policy.drafter.version
        drafter = compat.drafter_of(self.model_runner)
        if drafter is not None and hasattr(
            drafter, "revive"
        ):  # a self-drafter that had failed has new weights
            drafter.revive()
        policy.canary_due = self.rollout_spec_cache_asleep
        policy.guard.after_update(policy.drafter, version, self._rollout_spec_compare)

    def _rollout_spec_compare(self, context: np.ndarray) -> tuple[Tensor, Tensor] | None:
        if self.rollout_spec_cache_asleep or not self.vllm_config.speculative_config.uses_draft_model():
            return None
        target, draft = (self._rollout_spec_logits(context.tolist(), drafter) for drafter in (False, True))
        return None if target is None or draft is None else (target, draft)

    def _rollout_spec_models(self) -> Iterator[tuple[nn.Module, Any]]:
        """The target and, where it is a copy of the policy, the drafter, each with its model configuration."""
        yield self.model_runner.get_model(), self.vllm_config.model_config
        if is_self_drafter(self.vllm_config):
            yield (
                self.model_runner.get_draft_model(),
                self.vllm_config.speculative_config.draft_model_config,
            )

    def _rollout_spec_policy(self) -> WorkerPolicy:
        policy: WorkerPolicy | None = compat.attached_policy(self.model_runner)
        if policy is None:
            self.rollout_spec_start(0)
            policy = compat.attached_policy(self.model_runner)
            assert policy is not None
        return policy
