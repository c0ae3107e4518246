#!/usr/bin/env python3
"""The vLLM plugin on one GPU, on vLLM's V2 and V1 runners: is it exact there, do updates and sleep hold, what is it worth.

    python benchmarks/gpu/vllm_cells.py                     # everything
    python benchmarks/gpu/vllm_cells.py --cells exact-v2    # one cell

Every cell is a process of its own with a report of its own, so one that crashes costs the others nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the cells look into the engine
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

NEAR_TIE = 1e-4  # nats between the two best tokens
KIND = "int4"
LONGEST, SAMPLES, SIGNIFICANT = 4, 3000, 1e-4
KV_BYTES = 256 << 20
QUICK = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # graphs without compilation
MINUTES, TIMING_MINUTES = 4.0, 9.0
VOCABULARY = 152_064  # of the policy grown to 7B, as Qwen2.5's


class Engine:
    """A vLLM engine in this process; with `speculation`, the plugin's options, it is asked to draft."""

    def __init__(self, path: str, speculation: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM

        from rollout_spec.integrations.vllm import compat_worker
        from rollout_spec.integrations.vllm.arguments import llm_arguments

        given = {"model": path} if speculation is None else llm_arguments(path, speculation)
        defaults = {
            "dtype": "float32", "compilation_config": QUICK, "max_model_len": 512, "max_num_seqs": 64, "seed": 0,
            "kv_cache_memory_bytes": KV_BYTES, "enable_prefix_caching": False, "disable_log_stats": False,
            "skip_tokenizer_init": True,
        }  # fmt: skip
        began = time.perf_counter()
        self.llm: Any = LLM(**(given | defaults | options))
        self.seconds = time.perf_counter() - began
        self.core = self.llm.llm_engine
        self.scheduler = compat_worker.scheduler(self.core)
        self.runner = compat_worker.model_runner(self.core)

    @property
    def config(self) -> Any:
        return self.core.vllm_config

    @property
    def drafter(self) -> Any:
        """What drafts."""
        from rollout_spec.integrations.vllm import compat_worker

        return compat_worker.drafter_of(self.runner)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, **params: Any) -> list[Any]:
        """First completion of every prompt; greedy unless `params` say otherwise."""
        from vllm import SamplingParams

        asked = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "max_tokens": tokens} | params
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [x.outputs[0] for x in self.llm.generate(given, SamplingParams(**asked), use_tqdm=False)]

    def counters(self) -> tuple[int, int]:
        """Drafts verified and accepted since the start of the process."""
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
        return tuple(int(found[name].value) if name in found else 0 for name in names)  # type: ignore[return-value]

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """The same since then."""
        drafted, accepted = self.counters()
        return drafted - before[0], accepted - before[1]


def _policy() -> tuple[str, list[list[int]]]:
    """The shipped policy, and prompts it knows how to answer."""
    from transformers import AutoTokenizer

    from rollout_spec.example_policy import example_folder, load_problems

    path = str(example_folder() / "policy")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return path, [list(tokenizer(text)["input_ids"]) for text in load_problems().prompts(16, 0, "test")]


def _about(part: Any, engine: Engine, runner: str) -> None:
    """What was started, as vLLM itself has it; a failed check if it is another runner than the cell's."""
    config = engine.config
    module = type(engine.runner).__module__
    part.check("runner", module, runner, (".gpu.model_runner" in module) == (runner == "v2"))
    part.keep(
        drafter_class=type(engine.drafter).__name__,
        graphs=str(config.compilation_config.cudagraph_mode),
        compilation=str(config.compilation_config.mode),
        asynchronous=type(engine.scheduler).__name__,
        start_seconds=round(engine.seconds, 1),
    )


