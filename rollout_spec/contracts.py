"""Records that cross a boundary: trainer to engine, engine to backend, backend to drafter.

Standard library only, frozen, and validated where a person fills them in, so that a trainer can build, pickle
and log them without importing torch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum


class RolloutSpecError(Exception):
    """Base of the errors this package raises on purpose."""


class InvalidRequest(RolloutSpecError, ValueError):
    """A request, a sampling parameter or a configuration value that cannot be honoured."""


class UnsupportedModel(RolloutSpecError, ValueError):
    """A model the backend refuses at start; the message says why and what to do."""


class WeightError(RolloutSpecError, ValueError):
    """A checkpoint or weight update that does not fit the model; the previous weights stay in force."""


def invalid(field_name: str, value: object, remedy: str) -> InvalidRequest:
    """The one form of user error: the field, the value, the remedy."""
    return InvalidRequest(f"{field_name}={value!r}: {remedy}")


class FinishReason(str, Enum):
    """Why a completion ended: a stop token or string, its length limit, or `abort` (resumable)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def _number(name: str, value: object, low: float, high: float, remedy: str) -> None:
    """Check a real number in [low, high]; NaN, infinities, bools and non-numbers are refused."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):  # type: ignore[operator]  # NaN fails both comparisons
        raise invalid(name, value, remedy)


def _integer(name: str, value: object, low: int, high: float, remedy: str) -> None:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (is_integer and low <= value <= high):  # type: ignore[operator]
        raise invalid(name, value, remedy)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Names and meanings are the field's (vLLM, transformers).

    The processed distribution is built in this order: repetition, presence and frequency penalties,
    `logit_bias`, `min_tokens` (end tokens masked), temperature, `top_k`, `top_p`, `min_p`.

    Attributes:
        n: Samples per prompt (a GRPO group).
        temperature: 0 means greedy.
        top_k: Keep the k most probable tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: Drop tokens below `min_p` times the largest probability, in [0, 1].
        repetition_penalty: > 0; over prompt and output tokens (Keskar et al. 2019).
        presence_penalty: In [-2, 2]; over output tokens.
        frequency_penalty: In [-2, 2]; per occurrence in the output.
        logit_bias: Token id to additive bias, each in [-100, 100].
        min_tokens: No end token before this many output tokens.
        max_tokens: Output limit; None means up to the end of the context, or of the KV cache if that is smaller.
        stop: Strings that end the completion; text is cut before the match, tokens end with the one that
            completed it. No special tokens: `text` has none.
        stop_token_ids: Tokens that end the completion, besides the model's own end tokens.
        ignore_eos: Do not stop at the model's own end tokens.
        seed: Together with the engine's seed and the request's id, fixes the noise. Ids the engine gives name the
            policy version, the prompt, and how often it came: one constant seed for everything still gives
            distinct samples, reproducibly. To replay a sample, pass its `request_id`; for different prompts
            pass different ids.
        logprobs: Also return this many most probable tokens per position, under the full policy at T=1.
            The sampled token's own logprobs are always returned.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise invalid(name, value, "give a list")
            object.__setattr__(self, name, tuple(value))
        _integer("n", self.n, 1, 65536, "use an integer between 1 and 65536")
        _number("temperature", self.temperature, 0.0, 1e4, "use 0 (greedy) or a number up to 1e4")
        if 0.0 < self.temperature < 1e-3:
            raise invalid("temperature", self.temperature, "use 0 for greedy decoding, or at least 1e-3")
        _integer("top_k", self.top_k, -1, 2**31 - 1, "use a positive integer, or 0 or -1 to keep all tokens")
        _number("top_p", self.top_p, 0.0, 1.0, "use a number in (0, 1]; 1 keeps all tokens")
        if self.top_p == 0:
            raise invalid(
                "top_p", self.top_p, "use a number in (0, 1]; for greedy decoding set temperature=0"
            )
        _number("min_p", self.min_p, 0.0, 1.0, "use a number in [0, 1]; 0 keeps all tokens")
        _number(
            "repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "use a number in [1e-3, 1e3]; 1 is off"
        )
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "use a number in [-2, 2]; 0 is off")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "use a number in [-2, 2]; 0 is off")
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1, "use an integer >= 0")
        if self.max_tokens is not None:
            _integer(
                "max_tokens",
                self.max_tokens,
                1,
                2**31 - 1,
                "use an integer >= 1, or None for the context's end",
            )
            if self.min_tokens > self.max_tokens:
                raise invalid("min_tokens", self.min_tokens, f"must not exceed max_tokens={self.max_tokens}")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1, "use a 64-bit integer, or None")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, 1000, "use an integer between 0 and 1000, or None")
        if not isinstance(self.ignore_eos, bool):
            raise invalid("ignore_eos", self.ignore_eos, "use True or False")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise invalid("stop", text, "use non-empty strings")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1, "use token ids >= 0")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise invalid("logit_bias", self.logit_bias, "give a mapping from token id to bias")
            for token, bias in self.logit_bias.items():
                _integer("logit_bias", token, 0, 2**31 - 1, "its keys are token ids >= 0")
                _number("logit_bias", bias, -100.0, 100.0, "its values are numbers in [-100, 100]")
            plain = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", plain)
        self._to_plain_numbers()

    def _to_plain_numbers(self) -> None:
        """NumPy's and other number types become int and float, so that a request can be logged and put in tensors."""
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, f.name, plain)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SamplingParams:
        """Build from a mapping; an unknown name is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise invalid("sampling_params", values, "give a mapping from parameter to value")
        for name in values:
            if name not in known:
                raise InvalidRequest(
                    f"{name}={values[name]!r}: unknown sampling parameter; known: {', '.join(known)}"
                )
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class VersionSpan:
    """Output tokens [start, stop) were sampled under policy `version`."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True)
