"""Where tokens are drawn inside vLLM's V1 runner, so that they can be drawn otherwise.

vLLM hands `SamplingMetadata.generators` to everything that draws. A `Noise` takes the place of that mapping where
verification is coupled, and on a CPU `Unseeded` that of an empty one; other engines draw as they always did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rollout_spec.integrations.vllm import coupled, rejection
from rollout_spec.integrations.vllm.coupled import Noise, NoiseSource
from rollout_spec.integrations.vllm.options import options_of
from rollout_spec.integrations.vllm.rejection import Unseeded
from rollout_spec.integrations.vllm.sampling import check_judged, fix_expand, is_coupled, rebind


class OwnDraws(nn.Module):
    """Stands in for a sampler's TopKTopPSampler, and draws where it is given a `Noise` or `Unseeded`."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(
        self, logits: Tensor, generators: Any, k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens int64 [B] drawn from logits float32 [B, V] cut by k and p [B], and what the logprobs mode asks for."""
        if not isinstance(generators, (Noise, Unseeded)):
            return self.original(logits, generators, k, p)
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        logits = apply_top_k_top_p(logits, k, p)
        mode = self.original.logprobs_mode
        returned = logits if mode == "processed_logits" else None
        if mode == "processed_logprobs":
            returned = logits.log_softmax(-1, dtype=torch.float32)
        if isinstance(generators, Noise):
            return coupled.choose(logits, generators.last_row_keys()), returned
        return rejection.draw(logits.softmax(-1, dtype=torch.float32)), returned


def noise_source(runner: Any) -> NoiseSource | None:
    """The runner's noise, None unless coupled. At its first use the runner is prepared to draw."""
    try:
        source: NoiseSource | None = runner._rollout_spec_noise
    except AttributeError:
        source = None
        if is_coupled(runner.vllm_config):
            source = NoiseSource(runner.model_config.seed or 0)
        configured = options_of(runner.vllm_config) is not None
        speculates = configured and runner.speculative_config is not None
        runner._rollout_spec_configured = configured
        runner._rollout_spec_noise = source
        runner._rollout_spec_unseeded = (
            speculates
            and runner.device.type == "cpu"
            and not getattr(runner.model_config, "use_fp64_gumbel", False)
        )
        if source is not None or runner._rollout_spec_unseeded:
            runner.sampler.topk_topp_sampler = OwnDraws(runner.sampler.topk_topp_sampler)
        if speculates:
            fix_expand()
    return source


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        source = noise_source(self)
        if spec_decode_metadata is not None and self._rollout_spec_configured:
            check_judged(self, spec_decode_metadata.num_draft_tokens)
        batch = self.input_batch
        metadata, generators = batch.sampling_metadata, None
        if metadata.all_greedy:
            pass
        elif source is not None:
            generators = source.of_pass(self, spec_decode_metadata)
        elif self._rollout_spec_unseeded and not metadata.generators:
            told = isinstance(metadata.generators, Unseeded)  # while the batch stays as it is
            generators = None if told else Unseeded()
        if generators is not None:
            batch.sampling_metadata = replace(metadata, generators=generators)
        return original(self, logits, spec_decode_metadata)

    return sample


def _verify(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    signature = inspect.signature(original)

    def rejection_sample(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        metadata, width = given["sampling_metadata"], given["max_spec_len"] + 1
        drafts, logits, bonus = (given[x] for x in ("draft_token_ids", "target_logits", "bonus_token_ids"))
        if isinstance(metadata.generators, Noise):
            return coupled.verify(metadata.generators, drafts, logits, bonus, metadata.temperature, width)
        if isinstance(metadata.generators, Unseeded) and not given.get("synthetic_mode"):
            lengths, probs = given["num_draft_tokens"], given["draft_probs"]
            return rejection.verify(drafts, lengths, probs, logits, bonus, metadata, width)
        return original(*args, **kwargs)

    return rejection_sample


def _draft(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sample_draft_tokens(self: Any, hidden_states: Tensor, sampling_metadata: Any) -> Any:
        noise = sampling_metadata.generators
        other_vocabulary = getattr(self, "use_heterogeneous_vocab", False)
        if not isinstance(noise, Noise) or sampling_metadata.all_greedy or other_vocabulary:
            return original(self, hidden_states, sampling_metadata)
        return coupled.draft(noise, self.model.compute_logits(hidden_states), sampling_metadata), None

    return _sample_draft_tokens


def sample(module: ModuleType) -> None:
    """Touch `vllm.v1.worker.gpu_model_runner`: put what the pass draws with where the sampler looks for generators.

    vLLM keeps one generator per seeded request and consumes it as it goes, so that a seeded request gives other tokens
    with speculation than without (its documentation promises no more); noise by position needs a channel of its own.
    """
    rebind(module.GPUModelRunner, "_sample", _sample)


def verify(module: ModuleType) -> None:
    """Touch `vllm.v1.sample.rejection_sampler`: verify by `coupled.verify` or `rejection.verify` where told so."""
    rebind(module, "rejection_sample", _verify)


def draft(module: ModuleType) -> None:
    """Touch `vllm.v1.spec_decode.llm_base_proposer`: draft with the noise that the target will choose with."""
    rebind(module.SpecDecodeBaseProposer, "_sample_draft_tokens", _draft)
