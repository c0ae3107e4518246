"""How a user configures the rollout: verl's own fields, and ours under `rollout.engine_kwargs.rollout_spec`.

verl keeps a backend's own arguments in `actor_rollout_ref.rollout.engine_kwargs.<name>`; there ours take the fields of
`EngineConfig`, `speculation` included, but for those that verl has a field for. Whatever verl's fields ask for that this
backend does not do is an error at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import InvalidRequest, RolloutSpecError, invalid
from rollout_spec.integrations.verl.compat import NAME
from rollout_spec.integrations.verl.spot import SpotTraining

ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
KEY = f"{ROLLOUT}.engine_kwargs.{NAME}"

_VERLS_OWN = {
    "dtype": "set {0}.dtype",
    "seed": "set {0}.seed; each replica adds its rank",
    "max_model_len": "set {0}.max_model_len, or {0}.prompt_length and response_length",
    "max_num_seqs": "set {0}.max_num_seqs",
    "backend": "this is the torch backend; for vLLM use {0}.name=vllm and rollout-spec's vLLM plugin",
    "vllm": "this is the torch backend; for vLLM use {0}.name=vllm and rollout-spec's vLLM plugin",
}
_ONE_DEVICE = "an engine runs on one device: use 1, and more GPUs become more replicas"
_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_model_parallel_size": ((1,), _ONE_DEVICE),
    "data_parallel_size": ((1,), _ONE_DEVICE),
    "pipeline_model_parallel_size": ((1,), _ONE_DEVICE),
    "expert_parallel_size": ((1, None), _ONE_DEVICE),
    "quantization": ((None,), "the policy runs unquantized, only the drafter is quantized: leave it out"),
    "enable_rollout_routing_replay": ((False,), "there are no experts here: use False"),
    "cudagraph_capture_sizes": (
        (None,),
        f"graphs are planned from a budget: leave it out, set {KEY}.graph_bytes",
    ),
    "scheduling_policy": (("fcfs", None), "use fcfs"),
    "logprobs_mode": (("processed_logprobs", "raw_logprobs"), "use processed_logprobs or raw_logprobs"),
}


@dataclass(frozen=True)
class RolloutOptions:
    """What a server needs to know.

    Attributes:
        engine: The engine's configuration.
        path: Folder of the checkpoint.
        prompt_length, response_length: Limits in tokens; an answer without a limit of its own gets the rest of both.
        repetition_penalty, ignore_eos: For requests that do not say.
        raw_logprobs: Report logprobs of the full policy at T=1, not of the distribution sampled from.
        free_cache: Whether `sleep` frees memory for the trainer.
        bucket_bytes: Weights sent at a time.
        spot_training: How a drafter is trained in idle time; None: none is.
    """

    engine: EngineConfig
    path: str
    prompt_length: int
    response_length: int
    repetition_penalty: float
    ignore_eos: bool
    raw_logprobs: bool
    free_cache: bool
    bucket_bytes: int
    spot_training: SpotTraining | None = None


def read_options(config: Any, model_config: Any, replica_rank: int = 0) -> RolloutOptions:
    """The options of one replica, from verl's `RolloutConfig` and `HFModelConfig`.

    Raises:
        InvalidRequest: A field asks for what this backend does not do, or an option of ours is unknown or wrong.
        UnsupportedModel: The checkpoint is of a kind that this backend does not run.
    """
    _check_rollout(config)
    _check_model(model_config)
    given = _given(config)
    spot = _spot_training(given)
    return RolloutOptions(
        engine=_engine_config(config, given, replica_rank),
        path=model_config.local_path,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        repetition_penalty=config.repetition_penalty,
        ignore_eos=config.ignore_eos,
        raw_logprobs=config.logprobs_mode == "raw_logprobs",
        free_cache=config.free_cache_engine,
        bucket_bytes=config.checkpoint_engine.update_weights_bucket_megabytes << 20,
        spot_training=spot,
    )


def _given(config: Any) -> dict[str, Any]:
    """Our options, as the user wrote them."""
    given = _plain((_plain(config.engine_kwargs) or {}).get(NAME)) or {}
    if not isinstance(given, Mapping):
        raise invalid(KEY, given, "give a mapping, such as {speculation: {drafter: int8}}")
    return dict(given)


def _spot_training(given: dict[str, Any]) -> SpotTraining | None:
    """Take `spot_training` out of our options; the engine then serves a trained drafter."""
    wanted = given.pop("spot_training", None)
    if wanted is None or wanted is False:
        return None
    speculation = given.get("speculation") or {}
    if isinstance(speculation, Mapping):
        if not speculation.get("adaptive", True):
            remedy = "spot_training trains a drafter that it would not use: leave it out"
            raise invalid(f"{KEY}.speculation.adaptive", False, remedy)
        given["speculation"] = {**speculation, "adaptive": True}
    try:
        return SpotTraining.from_options(wanted)
    except InvalidRequest as error:
        raise InvalidRequest(f"{KEY}.{error}") from error


def _engine_config(config: Any, given: Mapping[str, Any], replica_rank: int) -> EngineConfig:
    for name, remedy in _VERLS_OWN.items():
        if name in given:
            raise invalid(f"{KEY}.{name}", given[name], remedy.format(ROLLOUT))
    if NAME in (_plain(config.custom) or {}):
        raise invalid(f"{ROLLOUT}.custom.{NAME}", config.custom[NAME], f"put it under {KEY}")
    graphs = {"graph_bytes": 0} if config.enforce_eager and "graph_bytes" not in given else {}
    verls = {
        "dtype": config.dtype,
        "seed": config.seed + replica_rank,
        "max_model_len": config.max_model_len or config.prompt_length + config.response_length,
        "max_num_seqs": config.max_num_seqs,
    }
    try:
        EngineConfig.from_dict(verls)
    except RolloutSpecError as error:
        raise InvalidRequest(f"{ROLLOUT}.{error}") from error
    try:
        return EngineConfig.from_dict({**verls, **graphs, **given})
    except RolloutSpecError as error:
        raise InvalidRequest(f"{KEY}.{error}") from error


def _check_rollout(config: Any) -> None:
    for name, (allowed, remedy) in _HONOURED.items():
        value = getattr(config, name)
        if value not in allowed:
            raise invalid(f"{ROLLOUT}.{name}", value, remedy)
    if config.mtp.enable and config.mtp.enable_rollout:
        raise invalid(f"{MODEL}.mtp.enable_rollout", True, "MTP layers do not draft here: use False")
    if config.prometheus.enable:
        raise invalid(f"{ROLLOUT}.prometheus.enable", True, "there is no such endpoint here: use False")
    if (_plain(config.qat) or {}).get("enable"):
        raise invalid(f"{ROLLOUT}.qat.enable", True, "the policy runs unquantized: use False")


def _check_model(model_config: Any) -> None:
    from rollout_spec.models.checkpoint import read_config
    from rollout_spec.models.spec import ModelSpec

    lora = _plain(model_config.lora) or {}
    if max(model_config.lora_rank, lora.get("rank", 0)) > 0 and not lora.get("merge", False):
        remedy = "adapters are merged into the weights before they are sent: use True"
        raise invalid(f"{MODEL}.lora.merge", False, remedy)
    overrides = _plain(model_config.override_config) or {}
    for name, value in overrides.get("model_config", overrides).items():
        if name != "attn_implementation":
            remedy = (
                "the rollout reads the checkpoint's config.json, and would run another model: write it there"
            )
            raise invalid(f"{MODEL}.override_config.{name}", value, remedy)
    ModelSpec.from_hf_config(read_config(model_config.local_path))


def _plain(value: Any) -> Any:
    """OmegaConf's containers as Python's."""
    if type(value).__module__.partition(".")[0] != "omegaconf":
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True)
