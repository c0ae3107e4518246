"""Reading requests: everything a caller may pass, checked before anything starts."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout_spec.contracts import InvalidRequest, SamplingParams, invalid
from rollout_spec.sampling.noise import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int]


def noise_key(engine_seed: int, request_id: str, seed: int | None, index: int) -> int:
    """Noise base (int64) of sample `index` of a request: these four, and nothing else, tell samples apart.

    The policy version and a token's position enter later, per position (`sampling.noise.row_keys`).
    """
    words = (engine_seed,) if seed is None else (engine_seed, seed)
    return fold(fold(*words, 1, int.from_bytes(request_id.encode(), "little")), index)


@dataclass(frozen=True)
class RequestReader:
    """Turns a caller's arguments into token ids and parameters.

    Attributes:
        tokenizer: For text prompts; None takes token ids only.
        vocab_size: Token ids lie below.
        max_model_len: Longest sequence, answer included, in tokens.
        kv_tokens: Capacity of the KV cache in tokens.
    """

    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    max_model_len: int
    kv_tokens: int

    def read(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        n: int | None,
        seeds: Sequence[int] | None,
        request_ids: Sequence[str] | None,
    ) -> tuple[list[np.ndarray], list[SamplingParams], list[str] | None]:
        """Token ids `[P]`, parameters and ids (None: the engine's own), one each per request.

        Raises:
            InvalidRequest: Naming the field, the value and the remedy.
        """
        rows = (
            [prompts] if isinstance(prompts, str) else _as_list("prompts", prompts, "texts or token id lists")
        )
        if rows and isinstance(rows[0], numbers.Integral):
            rows = [rows]
        tokens = [self.token_ids(prompt, f"prompts[{row}]") for row, prompt in enumerate(rows)]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(tokens)
        else:
            params = _as_list("sampling_params", sampling_params, "SamplingParams, one per prompt")
        for row, p in enumerate(params):
            if not isinstance(p, SamplingParams):
                raise invalid(f"sampling_params[{row}]", p, "give SamplingParams; from_dict makes them")
        seeds = None if seeds is None else _as_list("seeds", seeds, "integers, one per prompt")
        ids = None if request_ids is None else read_request_ids(request_ids)
        for name, values in (("sampling_params", params), ("seeds", seeds), ("request_ids", ids)):
            if values is not None and len(values) != len(tokens):
                raise InvalidRequest(
                    f"{name}: {len(values)} given for {len(tokens)} prompts; give one per prompt"
                )
        if n is not None:
            params = [replace(p, n=n) for p in params]
        if seeds is not None:
            params = [replace(p, seed=seed) for p, seed in zip(params, seeds, strict=True)]
        if ids is not None and len(set(ids)) < len(ids):
            raise invalid("request_ids", ids, "must be distinct")
        for prompt, p in zip(tokens, params, strict=True):
            self._check_fits(prompt, p)
        return tokens, params, ids

    def token_ids(self, prompt: Prompt, name: str) -> np.ndarray:
        """Token ids int64 `[P]` of a text or a list; errors speak of `name`."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise invalid(name, prompt, "this engine has no tokenizer; give token ids")
            prompt = self.tokenizer(prompt)["input_ids"]
        try:
            tokens = np.asarray(prompt)
        except (ValueError, TypeError, RuntimeError) as error:
            raise invalid(name, prompt, "give text or one flat list of integer token ids") from error
        if tokens.shape == (0,):
            raise invalid(name, prompt, "give at least one token")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise invalid(name, prompt, "give text or one flat list of integer token ids")
        vocab = self.vocab_size
        outside = (tokens < 0) | (tokens >= vocab)
        if outside.any():
            raise invalid(name, int(tokens[outside][0]), f"token ids lie in [0, {vocab})")
        return tokens.astype(np.int64)

    def _check_fits(self, prompt: np.ndarray, params: SamplingParams) -> None:
        longest = self.max_model_len
        if len(prompt) >= longest:
            raise InvalidRequest(
                f"prompt of {len(prompt)} tokens: the context holds {longest}, answer included; shorten the prompt "
                "or raise max_model_len"
            )
        if min(len(prompt) + (params.max_tokens or 1), longest) > self.kv_tokens:
            raise InvalidRequest(
                f"max_tokens={params.max_tokens} after a prompt of {len(prompt)} tokens: the KV cache holds "
                f"{self.kv_tokens} tokens; lower max_tokens or raise kv_cache_tokens"
            )
        for stop in params.stop:
            if self.tokenizer is None:
                raise invalid("stop", params.stop, "this engine has no tokenizer; use stop_token_ids")
            if any(token in stop for token in self.tokenizer.all_special_tokens):
                raise invalid("stop", stop, "completions hold no special tokens; use stop_token_ids")
        vocab = self.vocab_size
        for field_name in ("stop_token_ids", "logit_bias"):
            for token in getattr(params, field_name) or ():
                if token >= vocab:
                    raise invalid(field_name, token, f"token ids lie in [0, {vocab})")


def _as_list(name: str, values: Any, wanted: str) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise invalid(name, values, f"give a list of {wanted}")
    return list(values)


def read_request_ids(values: Any) -> list[str]:
    """A list of ids, checked."""
    ids = _as_list("request_ids", values, "strings")
    for row, request_id in enumerate(ids):
        if not isinstance(request_id, str) or not request_id.isprintable():
            raise invalid(f"request_ids[{row}]", request_id, "use a string of printable characters")
    return ids
