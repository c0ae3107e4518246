"""The measurements behind `rollout-spec bench kernels`: bf16 decoding and drafting on the CPU kernels."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from rollout_spec.benchmarks.paired import Paired, paired
from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.drafters.quantize import get_quantizer
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems
from rollout_spec.kernels.decoder_layer import LayersInOneCall
from rollout_spec.kernels.library import kernels
from rollout_spec.kernels.memory import WeightMemory
from rollout_spec.models.checkpoint import read_checkpoint
from rollout_spec.models.weights import WeightAssembler, is_linear
from rollout_spec.policy.baselines import Delegate, Fixed, Off
from rollout_spec.policy.records import Plan, StepState

DRAFT_LENGTH = {1: 4, 4: 2}  # by live batch; fixed beforehand, on other prompts
SPEEDUP = {1: 1.6, 4: 1.12}
VERIFY_ROWS, VERIFY_OVER_ONE = 5, 1.15
LINEAR_ROWS = (1, 4, 16, 64, 256)
BANDWIDTH = {1: 0.70, 2: 0.80}  # of a streaming read, by threads
OUTSIDE = 0.15
KERNELS = ("bf16_linear", "attention", "store_entries", "rms_norm", "norm_rotate", "gated_silu")
REQUANTIZE_SECONDS, REQUANTIZE_OVER_COPY = 1.0, 1.5
_TOKENS, _CONTEXT, _STEPS = 64, 64, 24
_READ_BYTES = 1 << 29
LLAMA_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "llama_decode.py"


class KernelBenchmark:
    """Runs the parts and collects ratios, each with its pairs, spread and target.

    Attributes:
        ratios: By name; above 1 this project is faster.
        notes: Figures beside them.
    """

    def __init__(self, path: Path, drafter: str, pairs: int, seed: int, console: Console) -> None:
        self.path, self.pairs, self.seed, self.console = path, pairs, seed, console
        self.ratios: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {"threads": torch.get_num_threads(), "drafter": drafter}
        self.engine = RolloutEngine.from_pretrained(
            path,
            dtype="bfloat16",
            seed=seed,
            max_model_len=1024,
            speculation={"drafter": drafter, "draft_length": DRAFT_LENGTH[1], "canary_min_acceptance": 0.0},
        )
        self.notes["exactness"] = self.engine.stats().exactness
        self.prompts = load_problems().prompts(256, seed, "test")

    # --- plain decoding --------------------------------------------------------------------------------

    def bandwidth(self) -> None:
        """A plain pass against streaming as many bytes as its linears read."""
        data = torch.ones(_READ_BYTES // 4)
        linears = sum(n * k for n, k in self._shapes()) * 2
        result = self._pair(
            "share of a streaming read",
            lambda: data.sum(),
            self._passes(1),
            BANDWIDTH.get(torch.get_num_threads()),
            scale=linears * _STEPS / _READ_BYTES,
        )
        self.notes["streaming_read_GBps"] = round(_READ_BYTES / result.baseline_seconds / 1e9, 2)
        self.notes["plain_pass_ms"] = round(1e3 * result.candidate_seconds / _STEPS, 2)

    def linears(self) -> None:
        """The products of a pass by number of rows, against torch's of the same weights."""
        own = kernels()
        assert own is not None, "there are no kernels here"
        weights = self._linear_weights()
        packed = [(own.pack_bf16(weight), weight.shape[0]) for weight in weights]
        self.notes["kernels"] = own.variant

        def theirs(inputs: dict[int, Tensor]) -> list[Tensor]:
            return [functional.linear(inputs[weight.shape[1]], weight) for weight in weights]

        def ours(inputs: dict[int, Tensor]) -> list[Tensor]:
            rows = (inputs[weight.shape[1]] for weight in weights)
            return [own.bf16_linear(x, p, n, None) for x, (p, n) in zip(rows, packed)]

        for rows in LINEAR_ROWS:
            inputs = {k: torch.randn(rows, k).bfloat16() for k in {weight.shape[1] for weight in weights}}
            self._pair(
                f"linears of {rows} rows over torch's", partial(theirs, inputs), partial(ours, inputs), 1.0
            )

    def verify(self) -> None:
        """A pass over five rows of a sequence, against a pass over one, behind as many cached tokens on average."""
        later = _CONTEXT + (VERIFY_ROWS - 1) * (_STEPS - 1) // 2
        self._pair("five rows over one", self._passes(VERIFY_ROWS), self._passes(1, later), None)
        self.ratios["five rows over one"]["at_most"] = VERIFY_OVER_ONE

    def overhead(self) -> None:
        """The share of plain decoding's time that is spent outside the kernels, sampling included."""
        own = kernels()
        assert own is not None, "there are no kernels here"
        run, spent = self._plain(1), 0.0

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def inner(*arguments: Any) -> Any:
                nonlocal spent
                start = time.perf_counter()
                result = call(*arguments)
                spent += time.perf_counter() - start
                return result

            return inner

        run()
        shares = []
        layers = LayersInOneCall.__call__
        try:
            for name in KERNELS:
                setattr(own, name, timed(getattr(own, name)))
            LayersInOneCall.__call__ = timed(layers)  # type: ignore[method-assign]
            for _ in range(self.pairs):
                spent = 0.0
                total = _seconds(run)
                shares.append(1 - spent / total)
        finally:
            for name in KERNELS:
                vars(own).pop(name, None)
            LayersInOneCall.__call__ = layers  # type: ignore[method-assign]
        self.notes["share_outside_kernels"] = {
            "median": round(statistics.median(shares), 4),
            "min": round(min(shares), 4),
            "max": round(max(shares), 4),
            "at_most": OUTSIDE,
        }

    def against_llama_cpp(self, python: Path) -> None:
        """Passes without sampling on both sides, on the same weights and as many cached tokens."""
        out = self.path.parent / f"{self.path.name}.gguf"
        threads = torch.get_num_threads()
        command = [str(python), str(LLAMA_SCRIPT), str(self.path), str(out), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            self.notes["llama-cpp-python"] = json.loads(process.stdout.readline())["version"]
            ask, answers = process.stdin, process.stdout

            def theirs(rows: int) -> float:
                ask.write(f"{_CONTEXT} {rows} {_STEPS}\n")
                return float(answers.readline())

            for rows, target in ((1, 1.0), (VERIFY_ROWS, None)):
                own = self._passes(rows)
                seconds: tuple[list[float], list[float]] = ([], [])
                for pair in range(self.pairs + 1):
                    found = (theirs(rows), _seconds(own)) if pair % 2 else (_seconds(own), theirs(rows))[::-1]
                    for side, value in zip(seconds, found):
                        side.append(value)
                self._record(f"over llama.cpp, {rows} rows", seconds, target)
            ask.close()

    def against_transformers(self) -> None:
        """`transformers.generate`, sampling at T=1, against plain decoding."""
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16).eval()
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        inputs = tokenizer(self.prompts[:1], return_tensors="pt")

        def theirs() -> None:
            with torch.inference_mode():
                reference.generate(
                    **inputs, min_new_tokens=_STEPS, max_new_tokens=_STEPS, do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, pad_token_id=0,
                )  # fmt: skip

        self._pair("over transformers, B=1", theirs, self._plain(1), 2.5)

    def against_vllm(self) -> None:
        """vLLM's CPU build, without a plugin, against plain decoding."""
        from rollout_spec.benchmarks.vllm import VllmBenchmark

        other = VllmBenchmark(self.path, self.pairs, self.seed, self.console)
        other._start("stock", {})
        from vllm import SamplingParams as TheirParams

        params = TheirParams(max_tokens=_STEPS, ignore_eos=True, temperature=1.0)
        for batch in (1, 8, 32):
            prompts = self.prompts[:batch]
            run = self._plain(batch)
            engine = other._engines["stock"]
            self._pair(
                f"over vLLM, B={batch}",
                partial(engine.generate, prompts, params, use_tqdm=False),
                run,
                1.0,
            )

    # --- drafting --------------------------------------------------------------------------------------

    def speculation(self) -> None:
        """Speculation against plain decoding: the same tokens of the policy's own text, with and without the prompts' pass."""
        for batch, draft_length in DRAFT_LENGTH.items():
            completions = self._long_answers(batch)
            ids = [completion.request_id for completion in completions]
            prompts = [completion.prompt_token_ids for completion in completions]
            seen: dict[int, list[Completion]] = {}
            decoding: dict[int, list[float]] = {0: [], draft_length: []}

            def run(
                length: int,
                prompts: Any = prompts,
                ids: Any = ids,
                seen: dict[int, list[Completion]] = seen,
                decoding: dict[int, list[float]] = decoding,
            ) -> None:
                clock = self.engine.backend.policy = _SinceFirstPlan(Fixed(length) if length else Off())
                seen[length] = self.engine.generate(
                    prompts, SamplingParams(max_tokens=_TOKENS), request_ids=ids
                )
                decoding[length].append(clock.seconds())

            name = f"speculation over plain, B={batch}"
            target = SPEEDUP[batch] if torch.get_num_threads() == 1 or batch > 1 else None
            self._pair(f"{name}, prompts included", partial(run, 0), partial(run, draft_length), None)
            self._record(name, (decoding[0], decoding[draft_length]), target)
            plain, drafted = ([c.token_ids for c in seen[k]] for k in (0, draft_length))
            spec = sum((c.spec for c in seen[draft_length][1:]), seen[draft_length][0].spec)
            self.ratios[name] |= {
                "draft_length": draft_length,
                "tau": round(spec.tau, 3),
                "identical": plain == drafted,
            }

    def requantization(self) -> None:
        """The drafter's linears from a stream of tensors, against copying the same tensors to memory of the same kind."""
        quantizer = get_quantizer(str(self.notes["drafter"]), "cpu", torch.bfloat16)
        linears = self._linear_weights()

        def copy() -> list[Tensor]:
            memory = WeightMemory()
            return [memory.take(x.numel(), x.dtype).view(x.shape).copy_(x) for x in linears]

        def quantize() -> list[object]:
            return [quantizer.quantize(weight) for weight in linears]

        result = self._pair("copying over re-quantizing", copy, quantize, 1 / REQUANTIZE_OVER_COPY)
        self.notes["requantize_seconds"] = round(result.candidate_seconds, 3)
        self.notes["copy_seconds"] = round(result.baseline_seconds, 3)
        stored = list(self._stored())
        began = time.perf_counter()
        self.engine.update_weights(iter(stored))
        self.notes["whole_update_seconds"] = round(time.perf_counter() - began, 3)

    # --- means -----------------------------------------------------------------------------------------

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(torch.bfloat16)) for name, tensor in read_checkpoint(self.path))

    def _linear_weights(self) -> list[Tensor]:
        """The target's, bfloat16 [N, K] each, as the engine puts them together."""
        assembler = WeightAssembler(self.engine.backend.spec, torch.bfloat16)
        pieces = [piece for name, tensor in self._stored() for piece in assembler.feed(name, tensor)]
        return [piece.weight for piece in pieces if is_linear(piece.slot)]

    def _shapes(self) -> list[tuple[int, int]]:
        from rollout_spec.torch_backend.weights import linear_shapes

        return linear_shapes(self.engine.backend.spec)

    def _passes(self, rows: int, context: int = _CONTEXT) -> Callable[[], object]:
        """Passes of the target over `rows` rows of one sequence behind `context` cached tokens, without sampling."""
        runner, pool = self.engine.backend.runner, self.engine.backend.pool
        length = context + rows * _STEPS
        tokens = np.random.default_rng(0).integers(0, self.engine.backend.spec.vocab_size, length)
        blocks = pool.allocate(-(-length // self.engine.config.block_size))

        def run() -> None:
            with torch.inference_mode():
                for stop in range(context + rows, length + 1, rows):
                    runner.score(runner.target, tokens[:stop], blocks, stop - rows)

        with torch.inference_mode():
            runner.score(runner.target, tokens[:context], blocks)
        return run

    def _plain(self, batch: int) -> Callable[[], object]:
        params = SamplingParams(max_tokens=_STEPS, ignore_eos=True)

        def run() -> None:
            self.engine.backend.policy = Off()
            self.engine.generate(self.prompts[:batch], params)

        return run

    def _long_answers(self, count: int) -> list[Completion]:
        """`count` requests whose answers reach `_TOKENS` tokens, so that all are live all the time."""
        self.engine.backend.policy = Fixed(4)
        prompts = sorted(self.prompts, key=len)[-4 * count :]
        ids = [f"bench-{count}-{row}" for row in range(len(prompts))]
        done = self.engine.generate(prompts, SamplingParams(max_tokens=_TOKENS), request_ids=ids)
        return sorted(done, key=lambda c: len(c.token_ids))[-count:]

    def _pair(
        self,
        name: str,
        baseline: Callable[[], object],
        candidate: Callable[[], object],
        target: float | None,
        scale: float = 1.0,
    ) -> Paired:
        with self.console.status(name):
            result = paired(baseline, candidate, self.pairs)
        scaled = Paired(
            tuple(r * scale for r in result.ratios), result.baseline_seconds, result.candidate_seconds
        )
        self._keep(name, scaled, target)
        return result

    def _record(self, name: str, seconds: tuple[list[float], list[float]], target: float | None) -> None:
        """Ratios of the first side to the second, the first pair left out."""
        theirs, ours = (side[1:] for side in seconds)
        ratios = tuple(a / b for a, b in zip(theirs, ours))
        self._keep(name, Paired(ratios, statistics.median(theirs), statistics.median(ours)), target)

    def _keep(self, name: str, result: Paired, target: float | None) -> None:
        self.ratios[name] = result.to_dict() | {"target": target}
        low, high = result.spread
        self.console.print(f"{name}: {result.median:.2f}x ({low:.2f}-{high:.2f})", highlight=False)


class _SinceFirstPlan(Delegate):
    """A policy that knows when decoding began: it is asked in decode passes alone."""

    _began: float | None = None

    def plan(self, state: StepState) -> Plan:
        if self._began is None:
            self._began = time.perf_counter()
        return super().plan(state)

    def seconds(self) -> float:
        """Since the first plan."""
        assert self._began is not None, "nothing was decoded"
        return time.perf_counter() - self._began


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
