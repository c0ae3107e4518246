"""`rollout-spec simulate`: what a policy would make of a rollout, from costs and acceptance alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from rollout_spec.contracts import invalid
from rollout_spec.observe.report import EvidenceLevel, Report, finish, report_options
from rollout_spec.policy import calibration
from rollout_spec.policy.baselines import EfficientRollout, Fixed, Off, TLTBandit
from rollout_spec.policy.cost_model import TARGET, CostModel
from rollout_spec.policy.devices import DEVICES, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.oracle import Oracle
from rollout_spec.policy.records import SpeculationPolicy, Trace
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import SYNTHETIC, Workload, from_trace

POLICIES = "auto, off, fixed:K, efficientrollout, tlt, oracle"


@click.command()
@click.argument("workload")
@click.option("--policy", "policy_name", default="auto", show_default=True, help=f"One of {POLICIES}.")
@click.option(
    "--cost",
    default="h100",
    show_default=True,
    help="A calibration file, or a device (a100, h100, h200, h20) running Qwen2.5-7B by its datasheet.",
)
@click.option("--batch", type=click.IntRange(1), default=None, help="Most live sequences.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths and luck.")
@report_options
def command(
    workload: str, policy_name: str, cost: str, batch: int | None, seed: int, json_path: Path | None
) -> None:
    """Predict a rollout's makespan under a policy, and under plain decoding.

    WORKLOAD is a trace file, or the name of a synthetic workload: long_tail, long_tail_32k, jumping_batch,
    collapsing_acceptance, kv_heavy, one_straggler, uniform, many_medium, repeating.
    """
    costs = _costs(cost)
    rollout = _drafted_by(_workload(workload, seed), tuple(kind for kind in costs.passes if kind != TARGET))
    if batch is not None:
        rollout = replace(rollout, slots=batch)
    traces = {
        "plain": simulate(rollout, Off(), costs, seed=seed),
        policy_name: simulate(rollout, _policy(policy_name, rollout, costs), costs, seed=seed),
    }
    rows = {name: _summary(trace, makespan(traces["plain"])) for name, trace in traces.items()}
    console = Console()
    console.print(_table(rows))
    about = {"workload": rollout.name, "cost": cost, "samples": len(rollout.outputs), "slots": rollout.slots}
    report = Report("simulate", {**rows, **about}, evidence_level=EvidenceLevel.L3, seed=seed)
    finish(report, json_path, console)


def _workload(name: str, seed: int) -> Workload:
    if name in SYNTHETIC:
        return SYNTHETIC[name](seed=seed)
    path = Path(name)
    if not path.is_file():
        raise invalid("WORKLOAD", name, f"no such file; give a trace, or one of {', '.join(SYNTHETIC)}")
    from rollout_spec.observe.trace import read_trace

    trace = read_trace(path)
    if not trace.requests:
        raise invalid("WORKLOAD", name, "the trace holds no finished request; record a rollout to its end")
    return from_trace(trace)


def _costs(name: str) -> CostModel:
    for device in DEVICES.values():
        if device.name.lower().split("-")[0] == name.lower():
            return from_datasheet(device, QWEN2_5_7B)
    if not Path(name).is_file():
        raise invalid(
            "--cost", name, "give a100, h100, h200, h20, or a file of `rollout-spec calibrate --out`"
        )
    return calibration.read(Path(name)).cost_model


def _drafted_by(workload: Workload, drafters: tuple[str, ...]) -> Workload:
    """The drafters that `workload` and the costs agree on; if there are none, the first stands for the first."""
    agreed = {name: workload.drafters[name] for name in workload.drafters if name in drafters}
    if not agreed and drafters and workload.drafters:
        agreed = {drafters[0]: next(iter(workload.drafters.values()))}
    return replace(workload, drafters=agreed)


def _policy(name: str, workload: Workload, costs: CostModel) -> SpeculationPolicy:
    kind, _, argument = name.partition(":")
    if kind == "fixed" and argument.isdecimal() and int(argument) > 0:
        return Fixed(int(argument))
    builders: dict[str, Callable[[], SpeculationPolicy]] = {
        "auto": lambda: _automatic(costs),
        "off": Off,
        "efficientrollout": lambda: EfficientRollout(costs),
        "tlt": TLTBandit,
        "oracle": lambda: Oracle(workload, costs),
    }
    if name not in builders:
        raise invalid("--policy", name, f"use one of {POLICIES}, K at least 1")
    return builders[name]()


def _automatic(costs: CostModel) -> SpeculationPolicy:
    from rollout_spec.policy.automatic import AutomaticPolicy

    return AutomaticPolicy(costs)


def _summary(trace: Trace, plain_seconds: float) -> dict[str, float | None]:
    seconds = makespan(trace)
    tokens = sum(step.emitted for step in trace.steps)
    drafted = sum(step.drafted for step in trace.steps)
    accepted = sum(step.accepted for step in trace.steps)
    return {
        "makespan_s": seconds,
        "speedup": plain_seconds / seconds,
        "tokens_per_s": tokens / seconds,
        "speculated_share": sum(step.drafted > 0 for step in trace.steps) / len(trace.steps),
        "accepted_share": accepted / drafted if drafted else None,
    }


def _table(results: dict[str, dict[str, float | None]]) -> Table:
    table = Table(
        "policy", "makespan", "over plain", "tokens/s", "speculated", "accepted", box=None, pad_edge=False
    )
    for name, row in results.items():
        accepted = row["accepted_share"]
        table.add_row(
            name,
            f"{row['makespan_s']:.2f} s",
            f"{row['speedup']:.2f}x",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['speculated_share']:.0%}",
            "-" if accepted is None else f"{accepted:.0%}",
        )
    return table