def exact(part: Any, runner: str) -> None:
    """Greedy tokens and sampled distributions are those of plain decoding; a drafter that lies is seen."""
    from rollout_spec.policy.baselines import Fixed, Off, RandomLengths

    path, prompts = _policy()
    stock, ours = Engine(path), Engine(path, {"drafter": KIND, "longest_draft": LONGEST})
    _about(part, ours, runner)
    blocks = [engine.config.cache_config.num_gpu_blocks for engine in (stock, ours)]
    part.check("the drafter takes no KV blocks", blocks, "equal", blocks[0] == blocks[1])
    plain = stock.generate(prompts, 96, logprobs=2)
    for name, policy in (
        ("K=4", Fixed(4)), ("random K", RandomLengths(0, longest=4)), ("toggled", RandomLengths(1, longest=4, off=0.7)),
        ("off", Off()),
    ):  # fmt: skip
        with part.attempt(f"greedy, {name}"):
            ours.scheduler.decisions.policy = policy
            before = ours.counters()
            _same(part, f"greedy, {name}", plain, ours.generate(prompts, 96))
            drafted, accepted = ours.since(before)
            enough = drafted == 0 if name == "off" else accepted > 0.5 * drafted > 50
            part.check(f"greedy, {name}: drafts", f"{accepted} of {drafted}", "as the policy asks", enough)
    for name, params in (
        ("T=1", {"temperature": 1.0}),
        ("T=0.8, cut", {"temperature": 0.8, "top_k": 8, "top_p": 0.95}),
    ):
        with part.attempt(f"distribution, {name}"):
            _distribution(part, f"distribution, {name}", ours, prompts[0], params)
    if runner == "v2":
        with part.attempt("a lying drafter"):
            _liar(part, ours, prompts[0])


def _same(part: Any, name: str, plain: Sequence[Any], ours: Sequence[Any]) -> None:
    """Where token ids part first, the two best tokens must have been a near-tie."""
    gaps, tokens = [], 0
    for want, got in zip(plain, ours, strict=True):
        a, b = list(want.token_ids), list(got.token_ids)
        tokens += len(a)
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            best = sorted((x.logprob for x in want.logprobs[at].values()), reverse=True)
            gaps.append(best[0] - best[1])
    found = f"{tokens} tokens, {len(gaps)} of {len(plain)} part" + (
        f", widest gap {max(gaps):.2g}" if gaps else ""
    )
    part.check(name, found, f"the same but for gaps < {NEAR_TIE}", max(gaps, default=0.0) < NEAR_TIE)


def _answers(
    engine: Engine, policy: Any, prompt: list[int], params: dict[str, Any]
) -> Counter[tuple[int, ...]]:
    engine.scheduler.decisions.policy = policy
    return Counter(tuple(x.token_ids) for x in engine.generate([prompt] * SAMPLES, 4, **params))


def _distribution(
    part: Any, name: str, engine: Engine, prompt: list[int], params: dict[str, Any], fits: bool = True
) -> None:
    """Two-sample chi-square over answers of four tokens, rare ones together: drafted against plain."""
    from scipy.stats import chi2_contingency

    from rollout_spec.policy.baselines import Fixed, Off

    before = engine.counters()
    plain, drafted = (_answers(engine, policy, prompt, params) for policy in (Off(), Fixed(3)))
    count, _ = engine.since(before)
    common = [x for x, n in (plain + drafted).items() if n >= 20]
    table = np.array(
        [[c[x] for x in common] + [SAMPLES - sum(c[x] for x in common)] for c in (plain, drafted)]
    )
    table = table[:, table.any(0)]
    p = float(chi2_contingency(table).pvalue)
    ok = (p > SIGNIFICANT) == fits and count > SAMPLES
    target = f"p {'>' if fits else '<='} {SIGNIFICANT}, drafted"
    part.check(name, f"p = {p:.2g}, {table.shape[1]} kinds of answers, {count} drafts", target, ok)


def _liar(part: Any, engine: Engine, prompt: list[int]) -> None:
    """Certain drafts that claim to be drawn uniformly are accepted too often: the chi-square has to see it."""
    drafter = engine.drafter
    honest, graphs = drafter.sample_draft, drafter.graphs
    drafter.graphs = None  # they hold the honest one

    def certain(hidden: Any, *rest: Any) -> Any:
        drafter.draft_logits.zero_()
        return drafter.model.compute_logits(hidden).argmax(-1)

    drafter.sample_draft = certain
    try:
        _distribution(
            part,
            "a drafter that lies about its distribution is seen",
            engine,
            prompt,
            {"temperature": 1.0},
            False,
        )
    finally:
        drafter.sample_draft, drafter.graphs = honest, graphs


