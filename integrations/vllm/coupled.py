"""Coupled verification inside vLLM's V1 runner.

With `additional_config={"rollout_spec": {"verifier": "coupled"}}` every token sampled at temperature > 0 is the
winner of a race between the target's processed probabilities, run with noise that is a function of the request's key,
the policy version and the position in the whole sequence. Plain passes, verified rows, bonus rows and drafts of one
position draw with the same noise, so the tokens do not depend on what was drafted, nor on whether anything was.

The key of a request is, in this order:

- `SamplingParams.extra_args["rollout_spec_noise_key"]`, an int64, for callers that name their samples themselves;
- its `seed`: as in vLLM, one seed and one prompt give one completion (and sibling i of `n` has seed + i);
- the engine's seed and the request id that the caller gave, without the random suffix vLLM adds. `LLM.generate`
  counts its requests, so the same calls in the same order on a fresh engine repeat their samples.

The prompt is not in the key. The version is that of the worker's policy (`worker.WorkerPolicy`), 0 before it has one;
docs/losslessness.md says what each part separates.

`draws.py` brings a pass's `Noise` to where vLLM draws.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.compat_worker import attached_policy
from rollout_spec.requests import noise_key
from rollout_spec.sampling.noise import fold, row_keys
from rollout_spec.sampling.verify import draft_coupled

EXTRA_ARG = "rollout_spec_noise_key"
GREEDY_BELOW = 1e-5  # temperatures that vLLM's sampler takes for greedy
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")  # what InputProcessor.assign_request_id appends


@dataclass
class Noise:
    """The noise of one pass of the target over B requests, and of the drafts made after it.

    Attributes:
        base: int64 [B], the requests' keys.
        version: Policy version the pass samples under.
        position: int64 [B], position in the sequence of the token that each request's first row samples.
        lengths: int64 [B], drafts verified in the pass; None if it verifies none.
        emitted: int64 [B], tokens the pass emitted; set by the verifier.
        drafted: Draft tokens proposed since, per request.
    """

    base: Tensor
    version: int
    position: Tensor
    lengths: Tensor | None = None
    emitted: Tensor | None = None
    drafted: int = 0

    def keys(self, position: Tensor, requests: Tensor | None = None) -> Tensor:
        """Keys int64 [R] of rows at position [R], of all requests or of those indexed by requests [R]."""
        base = self.base if requests is None else self.base[requests]
        return row_keys(base, self.version, position.unsqueeze(1)).squeeze(1)

    def last_row_keys(self) -> Tensor:
        """Keys [B] of each request's last row: the bonus row, or the only one."""
        return self.keys(self.position if self.lengths is None else self.position + self.lengths)

    def draft_keys(self, count: int) -> Tensor:
        """Keys [B * count] of the next `count` positions to draft, request by request; they count as drafted."""
        first = self.position + (1 if self.emitted is None else self.emitted) + self.drafted
        self.drafted += count
        position = first.unsqueeze(1) + torch.arange(count, device=first.device)
        return row_keys(self.base, self.version, position).flatten()


class NoiseSource:
    """The noise keys of one runner's requests.

    Attributes:
        seed: The engine's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._keys: dict[str, int] = {}
        self._base = torch.empty(0, dtype=torch.int64)

    def key_of(self, request_id: str, params: Any) -> int:
        """The noise key (int64) of a request.

        Raises:
            InvalidRequest: `extra_args["rollout_spec_noise_key"]` is not an int64.
        """
        given = (params.extra_args or {}).get(EXTRA_ARG)
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, int) or not -(2**63) <= given < 2**63:
                raise invalid(f"extra_args[{EXTRA_ARG!r}]", given, "give an integer in [-2**63, 2**63)")
            return given
        if params.seed is not None:
            return fold(params.seed)
        return noise_key(self.seed, _given_id(request_id), None, 0)

    def bases(self, runner: Any) -> Tensor:
        """Keys int64 [B] of the requests in the runner's batch."""
        ids = runner.input_batch.req_ids
        if list(self._keys) != ids:
            known = self._keys
            self._keys = {
                i: known[i] if i in known else self.key_of(i, runner.requests[i].sampling_params) for i in ids
            }
            self._base = torch.tensor(list(self._keys.values()), dtype=torch.int64).to(
                runner.device, non_blocking=True
            )
        return self._base

    def of_pass(self, runner: Any, metadata: Any) -> Noise:
        """The noise of the pass that is about to be sampled, `metadata` being its SpecDecodeMetadata or None."""
        count = runner.input_batch.num_reqs
        last = runner.query_start_loc.gpu[1 : count + 1] - 1
        position = runner.positions[last] + 1
        policy = attached_policy(runner)
        version = 0 if policy is None else policy.version
        if metadata is None:
            return Noise(self.bases(runner), version, position)
        ends = metadata.cu_num_draft_tokens.to(torch.int64)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1))
        return Noise(self.bases(runner), version, position - lengths, lengths)


