"""verl's own vLLM rollout with the vLLM plugin inside: arguments, sleep, versions and counts of verl's vLLM server.

A run asks for it with `actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rollout_spec={drafter: nf4}`. In
every other run these touches change nothing. What they mend in verl 0.9.1: a drafter of its own keeps `load_format=dummy`,
level 2 of sleep discards its weights for good, no update reaches a drafter (see `vllm_worker`), and nothing is counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from types import ModuleType
from typing import Any

from rollout_spec.contracts import invalid
from rollout_spec.integrations.verl.metrics import ServerFigures

KEY = "actor_rollout_ref.rollout.engine_kwargs.vllm"
PLUGIN = "rollout_spec"
WORKER_EXTENSION = "rollout_spec.integrations.verl.vllm_worker.VerlWorkerExtension"

_outputs: ContextVar[list[Any] | None] = ContextVar("rollout_spec_outputs", default=None)


def plugin_options(rollout: Any) -> Mapping[str, Any] | None:
    """The plugin's options in verl's `RolloutConfig`, or None where it is not asked for."""
    vllm = (rollout.get("engine_kwargs") or {}).get("vllm") or {}
    additional = vllm.get("additional_config") or {}
    return additional.get(PLUGIN) if isinstance(additional, Mapping) else None


def complete_arguments(engine_kwargs: dict[str, Any], model: str, model_config: Any) -> None:
    """Add what the plugin needs to verl's arguments of vLLM, in place.

    Args:
        engine_kwargs: `engine_kwargs.vllm` of the run, `additional_config.rollout_spec` among them. A
            `speculative_config` of the user's own is kept: the policy then works over vLLM's drafter.
        model: Path of the checkpoint.
        model_config: verl's `HFModelConfig`.

    Raises:
        InvalidRequest: An option of ours is unknown or wrong, or an argument contradicts the plugin.
        UnsupportedVllm: The installed vLLM is outside the supported range.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from rollout_spec.integrations.vllm.arguments import llm_arguments

    additional = dict(engine_kwargs["additional_config"])
    given = additional[PLUGIN]
    where = f"{KEY}.additional_config.{PLUGIN}"
    if not isinstance(given, Mapping):
        raise invalid(where, given, "give a mapping, such as {drafter: nf4}")
    try:
        arguments = llm_arguments(model, dict(given))
    except ValueError as error:
        raise type(error)(f"{where}.{error}") from error
    for name in ("scheduler_cls", "worker_extension_cls"):
        if engine_kwargs.get(name):
            raise invalid(f"{KEY}.{name}", engine_kwargs[name], "the plugin brings its own: leave it out")
    rank = max(model_config.lora_rank, (model_config.lora or {}).get("rank", 0))
    if rank > 0 and not (model_config.lora or {}).get("merge", False):
        remedy = "adapters would reach the policy and not its drafter: use True"
        raise invalid("actor_rollout_ref.model.lora.merge", False, remedy)
    own = engine_kwargs.get("speculative_config")
    if own is not None:
        if not isinstance(own, Mapping):
            raise invalid(f"{KEY}.speculative_config", own, "give a mapping, such as {method: ngram, ...}")
        arguments["speculative_config"] = _loaded_for_good(dict(own))
    engine_kwargs |= {
        "additional_config": additional | arguments["additional_config"],
        "scheduler_cls": arguments["scheduler_cls"],
    }
    if "speculative_config" in arguments:
        engine_kwargs["speculative_config"] = arguments["speculative_config"]
    if "per_request_spec_decode_metrics" in {field.name for field in fields(AsyncEngineArgs)}:
        engine_kwargs.setdefault("per_request_spec_decode_metrics", "summary")


def _loaded_for_good(speculative: dict[str, Any]) -> dict[str, Any]:
    """A drafter with a checkpoint of its own is read from it: verl's default `load_format=dummy` waits for a weight
    update, and none brings a drafter's weights."""
    if speculative.get("model") is not None:
        speculative.setdefault("draft_load_config", {"load_format": "auto"})
    return speculative