class SpecCounts:
    """What speculation did for one request (or, summed, for an engine).

    Attributes:
        drafted: Draft tokens proposed.
        accepted: Draft tokens accepted by verification, those behind the end of a sample left out.
        verify_steps: Target passes that verified at least one draft token.
        plain_steps: Target passes that decoded one token without drafts.
    """

    drafted: int = 0
    accepted: int = 0
    verify_steps: int = 0
    plain_steps: int = 0

    def __add__(self, other: SpecCounts) -> SpecCounts:
        return SpecCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance(self) -> float:
        """Share of proposed draft tokens accepted; NaN when none was proposed."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tau(self) -> float:
        """Mean tokens per verification, accepted + 1 (where a draft ends a sample there is none besides); NaN without any."""
        return self.accepted / self.verify_steps + 1 if self.verify_steps else math.nan


@dataclass(frozen=True)
class Completion:
    """One finished (or aborted) sample. Lists named per token have one entry per output token.

    Attributes:
        request_id: The id given, or the engine's own; pass it again to replay the sample.
        index: Sample index within the group of `n`.
        prompt_token_ids: The prompt.
        token_ids: Output tokens, end token included.
        text: Decoded output without special tokens, cut before a stop string; "" without a tokenizer.
        logprobs: Natural log of the sampled token's probability under the full-vocabulary policy at T=1.
        processed_logprobs: The same under the processed distribution the token was drawn from.
        mask_mass: Probability that the penalised, tempered distribution gives to the tokens that top-k,
            top-p and min-p kept (1.0 when nothing was cut).
        top_logprobs: Per token, token id to logprob (full policy, T=1), if asked for.
        finish_reason: Why it ended.
        stop_reason: The stop string or token id that ended it, None for the model's end token or length.
        version_spans: Which policy version each token was sampled under.
        spec: What speculation did for this sample.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float]
    processed_logprobs: list[float]
    mask_mass: list[float]
    top_logprobs: list[dict[int, float]] | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    version_spans: list[VersionSpan]
    spec: SpecCounts = field(default_factory=SpecCounts)
