"""The measurements behind `rollout-spec bench engine`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rollout_spec.benchmarks.degrade import acceptance as measured_acceptance
from rollout_spec.benchmarks.degrade import degrade
from rollout_spec.benchmarks.paired import Paired, paired
from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import example_folder, expanded_policy, load_problems
from rollout_spec.policy.baselines import Fixed, Off

_DRAFT_LENGTH = {1: 6, 4: 4}  # by live batch; fixed beforehand, not the best of several
_SPEEDUP = {1: 1.5, 4: 1.05}
_TOKENS = 96
_RAGGED_BATCH, _LONGEST = 16, 512
_VOCABULARIES = (32000, 152064)
_DEGRADED = (0.96, 0.90)


class EngineBenchmark:
    """Runs the parts and collects ratios.

    Attributes:
        ratios: By name: median, spread, number of pairs, median seconds of both sides, and the target or None.
        notes: What was measured, in words, and figures beside the ratios.
    """

    def __init__(self, model: Path | None, size: str, pairs: int, seed: int, console: Console) -> None:
        self.model, self.size, self.pairs, self.seed, self.console = model, size, pairs, seed, console
        self.ratios: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self.path = model or expanded_policy(size)
        self.prompts = load_problems().prompts(256, seed, "test")

    def against_transformers(self) -> None:
        """Plain decoding with the fastest sampler, against `transformers.generate` on the same work."""
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(self.path, dtype="auto").eval()
        engine = self._engine(self.path, drafter="none", verifier="rejection")
        assert engine.tokenizer is not None
        lengths = self._ragged_lengths()
        self.notes["ragged_lengths"] = lengths
        for name, target, wanted in (("B=1", 1.5, [64]), (f"B={_RAGGED_BATCH}, ragged", 3.0, lengths)):
            prompts = self.prompts[: len(wanted)]
            params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in wanted]
            inputs = engine.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
            longest = max(wanted)

            def transformers(inputs=inputs, longest=longest) -> None:
                with torch.inference_mode():
                    reference.generate(
                        **inputs, min_new_tokens=longest, max_new_tokens=longest, do_sample=True, temperature=1.0,
                        top_k=0, top_p=1.0, pad_token_id=0,
                    )  # fmt: skip

            def ours(prompts=prompts, params=params) -> None:
                engine.generate(prompts, params)

            self._measure(f"plain vs transformers, {name}", transformers, ours, target)

    def coupled_against_fastest_sampler(self) -> None:
        """Plain decoding with coupled noise, against plain decoding by inverting the distribution function."""
        for vocab in _VOCABULARIES if self.model is None else (None,):
            path = self.path if vocab is None else expanded_policy(self.size, vocab)
            engine = self._engine(path, drafter="none", verifier="coupled")
            for batch in (1, 16):
                params = SamplingParams(n=batch, max_tokens=24 if batch == 1 else 8, ignore_eos=True)

                def run(
                    coupled: bool, engine: RolloutEngine = engine, params: SamplingParams = params
                ) -> None:
                    engine.backend.coupled = coupled
                    engine.generate(self.prompts[:1], params)

                name = f"coupled vs fastest sampler, V={engine.backend.spec.vocab_size}, B={batch}"
                self._measure(name, partial(run, False), partial(run, True), 0.98, 3 * self.pairs)
            del engine

    def speculation_against_plain(self) -> None:
        """Speculation against the engine's own plain decoding: the same tokens of the policy's own text."""
        engine = self._engine(
            self.path,
            drafter=usual_quantizer("cpu", torch.bfloat16),
            verifier="coupled",
            canary_min_acceptance=0.0,
        )
        work = {batch: self._long_answers(engine, batch) for batch in _DRAFT_LENGTH}
        for acceptance in (None, *_DEGRADED):
            if acceptance is not None:
                with self.console.status(f"degrading the drafter to acceptance {acceptance}"):
                    degrade(engine, acceptance, [c for batch in work.values() for c in batch], self.seed)
            for batch, completions in work.items():
                name = f"speculation vs plain, B={batch}"
                target = _SPEEDUP[batch] if acceptance is None else None
                if acceptance is not None:
                    name += f", acceptance {acceptance}"
                self._speculate(name, engine, batch, completions, target)

    def _speculate(
        self,
        name: str,
        engine: RolloutEngine,
        batch: int,
        completions: list[Completion],
        target: float | None,
    ) -> None:
        ids = [completion.request_id for completion in completions]
        prompts = [completion.prompt_token_ids for completion in completions]
        params = SamplingParams(max_tokens=_TOKENS)
        seen: dict[int, list[Completion]] = {}

        def run(draft_length: int) -> None:
            engine.backend.policy = Fixed(draft_length) if draft_length else Off()
            seen[draft_length] = engine.generate(prompts, params, request_ids=ids)

        draft_length = _DRAFT_LENGTH[batch]
        self._measure(name, lambda: run(0), lambda: run(draft_length), target)
        plain, speculative = ([c.token_ids for c in seen[k]] for k in (0, draft_length))
        assert plain == speculative, "speculation changed a token"
        spec = sum((c.spec for c in seen[draft_length][1:]), seen[draft_length][0].spec)
        self.ratios[name] |= {
            "draft_length": draft_length,
            "tau": round(spec.tau, 3),
            "accepted_share_of_drafts": round(spec.acceptance, 4),
            "acceptance": round(measured_acceptance(engine, completions), 4),
            "tokens": sum(map(len, plain)),
        }

    def _measure(
        self, name: str, baseline: Callable[[], object], candidate: Callable[[], object], target: float | None,
        pairs: int | None = None,
    ) -> Paired:  # fmt: skip
        with self.console.status(name):
            result = paired(baseline, candidate, pairs or self.pairs)
        self.ratios[name] = result.to_dict() | {"target": target}
        low, high = result.spread
        self.console.print(f"{name}: {result.median:.2f}x ({low:.2f}-{high:.2f})", highlight=False)
        return result

    def _engine(self, path: Path, **speculation: Any) -> RolloutEngine:
        engine = RolloutEngine.from_pretrained(
            path, seed=self.seed, max_model_len=1024, speculation=speculation
        )
        self.notes["exactness"] = engine.stats().exactness
        return engine

    def _ragged_lengths(self) -> list[int]:
        """The quantiles (i + 1/2) / 16 of the policy's own response lengths."""
        policy = example_folder() / "policy" if self.model is None else self.path
        engine = self._engine(policy, drafter="none")
        completions = engine.generate(self.prompts, SamplingParams(max_tokens=_LONGEST))
        lengths = sorted(len(completion.token_ids) for completion in completions)
        return [lengths[int((row + 0.5) / _RAGGED_BATCH * len(lengths))] for row in range(_RAGGED_BATCH)]

    def _long_answers(self, engine: RolloutEngine, count: int) -> list[Completion]:
        """`count` requests whose answers reach `_TOKENS` tokens, so that all are live all the time."""
        engine.backend.policy = Fixed(4)
        prompts = sorted(self.prompts, key=len)[-8 * count :]
        ids = [f"bench-{count}-{row}" for row in range(len(prompts))]
        completions = engine.generate(prompts, SamplingParams(max_tokens=_TOKENS), request_ids=ids)
        return sorted(completions, key=lambda c: len(c.token_ids))[-count:]
