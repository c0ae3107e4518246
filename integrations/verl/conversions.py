"""Between verl's requests and answers and the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout_spec.contracts import Completion, FinishReason, InvalidRequest, SamplingParams, invalid
from rollout_spec.integrations.verl.options import RolloutOptions

COUNTS = {
    "spec_num_draft_tokens": "drafted",
    "spec_num_accepted_tokens": "accepted",
    "spec_num_verify_steps": "verify_steps",
    "spec_num_plain_steps": "plain_steps",
}
"""Names in verl's `extra_fields` (the first three are verl's own) and in `SpecCounts`."""


def to_sampling_params(
    given: Mapping[str, Any], prompt_length: int, options: RolloutOptions
) -> tuple[SamplingParams, bool]:
    """The engine's parameters of one request, and whether it wants logprobs.

    Args:
        given: verl's, by vLLM's names; `logprobs` is True or False, and `max_new_tokens` means `max_tokens`.
        prompt_length: Tokens of this request's prompt, earlier turns included.
        options: Defaults and limits.

    Raises:
        InvalidRequest: A parameter is unknown or out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    wants_logprobs = values.pop("logprobs", False)
    if not isinstance(wants_logprobs, bool):
        raise invalid("sampling_params.logprobs", wants_logprobs, "use True or False")
    if "max_new_tokens" in values:
        values.setdefault("max_tokens", values.pop("max_new_tokens"))
    if values.get("n", 1) != 1:
        raise invalid("sampling_params.n", values["n"], "verl asks once per sample: use 1")
    left = options.prompt_length + options.response_length - prompt_length
    values.setdefault("max_tokens", max(1, min(options.response_length, left)))
    values.setdefault("repetition_penalty", options.repetition_penalty)
    values.setdefault("ignore_eos", options.ignore_eos)
    try:
        return SamplingParams.from_dict(values), wants_logprobs
    except InvalidRequest as error:
        raise InvalidRequest(f"sampling_params.{error}") from error


def to_token_output(completion: Completion, version: int, logprobs: str | None) -> dict[str, Any]:
    """The fields of verl's `TokenOutput`.

    Args:
        completion: What the engine gives.
        version: Policy version in force, for an answer without tokens.
        logprobs: The field of `completion` to report, or None.
    """
    aborted = completion.finish_reason is FinishReason.ABORT
    spans = [(span.start, span.stop, span.version) for span in completion.version_spans]
    counts = {name: getattr(completion.spec, field) for name, field in COUNTS.items()}
    return {
        "token_ids": completion.token_ids,
        "log_probs": None if logprobs is None else getattr(completion, logprobs),
        "stop_reason": "aborted" if aborted else "completed",
        "extra_fields": {**_versions(spans, version), **counts},
    }


def join_extra_fields(attempts: Sequence[Any]) -> dict[str, Any]:
    """`extra_fields` of an answer from those of its parts (verl's `TokenOutput`s), in their order."""
    spans: list[tuple[int, int, int]] = []
    counts = dict.fromkeys(COUNTS, 0)
    done = 0
    for attempt in attempts:
        fields = attempt.extra_fields
        for start, stop, version in fields.get("version_spans", ()):
            if spans and spans[-1][2] == version:
                spans[-1] = (spans[-1][0], done + stop, version)
            else:
                spans.append((done + start, done + stop, version))
        for name in COUNTS:
            counts[name] += fields.get(name, 0)
        done += len(attempt.token_ids)
    return {**_versions(spans, attempts[-1].extra_fields["global_steps"]), **counts}


def _versions(spans: list[tuple[int, int, int]], version: int) -> dict[str, Any]:
    """verl's three fields, and `version_spans`: (start, stop, version), output tokens [start, stop) under `version`."""
    versions = [version for _, _, version in spans] or [version]
    return {
        "global_steps": versions[-1],
        "min_global_steps": min(versions),
        "max_global_steps": max(versions),
        "version_spans": spans,
    }