def graphs(part: Any, runner: str) -> None:
    """As users start it: bf16, graphs, the automatic policy, chunked prefill and prefix caching."""
    path, prompts = _policy()
    engine = Engine(
        path, {"drafter": KIND}, dtype="bfloat16", compilation_config={}, enable_prefix_caching=True, max_num_batched_tokens=256,
        max_num_seqs=16,
    )  # fmt: skip
    _about(part, engine, runner)
    part.keep(capture_sizes=str(engine.config.compilation_config.cudagraph_capture_sizes))
    before = engine.counters()
    lengths = [len(x.token_ids) for x in engine.generate(prompts * 4, 128, temperature=1.0, ignore_eos=False)]
    for _ in range(4):  # a long tail of one
        lengths += [len(x.token_ids) for x in engine.generate(prompts[:1], 256, temperature=1.0)]
    drafted, accepted = engine.since(before)
    decisions = engine.scheduler.decisions
    part.check(
        "finishes",
        f"{len(lengths)} answers, {sum(lengths)} tokens",
        "68 answers",
        len(lengths) == 68 and min(lengths) > 0,
    )
    part.check("drafted", f"{accepted} of {drafted} accepted", "some", 0 < accepted <= drafted)
    part.keep(
        reasons={reason.value: n for reason, n in decisions.reasons.items()},
        draft_lengths={str(k): n for k, n in sorted(decisions.draft_lengths.items())},
        state=str(engine.llm.collective_rpc("rollout_spec_state")),
    )


def weights(part: Any, runner: str) -> None:
    """Updates, a broken drafter, and both levels of sleep: outputs are those of a fresh engine throughout."""
    import torch
    from safetensors.torch import load_file

    from rollout_spec.integrations.vllm.weights import states, update_weights
    from rollout_spec.policy.baselines import Fixed

    sys.path.insert(0, str(ROOT / "tests" / "vllm"))
    from small_engines import perturbed

    path, prompts = _policy()
    other = perturbed(path, Path(tempfile.mkdtemp()) / "other", 0.1)
    fresh = {
        name: Engine(folder).generate(prompts, 64, logprobs=2)
        for name, folder in (("first", path), ("second", other))
    }
    ours = Engine(
        path, {"drafter": KIND, "longest_draft": LONGEST}, enable_sleep_mode=torch.cuda.is_available()
    )
    _about(part, ours, runner)

    def agree(name: str, version: str) -> None:
        ours.scheduler.decisions.policy = Fixed(4)
        before = ours.counters()
        _same(part, name, fresh[version], ours.generate(prompts, 64))
        drafted, accepted = ours.since(before)
        part.check(
            f"{name}: drafts", f"{accepted} of {drafted}", "most accepted", accepted > 0.5 * drafted > 50
        )

    agree("before updates", "first")
    for turn, (folder, version) in enumerate([(other, "second"), (path, "first")] * 2, 1):
        with part.attempt(f"update {turn}"):
            report = update_weights(
                ours.llm, load_file(f"{folder}/model.safetensors").items(), version=turn, contexts=prompts
            )
            agree(f"update {turn}", version)
            state = states(ours.core)[0]
            fits = (
                state["version"] == state["drafter_version"] == turn == report.version
                and state["canary_acceptance"] > 0.8
            )
            part.check(f"update {turn}: versions and canary", str(state), "one version, canary > 0.8", fits)
    with part.attempt("sleep level 1"):
        ours.llm.sleep(level=1)
        ours.llm.wake_up()
        agree("after sleep level 1", "first")
    with part.attempt("sleep level 2"):
        ours.llm.sleep(level=2)
        ours.llm.wake_up(tags=["weights"])
        update_weights(ours.llm, load_file(f"{other}/model.safetensors").items(), version=9)
        ours.llm.wake_up(tags=["kv_cache"])
        agree("after sleep level 2 and an update", "second")
        state = states(ours.core)[0]
        judged = not state["canary_due"] and state["canary_acceptance"] is not None
        part.check("the canary ran when the cache woke", state["canary_acceptance"], "not None", judged)
    with part.attempt("a broken drafter"):
        model = getattr(ours.drafter, "model", None) or ours.runner.get_draft_model()
        for module in model.modules():
            if hasattr(module, "quantized"):
                for tensor in module.quantized.tensors().values():
                    tensor.copy_(tensor.flatten().flip(0).reshape(tensor.shape))
        outputs = ours.generate(prompts, 64)
        _same(part, "with a broken drafter", fresh["second"], outputs)
        ours.generate(prompts, 64)
        drafts, why = states(ours.core)[0]["drafts"], ours.scheduler.figures()["set_aside"]
        found = f"by the scheduler: {why}; by the worker: {not drafts}"
        part.check("a broken drafter is set aside", found, "by either", why is not None or not drafts)


