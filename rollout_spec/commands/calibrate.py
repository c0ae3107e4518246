"""`rollout-spec calibrate`: what passes of a model cost on this machine, for the automatic policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from rollout_spec.config import DRAFTERS
from rollout_spec.engine import RolloutEngine
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish, report_options
from rollout_spec.policy import calibration
from rollout_spec.policy.calibration import Calibration
from rollout_spec.torch_backend.calibrate import FULL, calibration_key, measure
from rollout_spec.torch_backend.weights import TYPICAL_LENGTH

_LARGEST_ERROR = 0.10  # median relative error of predicted times on configurations left out of the fit


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--drafter", type=click.Choice(DRAFTERS), default="auto", show_default=True)
@click.option(
    "--verifier", type=click.Choice(("auto", "coupled", "rejection")), default="auto", show_default=True
)
@click.option("--dtype", default="auto", show_default=True, help="Of weights, activations and cache.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=128, show_default=True, help="Largest batch.")
@click.option("--max-model-len", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=FULL.seconds, show_default=True, help="Budget.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="CPU threads; default: torch's own."
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Also write the calibration here.")
@report_options
def command(
    model: Path,
    drafter: str,
    verifier: str,
    dtype: str,
    max_num_seqs: int,
    max_model_len: int,
    seconds: float,
    threads: int | None,
    out: Path | None,
    json_path: Path | None,
) -> None:
    """Measure what plain, drafting and verifying passes of MODEL cost here, in about a minute.

    The result is kept in the cache, where engines of the same model, dtype and drafter find it. Run it on an idle
    machine, with the number of threads that the engine will have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    speculation: dict[str, Any] = {"drafter": drafter, "verifier": verifier}
    if not torch.cuda.is_available():  # there, graphs must be those of engines that decide by this
        speculation["draft_length"] = TYPICAL_LENGTH
    with console.status("loading") as status:
        engine = RolloutEngine.from_pretrained(
            model,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            speculation=speculation,
        )
        grid = replace(FULL, seconds=seconds)
        timings = measure(engine.backend, grid, lambda text: status.update(f"measuring {text}"))
        found = Calibration.of(calibration_key(engine.backend), timings, brief=False)
    path = calibration.cache_path(found.key)
    for target in (path, *(() if out is None else (out,))):
        calibration.write(found, target)
    console.print(_costs(found))
    console.print(f"{len(timings)} passes; kept in {path}", highlight=False)
    checks = [
        Check(
            f"held-out error, {kind}",
            round(error.median, 4),
            f"<= {_LARGEST_ERROR}",
            error.median <= _LARGEST_ERROR,
        )
        for kind, error in found.held_out.items()
    ]
    results: dict[str, Any] = {
        "key": dict(found.key),
        "costs": found.cost_model.to_dict(),
        "held_out": {kind: vars(error) for kind, error in found.held_out.items()},
        "passes": len(timings),
    }
    level = EvidenceLevel.L2 if engine.backend.device.type == "cuda" else EvidenceLevel.L1
    finish(Report("calibrate", results, checks, level, seed=0), json_path, console)


def _costs(found: Calibration) -> Table:
    """Predicted milliseconds of a pass at a context of 256 tokens."""
    table = Table(
        "B",
        "plain",
        "verify K=3",
        "verify K=7",
        *(f"{n} step" for n in _drafters(found)),
        title="ms per pass",
    )
    costs = found.cost_model
    for batch in (1, 4, 16, 64):
        kv_tokens = 256 * batch
        times = [costs.target(batch, batch * (k + 1), kv_tokens) for k in (0, 3, 7)]
        times += [costs.draft(name, batch, kv_tokens) for name in _drafters(found)]
        table.add_row(str(batch), *(f"{1e3 * seconds:.1f}" for seconds in times))
    return table


def _drafters(found: Calibration) -> list[str]:
    return [name for name in found.cost_model.passes if name != "target"]
