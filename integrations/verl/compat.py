"""Every touch of verl: which release it fits, what is registered or replaced in this process, and why.

A touch waits until verl itself imports the module it changes. `install` is idempotent, and runs of verl with another
rollout behave as if it had not run.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.integrations.after_import import after_import

NAME = "rollout_spec"
"""`actor_rollout_ref.rollout.name` of this backend."""
SUPPORTED = SpecifierSet("==0.9.1")
PLUGIN = "rollout_spec.integrations.verl.plugin"


class UnsupportedVerl(RolloutSpecError, RuntimeError):
    """No verl is installed, or one whose internals this plugin was not written for."""


def check_version() -> str:
    """The installed verl's version; UnsupportedVerl, naming the supported range, if it is outside of it."""
    try:
        found = version("verl")
    except PackageNotFoundError as error:
        raise UnsupportedVerl(f"no verl is installed; rollout.name={NAME} needs verl{SUPPORTED}") from error
    if not SUPPORTED.contains(found, prereleases=True):
        raise UnsupportedVerl(
            f"verl=={found}: rollout.name={NAME} supports verl{SUPPORTED}; install that version, or use another rollout"
        )
    return found


def install() -> None:
    """Make this process's touches, now or when verl imports what they change."""
    after_import("verl.workers.rollout.base", register_rollout)
    after_import("verl.workers.rollout.replica", register_replica)
    after_import("verl.workers.rollout.llm_server", keep_extra_fields)
    after_import("verl.trainer.ppo.v1.trainer_base", log_speculation)
    after_import("verl.workers.rollout.vllm_rollout.vllm_async_server", plug_into_vllm)
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from rollout_spec.integrations.verl import compat_cpu

        compat_cpu.install()


def register_rollout(module: ModuleType) -> None:
    """Enter the adapter in verl's registry of rollouts, for which 0.9.1 has a dictionary and no function."""
    module._ROLLOUT_REGISTRY[(NAME, "async")] = f"{PLUGIN}.Rollout"


def register_replica(module: ModuleType) -> None:
    """Enter the replica, verl's public way."""

    def load() -> type:
        from rollout_spec.integrations.verl import plugin

        return plugin.Replica  # type: ignore[no-any-return]

    module.RolloutReplicaRegistry.register(NAME, load)


_attempts: ContextVar[list[Any] | None] = ContextVar("rollout_spec_attempts", default=None)


def keep_extra_fields(module: ModuleType) -> None:
    """Let versions and counts of an answer reach the trainer when a weight update interrupted it.

    verl's client for asynchronous training resubmits an interrupted answer with what it has, joins the parts, and
    forgets their `extra_fields` but for the first and last policy version.
    """
    from rollout_spec.integrations.verl.conversions import join_extra_fields

    once, until_done = module.LLMServerClient.generate, module.FullyAsyncLLMServerClient.generate

    @wraps(once)
    async def generate_once(self: Any, request_id: str, **arguments: Any) -> Any:
        output = await once(self, request_id, **arguments)
        attempts = _attempts.get()
        if attempts is not None:
            attempts.append(output)
        return output

    @wraps(until_done)
    async def generate(self: Any, request_id: str, **arguments: Any) -> Any:
        if not counts(self.config):
            return await until_done(self, request_id, **arguments)
        attempts: list[Any] = []
        token = _attempts.set(attempts)
        try:
            output = await until_done(self, request_id, **arguments)
        finally:
            _attempts.reset(token)
        output.extra_fields.update(join_extra_fields(attempts))
        return output

    module.LLMServerClient.generate = generate_once
    module.FullyAsyncLLMServerClient.generate = generate


def log_speculation(module: ModuleType) -> None:
    """Put `rollout/spec_*` among the metrics of each step.

    verl reads the counts that a rollout reports only where the model has MTP layers and drafts with them.
    """
    from rollout_spec.integrations.verl import metrics

    compute = module.PPOTrainer._compute_metrics

    @wraps(compute)
    def compute_metrics(self: Any, batch: Any, step_metrics: dict[str, Any], *rest: Any, **named: Any) -> Any:
        result = compute(self, batch, step_metrics, *rest, **named)
        if counts(self.config):
            step_metrics.update(metrics.of_batch(batch, module.tq))
            step_metrics.update(metrics.of_engines(self))
        return result

    module.PPOTrainer._compute_metrics = compute_metrics


def plug_into_vllm(module: ModuleType) -> None:
    """Bring the vLLM plugin into verl's own vLLM server, in runs that ask for it."""
    from rollout_spec.integrations.verl import vllm_server

    vllm_server.touch(module)


def counts(config: Any) -> bool:
    """Whether a run's answers carry our counts and versions; `config` is verl's whole configuration."""
    from rollout_spec.integrations.verl.vllm_server import plugin_options

    rollout = config.actor_rollout_ref.rollout
    return rollout.name == NAME or (rollout.name == "vllm" and plugin_options(rollout) is not None)
