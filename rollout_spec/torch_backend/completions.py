"""From a finished sample to what the caller gets."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from rollout_spec.contracts import Completion, SpecCounts, VersionSpan
from rollout_spec.torch_backend.slots import ACCEPTED, DRAFTED, PLAIN_STEPS, VERIFY_STEPS, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def spec_counts(row: np.ndarray) -> SpecCounts:
    """Counters `[4]` as kept per slot, by name."""
    return SpecCounts(
        drafted=int(row[DRAFTED]),
        accepted=int(row[ACCEPTED]),
        verify_steps=int(row[VERIFY_STEPS]),
        plain_steps=int(row[PLAIN_STEPS]),
    )


def to_completion(sample: Sample, tokenizer: PreTrainedTokenizerBase | None) -> Completion:
    """The record of a sample that has ended; its text is "" without a tokenizer."""
    assert sample.finish_reason is not None
    text = ""
    if tokenizer is not None:
        text = str(tokenizer.decode(sample.output.tolist(), skip_special_tokens=True))
        if isinstance(sample.stop_reason, str):
            text = text[: _stop_place(sample, sample.stop_reason, text, tokenizer)]
    starts = [*sample.version_starts, (len(sample.output), -1)]
    logprobs, processed_logprobs, mask_mass = sample.logprobs.tolist()
    return Completion(
        request_id=sample.request_id,
        index=sample.index,
        prompt_token_ids=sample.prompt.tokens.tolist(),
        token_ids=sample.output.tolist(),
        text=text,
        logprobs=logprobs,
        processed_logprobs=processed_logprobs,
        mask_mass=mask_mass,
        top_logprobs=sample.top_logprobs if sample.params.logprobs else None,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        version_spans=[VersionSpan(a, b, v) for (a, v), (b, _) in itertools.pairwise(starts) if b > a],
        spec=spec_counts(sample.spec),
    )


def _stop_place(sample: Sample, stop: str, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where in `text` the stop string begins that the last token completed (`min_tokens` may skip others)."""
    before = len(tokenizer.decode(sample.output[:-1].tolist(), skip_special_tokens=True))
    for start in (max(0, before - len(stop) + 1), 0):
        if (place := text.find(stop, start)) >= 0:
            return place
    return len(text)