def timing(part: Any, runner: str) -> None:
    """Plain vLLM against vLLM with the plugin, bf16 and graphs, on the policy grown to 7B: `rollout-spec bench vllm`."""
    import torch
    from rich.console import Console

    from rollout_spec.benchmarks.vllm import VllmBenchmark
    from rollout_spec.example_policy import expanded_policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    bench = VllmBenchmark(expanded_policy("7b", VOCABULARY, device), 7, 0, Console(width=160))
    part.keep(expanding_seconds=round(time.monotonic() - began, 1), drafter=bench.drafter)
    for name, measure in (
        ("never slower", bench.never_slower),
        ("a long tail of 64", lambda: bench.long_tail(64, alternatives=False)),
    ):
        with part.attempt(name):
            measure()
            bench.finish()
        part.keep(ratios=bench.ratios, notes=bench.notes)
    _keep_costs(part, bench.engine("plugin").llm_engine)


def _keep_costs(part: Any, core: Any) -> None:
    """How many graphs of draft steps there are, and what the plugin believes that steps cost."""
    from rollout_spec.integrations.vllm import compat_worker

    drafter = compat_worker.drafter_of(compat_worker.model_runner(core))
    graphs = getattr(drafter, "graphs", None)
    policy = compat_worker.scheduler(core).decisions.policy
    part.keep(
        draft_graphs=None if graphs is None else len(graphs.graphs),
        forwards=getattr(drafter, "forwards", None),
        timings=[str(x) for x in getattr(policy, "timings", ())],
    )


CELLS: dict[str, Callable[[Any, str], None]] = {
    "exact": exact,
    "graphs": graphs,
    "weights": weights,
    "timing": timing,
}
ALL = [*(f"{name}-{runner}" for name in CELLS for runner in ("v2", "v1")), "linears"]


def run_cell(cell: str, out: Path) -> int:
    """One cell in this process; 1 if a check failed."""
    import torch
    from figures import Part, Record, ReportFile
    from linears import linears

    from rollout_spec.observe.report import EvidenceLevel

    logging.basicConfig(level=logging.WARNING)
    name, _, runner = cell.partition("-")
    level = EvidenceLevel.L2
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cell": cell,
        "samples": SAMPLES,
    }
    record = Record(ReportFile(out / f"vllm-{cell}.json", "gpu-vllm", level, 0), about, {}, level.value)
    part = Part(record, cell, time.monotonic() + 60 * TIMING_MINUTES)
    began, status = time.monotonic(), "done"
    try:
        if runner:
            CELLS[name](part, runner)
        else:
            linears(part)
    except Exception as error:
        part.failed("runs to its end", error)
        status = "failed"
    part.end(time.monotonic() - began, status)
    return int(any(not check.passed for check in record.checks))


def main() -> int:
    """Every cell in a process of its own; those that are not timed side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(ALL), help="comma-separated: " + " ".join(ALL))
    parser.add_argument("--out", help="folder; default $OUT")
    parser.add_argument("--here", action="store_true", help="run the one cell in this process")
    options = parser.parse_args()
    out, cells = Path(options.out or os.environ.get("OUT") or "."), options.cells.split(",")
    if unknown := set(cells) - set(ALL):
        parser.error(f"--cells: unknown {', '.join(sorted(unknown))}; use some of {', '.join(ALL)}")
    if options.here:
        return run_cell(cells[0], out)
    alone = [cell for cell in cells if cell.startswith(("timing", "linears"))]
    together = [cell for cell in cells if cell not in alone]
    codes: dict[str, int] = {}
    for group in filter(None, (together, *([cell] for cell in alone))):
        running = {cell: _start(cell, out) for cell in group}
        end = time.monotonic() + 60 * (TIMING_MINUTES if group[0] in alone else MINUTES)
        for cell, process in running.items():
            codes[cell] = _wait(process, end - time.monotonic())
        for cell in running:
            _tell(cell, out, codes[cell])
    return int(any(codes.values()))


def _start(cell: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--here", "--cells", cell, "--out", str(out)]
    flag = {"VLLM_USE_V2_MODEL_RUNNER": "1" if cell.endswith("v2") else "0"}
    with (out / f"vllm-{cell}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | flag)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code; 124 after that many seconds."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        return 124


def _tell(cell: str, out: Path, code: int) -> None:
    print(f"{cell}: exit {code}", flush=True)
    path = out / f"vllm-{cell}.json"
    checks = json.loads(path.read_text())["checks"] if path.is_file() else []
    for check in checks:
        print(f"  {'ok' if check['passed'] else 'FAILED'} {check['name']}: {check['value']}", flush=True)
    if not path.is_file() or code:
        print((out / f"vllm-{cell}.log").read_text(errors="replace")[-1500:], flush=True)


if __name__ == "__main__":
    sys.exit(main())
