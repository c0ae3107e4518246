"""`rollout-spec bench adaptive | capture | spot`: what a trained drafter wins, and what training it costs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from rollout_spec.adaptive.checkpoint import checkpoints, read_checkpoint
from rollout_spec.benchmarks.adaptive import LENGTHS, AdaptiveBenchmark
from rollout_spec.benchmarks.capture import CaptureCost
from rollout_spec.config import ADAPTIVE_QUANTIZERS, DRAFTERS
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.example_policy import SIZES, example_folder, expanded_policy
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish, report_options

_DTYPES = click.Choice(("auto", "float32", "bfloat16"))


@click.command("adaptive")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--size", type=click.Choice(SIZES), default="300m", show_default=True, help="Of the shipped policy."
)
@click.option(
    "--pairs", type=click.IntRange(3), default=7, show_default=True, help="Answers, one and four at a time."
)
@click.option(
    "--draws", type=click.IntRange(3), default=5, show_default=True, help="Rollouts per batch size."
)
@click.option("--batch", type=click.IntRange(1, 32), multiple=True, help="Of a rollout; default: 8.")
@click.option("--self-drafter", type=click.Choice(DRAFTERS[:-1]), default="auto", show_default=True)
@click.option("--quantizer", type=click.Choice(ADAPTIVE_QUANTIZERS), default="int4", show_default=True,
              help="Of the trained drafter's linears.")  # fmt: skip
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the policy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def adaptive(
    checkpoint: Path,
    size: str,
    pairs: int,
    draws: int,
    batch: tuple[int, ...],
    self_drafter: str,
    quantizer: str,
    dtype: str,
    seed: int,
    json_path: Path | None,
) -> None:
    """The drafter of CHECKPOINT, grown with the shipped policy, against the quantized self-drafter, and both.

    CHECKPOINT was trained on the policy that `examples/arithmetic/expand_drafter.py fold` writes.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        script = example_folder() / "expand_drafter.py"
        options = ["expand", "--drafter", str(checkpoint), "--size", size, "--out", folder]
        run = subprocess.run(
            [sys.executable, str(script), *options], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RolloutSpecError(f"expand_drafter.py failed: {run.stderr.strip().splitlines()[-1]}")
        larger = read_checkpoint(checkpoints(folder)[-1])
    benchmark = AdaptiveBenchmark(
        expanded_policy(size), larger, self_drafter, quantizer, seed, console, dtype
    )
    fixed = {f"from B={count} on": benchmark.fixed(count, pairs) for count in LENGTHS}
    tails = {f"B={count}": benchmark.longtail(count, draws) for count in batch or (8,)}
    over = fixed["from B=1 on"]["adaptive_over_self_drafter"]["median"]
    checks = [Check("adaptive over self-drafter, one sequence", over, ">= 1.15", over >= 1.15)]
    for name, row in tails.items():
        low = row["both_over_better_alone"]["interval_95"][1]
        checks.append(Check(f"both over the better alone, {name}, upper bound", low, ">= 1", low >= 1.0))
    results = {
        "model": f"shipped arithmetic policy, expanded to {size}",
        "dtype": str(benchmark.engine.backend.dtype),
        "threads": torch.get_num_threads(),
        "self_drafter": benchmark.self_drafter,
        "adaptive_quantizer": quantizer,
        "spec": larger.spec.to_dict(),
        "costs": benchmark.costs.to_dict(),
        "fixed": fixed,
        "longtail": tails,
    }
    finish(Report("bench adaptive", results, checks, EvidenceLevel.L1, seed=seed), json_path, console)


@click.command("capture")
@click.option(
    "--size", type=click.Choice(SIZES), default="100m", show_default=True, help="Of the shipped policy."
)
@click.option("--pairs", type=click.IntRange(3), default=15, show_default=True, help="Per batch size.")
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="Of the policy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def capture(size: str, pairs: int, dtype: str, seed: int, json_path: Path | None) -> None:
    """Decoding with the features of three layers kept and collected, against decoding without."""
    console = Console()
    cost = CaptureCost(expanded_policy(size), pairs, seed, console, dtype)
    cost.run()
    checks = [
        Check(f"time with capture over without, {name}", row["capture_over_plain"], "<= 1.02",
              row["capture_over_plain"] <= 1.02)
        for name, row in cost.ratios.items()
    ]  # fmt: skip
    results: dict[str, Any] = {
        "model": f"shipped arithmetic policy, expanded to {size}",
        "layers": list(cost.layers),
        "ratios": cost.ratios,
    }
    finish(Report("bench capture", results, checks, EvidenceLevel.L1, seed=seed), json_path, console)


@click.command("spot")
@click.option(
    "--draws", type=click.IntRange(2), default=10, show_default=True, help="RL steps per neighbour."
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES.choices[1:]),
    default="bfloat16",
    show_default=True,
    help="Of the policy.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and noise.")
@report_options
def spot(draws: int, dtype: str, seed: int, json_path: Path | None) -> None:
    """What training on a worker that idles costs an RL step, and the worker that still decodes."""
    from rollout_spec.benchmarks.spot import Free, start_ray

    start_ray()
    results = Free(draws, seed, dtype).run()
    dummy = results["step_time_with_training_over"]["local"]["median"]
    used, late = results["used_share"], results["preemption_p99_over_micro_batch_p99"]
    checks = [
        Check("idle time used for training", round(used, 3), ">= 0.7", used >= 0.7),
        Check("step time over that beside cache-local work", round(dummy, 3), "<= 1.02", dummy <= 1.02),
        Check(
            "99th percentile of preemption over that of a micro-batch", round(late, 3), "<= 1", late <= 1.0
        ),
    ]
    finish(
        Report("bench spot", results, checks, evidence_level=EvidenceLevel.L1, seed=seed),
        json_path,
        Console(),
    )
