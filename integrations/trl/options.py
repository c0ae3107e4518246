"""What a GRPOTrainer asks of generation, as sampling parameters; what cannot be honoured is an error."""

from __future__ import annotations

from typing import Any

from rollout_spec.contracts import SamplingParams, invalid

_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_vllm": ((False,), "the engine generates in its place: use False"),
    "use_transformers_continuous_batching": ((False,), "the engine batches by itself: use False"),
    "use_transformers_paged": ((False, None), "the engine's cache is paged: leave it out"),
    "cache_implementation": ((None,), "the engine has a cache of its own: leave it out"),
    "load_best_model_at_end": (
        (False,),
        "weights would change without a step, unseen by the engine: use False, and load the checkpoint afterwards",
    ),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_trainer(trainer: Any) -> None:
    """Refuse what this rollout cannot serve, before anything is generated.

    Raises:
        InvalidRequest: Naming the setting and what to do.
    """
    for name, (allowed, remedy) in _HONOURED.items():
        value = getattr(trainer.args, name, None)
        if value not in allowed:
            raise invalid(name, value, remedy)
    if trainer.tools:
        names = [tool.__name__ for tool in trainer.tools]
        raise invalid("tools", names, "TRL would generate the turns after a tool call itself: leave them out")
    if trainer.environment_factories is not None:
        raise invalid(
            "environment_factory", "given", "only single-turn answers are generated here: leave it out"
        )
    if hasattr(trainer.processing_class, "image_processor"):
        raise invalid("processing_class", type(trainer.processing_class).__name__, "text models only")
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        raise invalid("peft_config", "given", "adapters are not merged here: train the full model")
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise invalid(
            "fsdp or deepspeed", "sharded", "every process needs whole weights: use DDP or ZeRO up to 2"
        )


def sampling_params(trainer: Any) -> SamplingParams:
    """How TRL's own generation would sample: its arguments, with `generation_kwargs` over them.

    Raises:
        InvalidRequest: A generation argument that the engine does not have.
    """
    args = trainer.args
    values = {name: getattr(args, name) for name in _SAMPLING}
    values["max_tokens"] = args.max_completion_length
    for name, value in (args.generation_kwargs or {}).items():
        if name == "max_new_tokens":
            values["max_tokens"] = value
        elif name in _SAMPLING:
            values[name] = value
        elif name != "do_sample":
            known = ", ".join(("do_sample", "max_new_tokens", *_SAMPLING))
            raise invalid(f"generation_kwargs.{name}", value, f"known here: {known}")
    if (args.generation_kwargs or {}).get("do_sample") is False:
        values |= {"temperature": 0.0}
    defaults = {"top_k": 0, "min_p": 0.0}
    values |= {name: default for name, default in defaults.items() if values[name] is None}
    return SamplingParams(**values, ignore_eos=True, stop_token_ids=tuple(trainer.eos_token_ids))
