"""One sample as a request of vLLM: its parameters there, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout_spec.contracts import FinishReason, SamplingParams, invalid
from rollout_spec.integrations.vllm.coupled import EXTRA_ARG
from rollout_spec.sampling.noise import fold
from rollout_spec.torch_backend.outputs import tokens_up_to_stop
from rollout_spec.torch_backend.slots import ACCEPTED, DRAFTED, PLAIN_STEPS, VERIFY_STEPS, Sample

if TYPE_CHECKING:
    import vllm

_COOLEST = 1e-2  # vLLM raises lower temperatures to this


def check_params(params: SamplingParams) -> None:
    """Refuse what vLLM would change or cannot report; InvalidRequest names the field."""
    if 0 < params.temperature < _COOLEST:
        remedy = f"vLLM samples no cooler than {_COOLEST:g}; use that, 0 for greedy, or backend='torch'"
        raise invalid("temperature", params.temperature, remedy)
    if params.logprobs and not reports_policy(params):
        remedy = (
            "vLLM reports logprobs of the sampled distribution only; leave it out, drop penalties, cuts and "
            "temperature, or use backend='torch'"
        )
        raise invalid("logprobs", params.logprobs, remedy)


def cuts(params: SamplingParams) -> bool:
    """Whether top_k, top_p or min_p can remove tokens."""
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def reports_policy(params: SamplingParams) -> bool:
    """Whether the logprobs vLLM reports (processed) are also those of the full policy at temperature 1."""
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1
    changed = any(penalties) or bool(params.logit_bias) or params.min_tokens > 0 or cuts(params)
    return params.temperature in (0, 1) and not changed


def vllm_params(sample: Sample, coupled: bool, version: int) -> vllm.SamplingParams:
    """vLLM's parameters for one sample; end tokens are named, as vLLM has no tokenizer to ask."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    p = sample.params
    seed = None if p.seed is None or coupled else fold(sample.noise_key, version) % 2**63
    return vllm.SamplingParams(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        logit_bias=dict(p.logit_bias) if p.logit_bias else None,
        min_tokens=p.min_tokens if sample.end_tokens else 0,
        max_tokens=sample.limit - len(sample.prompt.tokens),
        stop_token_ids=list(sample.end_tokens),
        ignore_eos=True,
        seed=seed,
        logprobs=p.logprobs or 0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={EXTRA_ARG: sample.noise_key} if coupled else None,
    )


@dataclass
class InFlight:
    """A sample that vLLM is decoding, and its output so far."""

    sample: Sample
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def take(
        self, output: Any, version: int, decode_text: Callable[[list[int]], str] | None
    ) -> FinishReason | None:
        """Append one of vLLM's outputs, sampled under `version`; returns why it ended, if it did."""
        sample = self.sample
        new = list(output.token_ids)
        if new and (not sample.version_starts or sample.version_starts[-1][1] != version):
            sample.version_starts.append((len(self.tokens), version))
        self.tokens += new
        for token, found in zip(new, output.logprobs or (), strict=True):
            self.logprobs.append(found[token].logprob)
            if sample.params.logprobs:
                best = sorted(found.items(), key=lambda item: -item[1].logprob)[: sample.params.logprobs]
                sample.top_logprobs.append({token: entry.logprob for token, entry in best})
        reason = None if output.finish_reason is None else FinishReason(output.finish_reason)
        if reason is FinishReason.STOP and output.stop_reason in sample.params.stop_token_ids:
            sample.stop_reason = output.stop_reason
        if sample.params.stop and new and self._cut_at_stop(len(new), decode_text):
            reason = FinishReason.STOP
        if output.spec_decode_metrics is not None:
            self._count(output.spec_decode_metrics)
        return reason

    def end(self, reason: FinishReason) -> Sample:
        """Hand the output to the sample."""
        sample = self.sample
        sample.finish_reason = reason
        sample.output = np.array(self.tokens, np.int64)
        given = np.array(self.logprobs, np.float32)
        unknown = np.full(len(given), math.nan, np.float32)
        certain = np.ones(len(given), np.float32)
        greedy = sample.params.temperature == 0
        sample.logprobs = np.stack(
            (
                given if reports_policy(sample.params) else unknown,
                0 * certain if greedy else given,
                unknown if cuts(sample.params) else certain,
            )
        )
        del sample.top_logprobs[len(self.tokens) :]
        return sample

    def _cut_at_stop(self, new: int, decode_text: Callable[[list[int]], str] | None) -> bool:
        assert decode_text is not None
        params = self.sample.params
        new = min(new, len(self.tokens) - params.min_tokens)
        match = tokens_up_to_stop(np.array(self.tokens), new, params.stop, decode_text)
        if match is None:
            return False
        count, self.sample.stop_reason = match
        del self.tokens[count:], self.logprobs[count:]
        return True

    def _count(self, metrics: Any) -> None:
        """What vLLM counted for a request that ended by itself."""
        verified, spec = sum(metrics.histogram), self.sample.spec
        accepted = sum(length * count for length, count in enumerate(metrics.histogram))
        spec[DRAFTED], spec[ACCEPTED], spec[VERIFY_STEPS] = metrics.num_draft_tokens, accepted, verified
        spec[PLAIN_STEPS] = max(0, len(self.tokens) - accepted - verified)