def touch(module: ModuleType) -> None:
    """Change verl's vLLM server, where a run asks for the plugin."""
    server = module.vLLMHttpServer
    preprocess, extension = server._preprocess_engine_kwargs, server._get_worker_extension_cls
    sleep_level, generate, set_version = (
        server._resolve_sleep_level,
        server.generate,
        server.set_global_steps,
    )

    @wraps(preprocess)
    def preprocess_engine_kwargs(self: Any, engine_kwargs: dict[str, Any]) -> None:
        preprocess(self, engine_kwargs)
        if plugin_options(self.config) is not None:
            complete_arguments(engine_kwargs, self.model_config.local_path, self.model_config)

    @wraps(extension)
    def get_worker_extension_cls(self: Any) -> str:
        return extension(self) if plugin_options(self.config) is None else WORKER_EXTENSION

    @wraps(sleep_level)
    def resolve_sleep_level(self: Any) -> int:
        """An update restores the policy and a copy of it; another drafter's weights have to survive the sleep."""
        own = plugin_options(self.config) is not None and _speculative(self.config) is not None
        return 1 if own else int(sleep_level(self))

    @wraps(generate)
    async def generate_and_count(self: Any, *args: Any, **named: Any) -> Any:
        if plugin_options(self.config) is None:
            return await generate(self, *args, **named)
        seen: list[Any] = []
        token = _outputs.set(seen)
        try:
            answer = await generate(self, *args, **named)
        finally:
            _outputs.reset(token)
        version, count = answer.extra_fields["global_steps"], len(answer.token_ids)
        answer.extra_fields["version_spans"] = [(0, count, version)] if count else []
        answer.extra_fields.update(counts_of(seen, count))
        return answer

    @wraps(set_version)
    async def set_global_steps(self: Any, global_steps: int) -> None:
        await set_version(self, global_steps)
        if plugin_options(self.config) is not None:
            await self.engine.collective_rpc("rollout_spec_stamp", args=(global_steps,))

    async def rollout_spec_figures(self: Any) -> ServerFigures:
        """What the metrics need of this server."""
        (state, *_) = await self.engine.collective_rpc("rollout_spec_state")
        watch = self.engine.rollout_spec_watch
        aside = bool(state["reports"]) or state["decisions"].get("set_aside") is not None
        return ServerFigures(
            watch.drafted, watch.accepted, watch.generated, aside, state["update_seconds"], None
        )

    server._preprocess_engine_kwargs = preprocess_engine_kwargs
    server._get_worker_extension_cls = get_worker_extension_cls
    server._resolve_sleep_level = resolve_sleep_level
    server.generate = generate_and_count
    server.set_global_steps = set_global_steps
    server.rollout_spec_figures = rollout_spec_figures
    module.AsyncLLM = watched(module.AsyncLLM)  # type: ignore[attr-defined]


def _speculative(rollout: Any) -> Any:
    return ((rollout.get("engine_kwargs") or {}).get("vllm") or {}).get("speculative_config")


def counts_of(outputs: list[Any], tokens: int) -> dict[str, int]:
    """verl's fields of an answer from vLLM's outputs of its request; all 0 for one that was interrupted.

    vLLM tells what was drafted for a request when it ends by itself.
    """
    found = [
        output.outputs[0].spec_decode_metrics
        for output in outputs
        if output.outputs and getattr(output.outputs[0], "spec_decode_metrics", None) is not None
    ]
    drafted = accepted = verified = 0
    if found:
        histogram = found[-1].histogram
        drafted, verified = found[-1].num_draft_tokens, sum(histogram)
        accepted = sum(length * count for length, count in enumerate(histogram))
    return {
        "spec_num_draft_tokens": drafted,
        "spec_num_accepted_tokens": accepted,
        "spec_num_verify_steps": verified,
        "spec_num_plain_steps": max(0, tokens - accepted - verified),
    }


def watched(engine: type) -> type:
    """verl's name for `AsyncLLM`: one that keeps the scheduler's totals, and each answer's last output."""
    from rollout_spec.integrations.vllm.options import options_of
    from rollout_spec.vllm_backend.watch import Watch

    class WatchedAsyncLLM(engine):  # type: ignore[misc,valid-type]
        """vLLM's engine; what it reports stays as it is."""

        rollout_spec_watch: Watch

        @classmethod
        def from_vllm_config(cls, vllm_config: Any, *args: Any, **options: Any) -> Any:
            if options_of(vllm_config) is None:
                return super().from_vllm_config(vllm_config, *args, **options)
            watch = Watch()
            options["stat_loggers"] = [*(options.get("stat_loggers") or ()), watch.logger]
            made = super().from_vllm_config(vllm_config, *args, **options)
            made.rollout_spec_watch = watch
            return made

        async def generate(self, *args: Any, **named: Any) -> AsyncIterator[Any]:
            seen = _outputs.get()
            async for output in super().generate(*args, **named):
                if seen is not None:
                    seen[:] = [output]
                yield output

    return WatchedAsyncLLM
