"""`rollout-spec bench`: paired measurements on this machine, against what one would use otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from rollout_spec.benchmarks.engine import EngineBenchmark
from rollout_spec.example_policy import SIZES
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish, report_options


@click.group()
def command() -> None:
    """Paired, interleaved measurements: medians of ratios, with their spread."""


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
