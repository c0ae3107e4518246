"""`rollout-spec bench`: paired measurements on this machine, against what one would use otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from rollout_spec.benchmarks.engine import EngineBenchmark
from rollout_spec.benchmarks.longtail import PUBLISHED, LongTail
from rollout_spec.benchmarks.never_slower import BATCHES, NeverSlower, decision_microseconds
from rollout_spec.benchmarks.toggling import toggling_overhead
from rollout_spec.commands.bench_drafter import adaptive, capture, spot
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.example_policy import SIZES, expanded_policy
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish, report_options


@click.group()
def command() -> None:
    """Paired, interleaved measurements: medians of ratios, with their spread."""


for _benchmark in (adaptive, capture, spot):
    command.add_command(_benchmark)


@command.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--size", type=click.Choice(SIZES), default="300m", show_default=True, help="Of the shipped policy."
)
@click.option("--pairs", type=click.IntRange(1, 100), default=5, show_default=True, help="Pairs per ratio.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads; default: torch's own."
)
@click.option("--only", multiple=True, help="Run only these parts (transformers, sampler, speculation).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def engine(
    model: Path | None,
    size: str,
    pairs: int,
    threads: int | None,
    only: tuple[str, ...],
    seed: int,
    json_path: Path | None,
) -> None:
    """The engine against transformers, coupled against the fastest sampler, speculation against plain decoding.

    MODEL is a checkpoint folder; by default the shipped arithmetic policy, expanded without changing its
    function so that its cost is realistic while text and lengths are real.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    benchmark = EngineBenchmark(model, size, pairs, seed, console)
    parts: dict[str, Callable[[], None]] = {
        "transformers": benchmark.against_transformers,
        "sampler": benchmark.coupled_against_fastest_sampler,
        "speculation": benchmark.speculation_against_plain,
    }
    unknown = [name for name in only if name not in parts]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}: use one of {', '.join(parts)}", param_hint="--only")
    for name, run in parts.items():
        if not only or name in only:
            run()
    console.print(_table(benchmark.ratios))
    checks = [
        Check(
            name, round(row["median_ratio"], 3), f">= {row['target']}", row["median_ratio"] >= row["target"]
        )
        for name, row in benchmark.ratios.items()
        if row["target"] is not None
    ]
    results: dict[str, Any] = {
        "model": str(model or f"shipped arithmetic policy, expanded to {size}"),
        "load_average_at_end": os.getloadavg()[0],
        "ratios": benchmark.ratios,
        "notes": benchmark.notes,
    }
    report = Report("bench engine", results, checks, evidence_level=EvidenceLevel.L1, seed=seed)
    finish(report, json_path, console, show_checks=False)


_longtail_targets = {  # by samples in a rollout: with the quantized drafter alone, with all on the second epoch
    8: (1.25, 1.4),
    32: (1.1, 1.25),
}


@command.command("longtail")
@click.option(
    "--size", type=click.Choice(SIZES), default="300m", show_default=True, help="Of the shipped policy."
)
@click.option(
    "--batch", type=click.Choice(("8", "32")), multiple=True, help="Samples per rollout; default: both."
)
@click.option("--draws", type=click.IntRange(1), default=20, show_default=True, help="Rollouts counted.")
@click.option(
    "--degraded/--no-degraded",
    default=True,
    show_default=True,
    help="Also with worse acceptance, at the end.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def longtail(
    size: str, batch: tuple[str, ...], draws: int, degraded: bool, seed: int, json_path: Path | None
) -> None:
    """Makespan of whole rollouts with the policy's own lengths, under every way of deciding."""
    console = Console()
    results: dict[str, Any] = {"model": f"shipped arithmetic policy, expanded to {size}"}
    checks: list[Check] = []
    for count in map(int, batch or ("8", "32")):
        part = LongTail(expanded_policy(size), count, draws, seed, console)
        part.run()
        if degraded:
            part.degraded()
        results[f"B={count}"] = {"speedups": part.results, "automatic_over": part.over, "notes": part.notes}
        speedup = {name: row["speedup"] for name, row in part.results.items()}
        alone = speedup[f"epoch 1, B={count}, automatic, self-drafter"]
        every = speedup[f"epoch 2, B={count}, automatic, all drafters"]
        for name, found, target in (
            ("self-drafter alone", alone, _longtail_targets[count][0]),
            ("all drafters, second epoch", every, _longtail_targets[count][1]),
        ):
            checks.append(Check(f"{name}, B={count}", found, f">= {target}", found >= target))
        for rule, row in part.over.items():
            found = row["median_ratio"]
            wanted, holds = ("> 1", found > 1) if rule.endswith(PUBLISHED) else (">= 0.95", found >= 0.95)
            checks.append(Check(f"{rule}, B={count}", found, wanted, holds))
        differing = sum(row["differing_trajectories"] for row in part.results.values())
        checks.append(Check(f"differing trajectories, B={count}", differing, "0", differing == 0))
        for name, row in part.notes.items():
            if name.startswith("simulated over measured"):
                found = row["of_total"]
                checks.append(Check(f"{name}, B={count}", found, "within 10 %", abs(found - 1) <= 0.1))
    finish(Report("bench longtail", results, checks, EvidenceLevel.L1, seed=seed), json_path, console)