def _given_id(request_id: str) -> str:
    """The id that the caller gave: vLLM appends a dash and eight random digits unless told not to."""
    from vllm import envs

    untouched = getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False)
    return request_id if untouched else _SUFFIX.sub("", request_id)


def choose(logits: Tensor, keys: Tensor) -> Tensor:
    """The coupled choice of rows: processed logits float32 [R, V], keys int64 [R]; returns int64 [R].

    Rows are padded to a multiple of 64 tokens, as the torch backend's are.
    """
    logits = nn.functional.pad(logits.float(), (0, -logits.shape[-1] % 64), value=-torch.inf)
    return draft_coupled(logits.unsqueeze(1), keys.unsqueeze(1)).squeeze(1)


def verify(
    noise: Noise,
    drafts: Tensor,
    target_logits: Tensor,
    bonus: Tensor,
    temperature: Tensor | None,
    width: int,
) -> Tensor:
    """What a pass emits: the target's choices up to the first that is not the draft, or the bonus token after them.

    Args:
        noise: Of the pass, with `lengths`; `emitted` is set.
        drafts: [N], request by request.
        target_logits: float32 [N, V], processed.
        bonus: [B, 1], each request's choice at the row after its drafts.
        temperature: float32 [B], or None when all are greedy.
        width: K + 1, K being the longest draft.

    Returns:
        int32 [B, K + 1], -1 after the last emitted token.
    """
    lengths = noise.lengths
    assert lengths is not None
    count = lengths.shape[0]
    ends = lengths.cumsum(0)
    request = torch.arange(count, device=drafts.device).repeat_interleave(
        lengths, output_size=drafts.shape[0]
    )
    place = torch.arange(drafts.shape[0], device=drafts.device) - (ends - lengths)[request]
    chosen = target_logits.argmax(-1)
    if temperature is not None:
        drawn = choose(target_logits, noise.keys(noise.position[request] + place, request))
        chosen = torch.where(temperature[request] < GREEDY_BELOW, chosen, drawn)

    tokens = torch.full((count, width), -1, dtype=torch.int64, device=drafts.device)
    tokens[request, place] = chosen
    agrees = torch.zeros_like(tokens)
    agrees[request, place] = (chosen == drafts).to(torch.int64)
    tokens.scatter_(1, lengths.unsqueeze(1), bonus.to(torch.int64))
    accepted = agrees.cumprod(1).sum(1)
    noise.emitted = accepted + 1
    kept = torch.arange(width, device=drafts.device) <= accepted.unsqueeze(1)
    return torch.where(kept, tokens, -1).to(torch.int32)


def draft(noise: Noise, logits: Tensor, sampling_metadata: Any) -> Tensor:
    """Guess the target's choices at the next positions to draft.

    The drafter's logits get temperature, top_k and top_p as the target's do; other parameters only cost acceptance.

    Args:
        noise: Of the pass before; the positions count as drafted.
        logits: [B * K, V], the drafter's, request by request; K positions are drafted, usually one.
        sampling_metadata: vLLM's, of the B requests.

    Returns:
        int64 [B * K].
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    count = logits.shape[0] // noise.base.shape[0]

    def rows(x: Tensor | None) -> Tensor | None:
        return x if x is None or count == 1 else x.repeat_interleave(count)

    temperature = rows(sampling_metadata.temperature)
    assert temperature is not None
    greedy = temperature < GREEDY_BELOW
    best = logits.argmax(-1)
    scores = logits.float() / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    scores = apply_top_k_top_p(scores, rows(sampling_metadata.top_k), rows(sampling_metadata.top_p))
    return torch.where(greedy, best, choose(scores, noise.draft_keys(count)))
