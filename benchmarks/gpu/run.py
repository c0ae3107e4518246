#!/usr/bin/env python3
"""One command that checks and measures rollout-spec on one GPU, without network, in nine minutes.

    python benchmarks/gpu/run.py                # on a GPU
    python benchmarks/gpu/run.py --dry-run      # every part, on a CPU, with tiny models: shows that it runs, no more

Every finding is in the report as soon as it is there, so a run that is killed loses only what it had not measured.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from standins import stand_in_for_missing  # noqa: E402

MISSING = stand_in_for_missing()

import torch  # noqa: E402
from correctness import correctness  # noqa: E402
from figures import Part, Record, ReportFile  # noqa: E402
from lab import DRY, FULL, SHAPES, this_device  # noqa: E402
from predictions import predict  # noqa: E402
from rollouts import makespan, never_slower  # noqa: E402
from timings import PREFERRED, Bench, decode, drafters, graphs, idle, machine, requantize, speculation  # noqa: E402

from rollout_spec.drafters.quantize import available_quantizers  # noqa: E402
from rollout_spec.observe.report import EvidenceLevel  # noqa: E402

PARTS: dict[str, tuple[float, Callable[[Bench, Part], None]]] = {
    "machine": (10, machine),
    "correctness": (110, correctness),
    "decode": (45, decode),
    "drafters": (75, drafters),
    "graphs": (45, graphs),
    "speculation": (80, speculation),
    "requantize": (15, requantize),
    "makespan": (90, makespan),
    "never_slower": (50, never_slower),
}
"""By name, in order: budget in seconds on a GPU, and what runs."""

AS_USERS = {"correctness"}  # runs the engine as users do; the others keep to inference mode


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if a check failed."""
    options = _parse(arguments)
    if options.dry_run:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("no CUDA device is usable here; --dry-run runs every part on the CPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else torch.cuda.get_device_name(device)
    out = Path(options.out or os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu" / _slug(name))
    out.mkdir(parents=True, exist_ok=True)
    for package in MISSING:
        print(f"{package} is not installed: standing in for it; only printing to a terminal needs it")

    peaks, source = this_device(device)
    bench = Bench(device, DRY if options.dry_run else FULL, tuple(options.sizes), options.seed, peaks)
    about = {
        "device": name, "peaks": {**vars(peaks), "from": source}, "dry_run": options.dry_run, "stood_in_for": MISSING,
        "scale": vars(bench.scale), "sizes": {size: SHAPES[size] for size in bench.sizes},
    }  # fmt: skip
    predicted = _predict(bench, out, about, options.dry_run)
    level = None if options.dry_run else EvidenceLevel.L2
    only = "" if options.parts == list(PARTS) else "-" + "-".join(options.parts)
    file = ReportFile(out / f"report{only}.json", "gpu", level, options.seed)
    record = Record(file, about, predicted, level.value if level else None)
    for part in options.parts:
        _run(part, bench, record, began + options.seconds)
    failed = [check.name for check in record.checks if not check.passed]
    print(f"\n{len(record.figures)} figures, {len(record.checks)} checks, {len(failed)} failed: {file.path}")
    for check in failed:
        print(f"  FAILED: {check}")
    return 1 if failed else 0


def _run(name: str, bench: Bench, record: Record, end: float) -> None:
    """One part; whatever it raises is recorded, and the next one runs."""
    seconds, run = PARTS[name]
    start = time.monotonic()
    part = Part(record, name, min(start + seconds, end))
    print(f"{name}: at most {max(0.0, min(seconds, end - start)):.0f} s", flush=True)
    if part.spent:
        part.end(0.0, "not reached")
        return
    status = "done"
    try:
        with torch.inference_mode(name not in AS_USERS):
            run(bench, part)
            idle(bench)
    except Exception as error:
        part.failed("runs to its end", error)
        status = "failed"
    part.end(time.monotonic() - start, status)


def _predict(bench: Bench, out: Path, about: dict[str, Any], dry: bool) -> dict[str, float]:
    """Predictions, written to a report of their own before anything is measured."""
    kinds = available_quantizers(bench.device, torch.bfloat16)
    kind = next((kind for kind in PREFERRED if kinds[kind] is None), PREFERRED[0])
    found = predict(bench.datasheet, bench.scale, list(bench.sizes), kind, bench.seed, dry=dry)
    level = None if dry else EvidenceLevel.L3
    results = {**about, "drafter_of_rollouts": kind, "predicted": found}
    ReportFile(out / "predictions.json", "gpu-predictions", level, bench.seed).write(results)
    print(f"{len(found)} predictions written to {out / 'predictions.json'}", flush=True)
    return found


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(known: list[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            wanted = [name for name in text.split(",") if name]
            unknown = sorted(set(wanted) - set(known))
            if unknown or not wanted:
                raise argparse.ArgumentTypeError(f"{text!r}: use one or more of {','.join(known)}")
            return [name for name in known if name in wanted]

        return parse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny models on the CPU; plain calls instead of graphs"
    )
    parser.add_argument("--parts", type=names(list(PARTS)), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--sizes", type=names(list(SHAPES)), default=list(SHAPES), help=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=525.0, help="nothing new is started after this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder; default: $OUT, else benchmarks/results/gpu/<device>")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
