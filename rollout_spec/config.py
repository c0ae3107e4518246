"""One typed, validated configuration; keyword arguments, dicts, YAML, Hydra and the CLI all land here."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from rollout_spec.contracts import InvalidRequest, invalid

BACKENDS = ("torch", "vllm")
VERIFIERS = ("auto", "coupled", "rejection")
DRAFTERS = ("auto", "nf4", "int4", "int8", "dense", "none")
ADAPTIVE_QUANTIZERS = ("none", "nf4", "int4", "int8")
OBJECTIVES = ("makespan", "throughput")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise invalid(name, value, f"use one of {', '.join(allowed)}")


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise invalid(name, value, f"use an integer >= {low}")


@dataclass(frozen=True)
class SpeculationConfig:
    """How to speculate.

    Attributes:
        drafter: Kind of the quantized copy of the policy that drafts: `nf4`, `int4`, `int8`, `dense` (not
            quantized: a control), `auto` (times the kinds on this machine) or `none` (history alone, or plain decoding).
        draft_length: Draft tokens `K` per verification; None: decided before every pass, from measured costs.
        longest_draft: Largest `K` considered when `draft_length` is None.
        objective: What is decided for: `makespan` (the batch is done soonest: stragglers get longer drafts) or
            `throughput` (most tokens per second).
        margin: Predicted gain that a switch must promise, such as 0.02.
        history: Also draft from text seen before: the request's own, its siblings', and earlier answers to the
            same prompt. With a fixed `draft_length` nothing decides when to, and it is not used.
        history_tokens: Most tokens of text kept for it.
        probe_share: Share of the passes that would speculate and decode plainly instead, at random: from them
            the time really saved is told.
        explore_share: Largest share of the time that trying drafters predicted to be slower may cost.
        verifier: `coupled` (the trajectory does not depend on speculation), `rejection` (highest acceptance),
            or `auto`: coupled if the row-invariance probe passes, rejection otherwise.
        adaptive: Prepare for a trained drafter that is published later. Needed where no other drafter is in use:
            nothing would have been measured to decide by.
        adaptive_quantizer: Kind to quantize a trained drafter's linears and head with: `nf4`, `int4`, `int8` or `none`.
        shadow: A trained drafter drafts unused, in a small share of the passes, until its acceptance is known.
        quantize_lm_head: Also quantize the drafter's lm_head.
        canary: After each weight update compare drafter and target on recent contexts.
        canary_min_acceptance: A drafter accepted less than this per token is reported and set aside: `1 - TV`
            in the canary, and, canary or not, the share accepted of the last 512 draft tokens tried.
    """

    drafter: str = "auto"
    draft_length: int | None = None
    longest_draft: int = 16
    objective: str = "makespan"
    margin: float = 0.02
    history: bool = True
    history_tokens: int = 4_000_000
    probe_share: float = 0.005
    explore_share: float = 0.002
    verifier: str = "auto"
    adaptive: bool = False
    adaptive_quantizer: str = "none"
    shadow: bool = True
    quantize_lm_head: bool = True
    canary: bool = True
    canary_min_acceptance: float = 0.3

    def __post_init__(self) -> None:
        _one_of("speculation.drafter", self.drafter, DRAFTERS)
        _one_of("speculation.adaptive_quantizer", self.adaptive_quantizer, ADAPTIVE_QUANTIZERS)
        _one_of("speculation.verifier", self.verifier, VERIFIERS)
        _one_of("speculation.objective", self.objective, OBJECTIVES)
        _at_least("speculation.longest_draft", self.longest_draft, 1)
        _at_least("speculation.history_tokens", self.history_tokens, 1)
        if self.draft_length is not None:
            _at_least("speculation.draft_length", self.draft_length, 1)
        for name in ("draft_length", "longest_draft"):
            if (getattr(self, name) or 0) > 64:
                raise invalid(f"speculation.{name}", getattr(self, name), "use at most 64")
        for name in ("quantize_lm_head", "canary", "history", "adaptive", "shadow"):
            if not isinstance(getattr(self, name), bool):
                raise invalid(f"speculation.{name}", getattr(self, name), "use true or false")
        for name in ("canary_min_acceptance", "margin", "probe_share", "explore_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise invalid(f"speculation.{name}", value, "use a number in [0, 1]")


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine needs to know besides the model.

    Attributes:
        backend: `torch`, or `vllm` (installed beside it).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16` (CUDA only).
        seed: Noise key of this engine run; give each replica its own.
        max_model_len: Longest sequence in tokens, prompt included; None takes the model's limit.
        max_num_seqs: Most sequences decoded together.
        kv_cache_tokens: Capacity of the KV cache in tokens; None sizes it for `max_num_seqs` sequences of
            `max_model_len`, within `kv_cache_bytes`.
        kv_cache_bytes: Upper limit of the KV cache in bytes when `kv_cache_tokens` is None.
        block_size: Tokens per KV block.
        prefill_chunk: Most prompt tokens prefilled between two decode steps.
        graph_bytes: Budget of captured CUDA graphs in bytes; None: 4 GiB on CUDA, and none on a CPU; 0: none.
        vllm: More arguments for vLLM's engine, by vLLM's names, with `backend="vllm"`.
        speculation: See `SpeculationConfig`.
    """

    backend: str = "torch"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    kv_cache_tokens: int | None = None
    kv_cache_bytes: int = 2 << 30
    block_size: int = 64
    prefill_chunk: int = 512
    graph_bytes: int | None = None
    vllm: dict | None = None
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise invalid("device", self.device, "use auto, cpu, cuda or cuda:N")
        _one_of("dtype", self.dtype, DTYPES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise invalid("seed", self.seed, "use an integer")
        for name, low in (("max_num_seqs", 1), ("kv_cache_bytes", 1), ("prefill_chunk", 1)):
            _at_least(name, getattr(self, name), low)
        if self.graph_bytes is not None:
            _at_least("graph_bytes", self.graph_bytes, 0)
        for name in ("max_model_len", "kv_cache_tokens"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 2)
        if not isinstance(self.block_size, int) or self.block_size not in (16, 32, 64, 128):
            raise invalid("block_size", self.block_size, "use 16, 32, 64 or 128")
        if isinstance(self.speculation, Mapping):
            object.__setattr__(
                self, "speculation", _from_mapping(SpeculationConfig, self.speculation, "speculation.")
            )
        if not isinstance(self.speculation, SpeculationConfig):
            raise invalid("speculation", self.speculation, "give a mapping, such as {drafter: nf4}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from a (nested) mapping; unknown names and wrong types are errors naming the field."""
        if not isinstance(values, Mapping):
            raise invalid("config", values, "give a mapping from option to value")
        return _from_mapping(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str) -> EngineConfig:
        """Build from a YAML file holding the same names."""
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise invalid("config", str(path), f"give a readable YAML file ({error})") from error
        return cls.from_dict({} if values is None else values)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict; `from_dict` of it gives an equal configuration."""
        return asdict(self)


def _from_mapping(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"{prefix}{name}={value!r}: unknown option; known here: {', '.join(known)}")
        arguments[name] = _coerce(hints[name], value, prefix + name)
    return cls(**arguments)


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Check `value` against a field's type; integers are fine where a float is meant, strings are not."""
    options: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted: type = next(option for option in options if option is not type(None))
    if is_dataclass(wanted):
        if isinstance(value, wanted):
            return value
        if not isinstance(value, Mapping):
            raise invalid(name, value, "give a mapping")
        return _from_mapping(wanted, value, name + ".")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise invalid(name, value, f"give a value of type {wanted.__name__}")
    return value
