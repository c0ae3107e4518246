"""The measurements behind `rollout-spec bench vllm`: the plugin against vLLM as it comes, on the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.benchmarks.longtail import stratified
from rollout_spec.example_policy import load_problems
from rollout_spec.integrations.vllm.compat_worker import scheduler
from rollout_spec.observe.machine import cpu_model
from rollout_spec.policy.baselines import Off

BATCHES = (1, 2, 4, 8, 16, 32)
GPU_BATCHES = (*BATCHES, 64, 128)
_TOKENS, _GPU_TOKENS = 32, 128  # of every sequence; on a GPU its steps take milliseconds
_CALIBRATING = (
    64  # tokens in which the plugin has measured its costs at a batch size; it does so once per machine
)
_KV_BYTES, _GPU_KV_BYTES, _MAX_LEN, _LONGEST = 1 << 29, 1 << 32, 640, 160
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_DRAFT_LENGTHS = (3, 6)

Lengths = Sequence[int]


class VllmBenchmark:
    """Engines that differ in how they speculate only: one cache size, one dtype, in one process, taking turns.

    Attributes:
        ratios: By name: median and interval of one's time over the other's, and the pairs.
        dtype, drafter: `bfloat16` on a GPU and where the CPU multiplies it natively, else `float32`; the kind of drafter.
        on_gpu: Whether vLLM runs on a GPU, with graphs then.
        notes: KV blocks of every engine, what the plugin decided.
    """

    def __init__(self, path: Path, pairs: int, seed: int, console: Console) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from rollout_spec.integrations.vllm.arguments import available_kind, llm_arguments

        self.path, self.pairs, self.seed, self.console = path, pairs, seed, console
        self.ratios: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self.on_gpu = torch.cuda.is_available()
        self._batches = GPU_BATCHES if self.on_gpu else BATCHES
        native = self.on_gpu or {"avx512_bf16", "amx_bf16"} & set(cpu_model()[1])
        self.dtype = "bfloat16" if native else "float32"
        self.drafter = available_kind(getattr(torch, self.dtype))
        self._llm_arguments = llm_arguments
        self._prompts = iter(load_problems().prompts(4096, seed, "test"))
        self._engines: dict[str, Any] = {}

    def never_slower(self) -> None:
        """Plain vLLM against vLLM with the plugin, at every batch size, and against itself, which is the noise."""
        self._sweep("plugin", self._batches, 0.97)

    def overhead(self) -> None:
        """The same with a policy that never speculates: what being there costs."""
        self._sweep("plugin off", BATCHES[::2], None)

    def _sweep(self, name: str, batches: Sequence[int], target: float | None) -> None:
        self._start_both()
        if self.on_gpu:  # whose engines differ less than their starts take
            self._engines["stock again"] = self._engines["stock"]
        else:
            self._start("stock again", {})
        for batch in batches:
            tokens = _GPU_TOKENS if self.on_gpu else _TOKENS
            rounds = [(self._next(batch), [tokens] * batch) for _ in range(self.pairs + 1)]
            self._calibrate(name, batch)
            seconds = self._turns(("stock", "stock again", name), rounds)
            self._record(f"B={batch}", seconds, "stock", name, target, tokens=tokens)
            self._record(f"B={batch}", seconds, "stock", "stock again", None, tokens=tokens)

    def single(self) -> None:
        """One sequence, against vLLM's own ways to speculate."""
        names, others = self._start_alternatives()
        self._calibrate("plugin", 1)
        seconds = self._turns(names, [(self._next(1), [_TOKENS * 2]) for _ in range(self.pairs + 1)])
        for other in others:
            self._record("one sequence", seconds, other, "plugin", 1.0)

    def long_tail(self, batch: int, alternatives: bool = True) -> None:
        """Whole rollouts with lengths of the policy's own, against vLLM, and with `alternatives` its ways to speculate.

        Then a second epoch of them, with the same prompts and lengths.
        """
        self._start_both()
        names, others = self._start_alternatives() if alternatives else (("stock", "plugin"), ("stock",))
        for size in range(batch.bit_length()):
            self._calibrate("plugin", 1 << size)
        prompts = stratified(batch, self.pairs + 1, self.seed)
        rows = [prompts[row : row + batch] for row in range(0, len(prompts), batch)]
        rounds = [(row, self._lengths(row)) for row in rows]
        lengths = [sorted(found) for _, found in rounds[1:]]
        for part in (f"long tail of {batch}", f"long tail of {batch} again"):
            seconds = self._turns(names, rounds)
            for other in others:
                self._record(part, seconds, other, "plugin", 1.0, lengths=lengths)
            for name in names:  # as a weight update does: the next epoch's prompts are the same
                self.engine(name).reset_prefix_cache()

    # --- the parts -------------------------------------------------------------------------------------

    def _start_both(self) -> None:
        self._start("stock", {})
        self._start("plugin", self._llm_arguments(str(self.path), {"drafter": self.drafter}))

    def _start_alternatives(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of all engines, and of those that the plugin is compared with."""
        self._start_both()
        own = {
            "method": "draft_model",
            "model": str(self.path),
            "quantization": f"rollout_spec_{self.drafter}",
            "draft_sample_method": "probabilistic",
        }
        names = ["stock", "ngram"]
        self._start("ngram", {"speculative_config": _NGRAM})
        for length in _DRAFT_LENGTHS:
            names.append(f"draft_model K={length}")
            self._start(names[-1], {"speculative_config": own | {"num_speculative_tokens": length}})
        return (*names, "plugin"), tuple(names)

    def _start(self, name: str, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM

        if name in self._engines:
            return
        with self.console.status(f"starting {name}"):
            engine = LLM(
                **{"model": str(self.path)} | dict(arguments),
                dtype=self.dtype,
                enforce_eager=not self.on_gpu,
                max_model_len=_MAX_LEN,
                max_num_seqs=max(self._batches),
                kv_cache_memory_bytes=_GPU_KV_BYTES if self.on_gpu else _KV_BYTES,
                gpu_memory_utilization=0.3,  # only asked whether it is free: the cache has a size of its own
                enable_prefix_caching=False,
                disable_log_stats=True,
                seed=self.seed,
            )
        self._engines[name] = engine
        blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
        self.notes.setdefault("kv_blocks", {})[name] = blocks

    def _calibrate(self, name: str, batch: int) -> None:
        """Let it measure its costs about a batch size, if it has not yet."""
        self._run([name], self._next(batch), [_CALIBRATING] * batch)

    def engine(self, name: str) -> Any:
        """The engine of that name, an `LLM`."""
        return self._engines[name]

    def _next(self, batch: int) -> list[str]:
        return [next(self._prompts) for _ in range(batch)]

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        """Output lengths of the policy's own answers; every engine then emits just as many tokens for these prompts.

        With those of others, text would go on for long behind an answer's end, where it repeats itself.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=_LONGEST, seed=self.seed)
        outputs = self._engines["stock"].generate(list(prompts), params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def _run(self, names: Sequence[str], prompts: Sequence[str], lengths: Lengths) -> list[float]:
        """Seconds that each of these engines has worked until all are done, step by step in turn."""
        from vllm import SamplingParams

        params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True) for n in lengths]
        seconds, working = [0.0] * len(names), []
        for place, name in enumerate(names):
            engine = self.engine(name.removesuffix(" off"))
            start = time.perf_counter()
            engine.enqueue(list(prompts), params, use_tqdm=False)
            seconds[place] = time.perf_counter() - start
            working.append((place, engine.llm_engine))
        with self._policies_off(names):
            while working := [x for x in working if x[1].has_unfinished_requests()]:
                for place, core in working:
                    start = time.perf_counter()
                    core.step()
                    seconds[place] += time.perf_counter() - start
        return seconds

    @contextmanager
    def _policies_off(self, names: Sequence[str]) -> Iterator[None]:
        """Let no engine speculate whose name ends so."""
        engines = [self.engine(x.removesuffix(" off")) for x in names if x.endswith(" off")]
        decisions = [scheduler(engine.llm_engine).decisions for engine in engines]
        policies = [x.policy for x in decisions]
        for one in decisions:
            one.policy = Off()
        try:
            yield
        finally:
            for one, policy in zip(decisions, policies, strict=True):
                one.policy = policy

    def _turns(
        self, names: Sequence[str], rounds: Sequence[tuple[Sequence[str], Lengths]]
    ) -> dict[str, np.ndarray]:
        """Seconds of every engine, on the prompts of each round, to these lengths; the first round does not count.

        On a CPU the engines take turns with every step, so that they meet the same drift of the machine; on a GPU,
        where a step begins before the last has ended, with every round.
        """
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn, (prompts, lengths) in enumerate(rounds):
            order = [*names[turn % len(names) :], *names[: turn % len(names)]]
            with self.console.status(f"{len(prompts)} sequences, round {turn} of {self.pairs}"):
                for together in [[name] for name in order] if self.on_gpu else [order]:
                    for name, taken in zip(together, self._run(together, prompts, lengths), strict=True):
                        seconds[name].append(taken)
        return {name: np.array(taken[1:]) for name, taken in seconds.items()}

    def _record(
        self,
        part: str,
        seconds: Mapping[str, np.ndarray],
        base: str,
        name: str,
        target: float | None,
        **notes: Any,
    ) -> None:
        ratios = seconds[base] / seconds[name]
        low, high = median_interval(ratios.tolist(), level=0.90)  # low: the one-sided 95 % bound
        title = f"{part}, {name} over {base}"
        self.ratios[title] = {
            "median_ratio": round(float(np.median(ratios)), 4),
            "lower_95": round(low, 4),
            "upper_95": round(high, 4),
            "min_ratio": round(float(ratios.min()), 4),
            "max_ratio": round(float(ratios.max()), 4),
            "target": target,
            "pairs": self.pairs,
            "seconds": [round(float(np.median(seconds[x])), 4) for x in (base, name)],
            **notes,
        }
        self.console.print(f"{title}: {np.median(ratios):.3f} ({low:.3f}-{high:.3f})", highlight=False)

    def finish(self) -> None:
        """Note what the plugin decided."""
        decisions = scheduler(self.engine("plugin").llm_engine).decisions
        self.notes["reasons"] = {reason.value: steps for reason, steps in decisions.reasons.items()}
        self.notes["drafters"] = dict(decisions.drafters)
        self.notes["draft_lengths"] = {str(k): steps for k, steps in sorted(decisions.draft_lengths.items())}
