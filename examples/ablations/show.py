"""What the ablations show: a table, a plot and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

from ablation import Comparison, Options
from rich.console import Console
from rich.table import Table

from rollout_spec import RolloutEngine
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"the plots need matplotlib ({error}): pip install 'rollout-spec[plots]'") from error

INK, MUTED, GRID = "#22272e", "#6b7480", "#e3e7ec"
COLOURS = ("#3572c6", "#e8a33d", "#2f8f5b", "#7a3f9d", "#b3261e")
SPEEDUP = "speedup over plain decoding\n(makespan ratio, median and range)"


def identity_check(engine: RolloutEngine, comparisons: Mapping[str, Comparison]) -> list[Check]:
    """At exactness level E2, every coupled case must write what its baseline wrote, to the bit."""
    if not engine.backend.row_invariant:
        return []
    coupled = [comparison for comparison in comparisons.values() if comparison.case.coupled]
    same, samples = sum(c.identical for c in coupled), sum(c.samples for c in coupled)
    return [Check("identical trajectories", f"{same} of {samples}", "all (level E2)", same == samples)]


def speedup_table(
    comparisons: Mapping[str, Comparison], extra: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """The usual figures of every case; `extra` columns by name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    extra = extra or {}
    for column in ("case", "speedup (min-max)", "tau", "accepted", "passes on", *extra):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for place, (name, comparison) in enumerate(comparisons.items()):
        row = comparison.to_dict()
        tau, accepted = row["tau"], row["accepted_share_of_drafts"]
        table.add_row(
            name,
            f"{row['median_ratio']:.2f}x ({row['min_ratio']:.2f}-{row['max_ratio']:.2f})",
            "–" if tau is None else f"{tau:.2f}",
            "–" if accepted is None else f"{accepted:.0%}",
            f"{row['speculated_share_of_passes']:.0%}",
            *(cells[place] for cells in extra.values()),
        )
    return table


def describe(engine: RolloutEngine, options: Options) -> dict[str, Any]:
    """What was run, for the report."""
    backend = engine.backend
    return {
        "model": options.policy,
        "device": str(backend.device),
        "dtype": str(backend.dtype).removeprefix("torch."),
        "exactness_coupled": "E2" if backend.row_invariant else "E1",
        "requests": options.requests,
        "group": options.group,
        "max_tokens": options.tokens,
        "repeats": options.repeats,
        "quick": options.quick,
    }


def conclude(
    options: Options,
    results: Mapping[str, Any],
    table: Table,
    draw: Callable[[Figure], None],
    checks: Sequence[Check] = (),
    evidence: EvidenceLevel | None = None,
) -> None:
    """Print the table, write the plot and the report; exit with 1 if a check failed."""
    if evidence is None:
        on_gpu = str(results.get("device")).startswith("cuda")
        evidence = EvidenceLevel.L2 if on_gpu else EvidenceLevel.L1
    report = Report(f"ablation {options.name}", results, checks, evidence, options.seed)
    console = Console()
    console.print(table, highlight=False)
    figure = Figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    figure.supxlabel(_footer(options, report), x=0.01, ha="left", size=8, color=MUTED)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9)
    path = options.out / f"{options.name}.png"
    figure.savefig(path, dpi=150)
    console.print(f"\ndrawn to {path}", style="dim", highlight=False)
    finish(report, options.out / f"{options.name}.json", console)


def _footer(options: Options, report: Report) -> str:
    machine, level = report.machine, report.evidence_level
    assert level is not None
    parts = [
        f"evidence {level.value}: {level.meaning}",
        f"{options.repeats} repetitions, seed {options.seed}",
    ]
    if "device" in report.results:
        where = machine.gpus[0] if report.results["device"].startswith("cuda") else machine.cpu
        parts = [f"{options.policy} on {where}, {machine.threads} threads", *parts]
    return fill("; ".join(parts) + ("; QUICK: not a measurement" if options.quick else ""), 150)


def title(figure: Figure, text: str) -> None:
    """The question, over the plot."""
    figure.suptitle(text, x=0.01, ha="left", size=12, weight="bold", color=INK)


def draw_speedups(axis: Axes, comparisons: Mapping[str, Comparison], again: str | None = None) -> None:
    """Median ratio and range of every case, from top to bottom; the range of case `again` is the noise."""
    shown = [(name, c) for name, c in comparisons.items() if name != again]
    for row, (_, comparison) in enumerate(shown):
        draw_point(axis, row, comparison, COLOURS[0], across=True)
        tau = comparison.to_dict()["tau"]
        text = f"{comparison.paired.median:.2f}×" + ("" if tau is None else f"   τ {tau:.1f}")
        axis.annotate(
            text,
            (comparison.paired.median, row),
            (0, 7),
            textcoords="offset points",
            ha="center",
            size=8,
            color=INK,
        )
    axis.set_yticks(range(len(shown)), [name for name, _ in shown])
    axis.set_ylim(len(shown) - 0.5, -0.7)
    axis.axvline(1, color=INK, lw=1)
    if again is not None:
        axis.axvspan(
            *comparisons[again].paired.spread, color=MUTED, alpha=0.18, lw=0, label="plain against plain"
        )
        axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axis.margins(x=0.12)
    axis.set_xlabel(SPEEDUP)


def draw_point(
    axis: Axes,
    at: float,
    comparison: Comparison,
    colour: str,
    *,
    across: bool = False,
    label: str | None = None,
) -> None:
    """A median ratio with its range, along x if `across`."""
    middle, (low, high) = comparison.paired.median, comparison.paired.spread
    error = [[middle - low], [high - middle]]
    style: dict[str, Any] = {"fmt": "o", "color": colour, "ms": 6, "capsize": 3, "lw": 1.4, "label": label}
    if across:
        axis.errorbar([middle], [at], xerr=error, **style)
    else:
        axis.errorbar([at], [middle], yerr=error, **style)