_NEVER_SLOWER = ("sweep", "toggling", "decisions")


@command.command("never-slower")
@click.option(
    "--size", type=click.Choice(SIZES), default="100m", show_default=True, help="Of the shipped policy."
)
@click.option(
    "--pairs",
    type=click.IntRange(3),
    default=9,
    show_default=True,
    help="Comparisons per batch size, at least; up to three times as many where they vary.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 128),
    multiple=True,
    help="Sweep this size only; may be repeated.",
)
@click.option(
    "--only", type=click.Choice(_NEVER_SLOWER), multiple=True, help="Run this part only; may be repeated."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def never_slower(
    size: str, pairs: int, batches: tuple[int, ...], only: tuple[str, ...], seed: int, json_path: Path | None
) -> None:
    """Automatic mode against plain decoding at every batch size, with a useful and a useless drafter, and updates."""
    console, parts = Console(), only or _NEVER_SLOWER
    if batches and "sweep" not in parts:
        raise click.UsageError(
            f"--batch {batches[0]} is of the sweep, which --only leaves out: add --only sweep, or omit --batch"
        )
    results: dict[str, Any] = {"model": f"shipped arithmetic policy, expanded to {size}"}
    checks: list[Check] = []
    if "sweep" in parts:
        sweep = NeverSlower(expanded_policy(size), pairs, seed, console, batches or BATCHES)
        sweep.useful()
        sweep.useless()
        sweep.updated()
        for name, row in sweep.ratios.items():
            low = row["lower_95"]
            checks.append(Check(f"automatic vs plain, {name}, lower bound", low, ">= 0.98", low >= 0.98))
        results |= {
            "drafter": sweep.drafter,
            "ratios": sweep.ratios,
            "costs": sweep.calibration.cost_model.to_dict(),
        }
    if "toggling" in parts:
        comparisons = {1: 3 * pairs, 8: pairs}  # at B=1 there are few passes in each, and they vary more
        toggling = [toggling_overhead(expanded_policy(size), *of, seed) for of in comparisons.items()]
        for row in toggling:
            B = row["batch"]
            for name, what in (("overhead", ""), ("overhead_beyond_cache", " beyond sharing a cache")):
                share = row[name]["median"]
                checks.append(Check(f"toggling at random{what}, B={B}", share, "<= 0.02", share <= 0.02))
            checks.append(Check(f"toggling, same tokens, B={B}", row["identical"], "yes", row["identical"]))
        results["toggling"] = toggling
    if "decisions" in parts:
        decisions = decision_microseconds()
        took = decisions["B=64"]
        checks.append(Check("a decision at B=64, microseconds", took, "<= 50", took <= 50))
        results |= {
            "decision_microseconds": decisions,
            "look_microseconds": decision_microseconds(changing=True),
        }
    finish(Report("bench never-slower", results, checks, EvidenceLevel.L1, seed=seed), json_path, console)


_VLLM_PARTS = ("never-slower", "overhead", "single", "long-tail-8", "long-tail-32")


@command.command("vllm")
@click.option(
    "--size", type=click.Choice(SIZES), default="300m", show_default=True, help="Of the shipped policy."
)
@click.option("--pairs", type=click.IntRange(3), default=9, show_default=True, help="Rounds per ratio.")
@click.option(
    "--only", type=click.Choice(_VLLM_PARTS), multiple=True, help="Run this part only; may be repeated."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def vllm(size: str, pairs: int, only: tuple[str, ...], seed: int, json_path: Path | None) -> None:
    """vLLM with the plugin against vLLM as it comes, and against vLLM's own ways to speculate."""
    from rollout_spec.benchmarks.vllm import VllmBenchmark

    console = Console()
    benchmark = VllmBenchmark(expanded_policy(size), pairs, seed, console)
    runs: dict[str, Callable[[], None]] = {
        "never-slower": benchmark.never_slower,
        "overhead": benchmark.overhead,
        "single": benchmark.single,
        "long-tail-8": lambda: benchmark.long_tail(8),
        "long-tail-32": lambda: benchmark.long_tail(32),
    }
    for part in only or _VLLM_PARTS:
        runs[part]()
    benchmark.finish()
    checks = [
        Check(
            f"{name}, lower bound", row["lower_95"], f">= {row['target']}", row["lower_95"] >= row["target"]
        )
        for name, row in benchmark.ratios.items()
        if row["target"] is not None
    ]
    blocks = benchmark.notes["kv_blocks"]
    equal = blocks["plugin"] == blocks["stock"]
    checks.append(Check("KV blocks, plugin and stock", blocks["plugin"], str(blocks["stock"]), equal))
    results = {
        "model": f"shipped arithmetic policy, expanded to {size}",
        "dtype": benchmark.dtype,
        "drafter": benchmark.drafter,
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0],
        "ratios": benchmark.ratios,
        "notes": benchmark.notes,
    }
    level = EvidenceLevel.L2 if benchmark.on_gpu else EvidenceLevel.L1
    finish(Report("bench vllm", results, checks, level, seed=seed), json_path, console)


@command.command("kernels")
@click.option(
    "--size", type=click.Choice(SIZES), default="300m", show_default=True, help="Of the shipped policy."
)
@click.option("--drafter", default=None, help="A kind of quantized drafter; default: the usual one here.")
@click.option("--pairs", type=click.IntRange(1, 100), default=7, show_default=True, help="Pairs per ratio.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads; default: torch's own."
)
@click.option(
    "--llama-python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Python of an environment with llama-cpp-python and gguf, to compare with llama.cpp.",
)
@click.option("--only", multiple=True, help="Run only these parts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def kernels(
    size: str,
    drafter: str | None,
    pairs: int,
    threads: int | None,
    llama_python: Path | None,
    only: tuple[str, ...],
    seed: int,
    json_path: Path | None,
) -> None:
    """Plain bf16 decoding on the CPU kernels against the memory and other engines, and what drafting adds to it.

    Parts: bandwidth, linears, verify, overhead, llama (with --llama-python), transformers, vllm, speculation, requantization.
    """
    from rollout_spec.benchmarks.kernels import REQUANTIZE_SECONDS, KernelBenchmark

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    drafter = drafter or usual_quantizer("cpu", torch.bfloat16)
    benchmark = KernelBenchmark(expanded_policy(size), drafter, pairs, seed, console)
    parts: dict[str, Callable[[], None]] = {
        "bandwidth": benchmark.bandwidth,
        "linears": benchmark.linears,
        "verify": benchmark.verify,
        "overhead": benchmark.overhead,
        "transformers": benchmark.against_transformers,
        "vllm": benchmark.against_vllm,
        "speculation": benchmark.speculation,
        "requantization": benchmark.requantization,
    }
    if llama_python is not None:
        parts["llama"] = lambda: benchmark.against_llama_cpp(llama_python)
    if find_spec("vllm") is None:
        del parts["vllm"]
        console.print("vllm is not installed here: not compared with")
    unknown = [name for name in only if name not in parts]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}: use one of {', '.join(parts)}", param_hint="--only")
    for name, run in parts.items():
        if not only or name in only:
            run()
    checks = []
    for name, row in benchmark.ratios.items():
        found = round(row["median_ratio"], 3)
        if "at_most" in row:
            checks.append(Check(name, found, f"<= {row['at_most']}", found <= row["at_most"]))
        elif row["target"] is not None:
            checks.append(Check(name, found, f">= {row['target']:.3g}", found >= row["target"]))
    if "share_outside_kernels" in benchmark.notes:
        share = benchmark.notes["share_outside_kernels"]
        found, most = share["median"], share["at_most"]
        checks.append(Check("share outside kernels", found, f"<= {most}", found <= most))
    if "requantize_seconds" in benchmark.notes:
        found = benchmark.notes["requantize_seconds"]
        checks.append(
            Check("re-quantizing, seconds", found, f"<= {REQUANTIZE_SECONDS}", found <= REQUANTIZE_SECONDS)
        )
    results = {
        "model": f"shipped arithmetic policy, expanded to {size}",
        "ratios": benchmark.ratios,
        "notes": benchmark.notes,
    }
    finish(Report("bench kernels", results, checks, EvidenceLevel.L1, seed=seed), json_path, console)


def _table(ratios: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "faster by", "median", "min-max", "asked for", box=None, header_style="bold", pad_edge=False
    )
    for name, row in ratios.items():
        target = row["target"]
        style = "" if target is None else "green" if row["median_ratio"] >= target else "bold red"
        table.add_row(
            name,
            f"[{style}]{row['median_ratio']:.2f}x" if style else f"{row['median_ratio']:.2f}x",
            f"{row['min_ratio']:.2f}-{row['max_ratio']:.2f}",
            "" if target is None else f"{target:.2f}x",
        )
    return table
