"""How much memory for CUDA graphs: padding and number of graphs against the byte budget. Needs no model.

    python examples/ablations/graph_budget.py

A long-tailed rollout of Qwen2.5-7B on an H100, by its datasheet, is simulated under the automatic policy. The plan is
made for the passes of one rollout and judged on the next, which has other lengths. A ladder of powers of two for
every kind of pass is shown beside it. Repetitions differ by their seed.
"""

import statistics
from collections.abc import Sequence

from ablation import read_options
from rich.table import Table
from show import COLOURS, Axes, Figure, conclude, title

from rollout_spec.observe.report import EvidenceLevel
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.devices import DEVICES, QWEN2_5_7B, from_datasheet
from rollout_spec.policy.graph_plan import (
    DECODE,
    DRAFT,
    VERIFY,
    Demand,
    GraphCost,
    GraphPlan,
    ModelShape,
    demand_of,
    plan_graphs,
    strategies,
)
from rollout_spec.policy.simulator import simulate
from rollout_spec.policy.workloads import long_tail

SAMPLES, LONGEST = 128, 11
DRAFT_LENGTHS = (1, 2, 3, 5, 7, 11)
SHAPE = ModelShape(28, 3584, 18944, 28, 4, 128, 152064)
COST = GraphCost(SHAPE, SHAPE)
GIB = 2**30
BUDGETS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # GiB


def rollout(seed: int) -> Demand:
    """The passes of one simulated rollout."""
    costs = from_datasheet(DEVICES["H100-SXM"], QWEN2_5_7B)
    policy = AutomaticPolicy(costs, longest=LONGEST, seed=seed)
    return demand_of(simulate(long_tail(SAMPLES, seed), policy, costs, seed=seed))


def waste(plan: GraphPlan, demand: Demand) -> tuple[float, float]:
    """Padding over useful rows, eager passes counted by their launches; and the share of passes that run eagerly."""
    useful = padding = eager = passes = 0.0
    for (batch, width), times in demand.items():
        wanted = [(DECODE, 1)] if width == 1 else [(DRAFT, width - 1), (VERIFY, width)]
        for mode, rows in wanted:
            useful, passes = useful + times * batch * rows, passes + times
            graph = plan.graph(mode, batch, rows)
            if graph is not None:
                padding += times * (graph.rows - batch * rows)
            else:
                kind = min(k for k in plan.buckets if k.mode == mode and k.width >= rows)
                padding, eager = padding + times * COST.eager_rows(kind), eager + times
    return padding / useful, eager / passes


def powers_of_two() -> GraphPlan:
    """The usual ladder, for every kind."""
    sizes = tuple(2**power for power in range(SAMPLES.bit_length()))
    return GraphPlan(dict.fromkeys(strategies(DRAFT_LENGTHS), sizes), COST, 0, 0.0)


def judge(plan: GraphPlan, seen: Demand, following: Demand) -> dict[str, float]:
    (known, _), (new, eager) = waste(plan, seen), waste(plan, following)
    return {
        "graphs": len(plan.graphs),
        "gib": plan.nbytes / GIB,
        "padding_of_rollout_planned_for": known,
        "padding_of_next_rollout": new,
        "eager_share_of_next_rollout": eager,
    }


def summary(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and range of every figure, over the repetitions."""
    return {
        name: {
            "median": round(statistics.median(row[name] for row in found), 4),
            "min": round(min(row[name] for row in found), 4),
            "max": round(max(row[name] for row in found), 4),
        }
        for name in found[0]
    }


def main() -> None:
    options = read_options("graph_budget", __doc__, model=False)
    budgets = BUDGETS[::5] if options.quick else BUDGETS
    demands = [
        (rollout(seed), rollout(seed + 1))
        for seed in range(options.seed, options.seed + 2 * options.repeats, 2)
    ]
    ladder = summary([judge(powers_of_two(), *pair) for pair in demands])
    planned = {}
    for budget in budgets:
        plans = [
            plan_graphs(strategies(DRAFT_LENGTHS), SAMPLES, seen, COST, int(budget * GIB))
            for seen, _ in demands
        ]
        planned[f"{budget:g} GiB"] = summary([judge(plan, *pair) for plan, pair in zip(plans, demands)])

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("budget", "used", "graphs", "padding", "next rollout", "eager passes"):
        table.add_column(column, justify="right")
    for name, row in {**planned, "powers of two": ladder}.items():
        middle = {figure: values["median"] for figure, values in row.items()}
        table.add_row(
            name,
            f"{middle['gib']:.2f} GiB",
            f"{middle['graphs']:.0f}",
            f"{middle['padding_of_rollout_planned_for']:.1%}",
            f"{middle['padding_of_next_rollout']:.1%}",
            f"{middle['eager_share_of_next_rollout']:.1%}",
        )

    def draw(figure: Figure) -> None:
        title(figure, "How much memory for CUDA graphs?")
        left, right = figure.subplots(1, 2)
        lines = [
            (left, "padding_of_rollout_planned_for", COLOURS[0], "rollout planned for", 100),
            (left, "padding_of_next_rollout", COLOURS[1], "next rollout", 100),
            (right, "graphs", COLOURS[0], "planned", 1),
        ]
        for axis, name, colour, label, scale in lines:
            _errorbar(axis, budgets, [row[name] for row in planned.values()], scale, "-o", colour, label)
        used = [ladder["gib"]["median"]]
        _errorbar(
            left,
            used,
            [ladder["padding_of_next_rollout"]],
            100,
            "D",
            COLOURS[4],
            "powers of two, next rollout",
        )
        _errorbar(right, used, [ladder["graphs"]], 1, "D", COLOURS[4], "powers of two")
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_xlabel("byte budget (GiB)")
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False, fontsize=9)
        left.set_yscale("symlog", linthresh=1)
        left.yaxis.set_major_formatter("{x:g}")
        left.set_ylabel("padding and eager passes, % of useful rows")
        right.set_ylabel("graphs")

    results = {
        "workload": f"long_tail, {SAMPLES} samples",
        "model": "Qwen2.5-7B, by its shape",
        "draft_lengths": list(DRAFT_LENGTHS),
        "repeats": options.repeats,
        "quick": options.quick,
        "planned": planned,
        "powers_of_two": ladder,
    }
    conclude(options, results, table, draw, evidence=EvidenceLevel.L3)


def _errorbar(
    axis: Axes,
    x: Sequence[float],
    rows: list[dict[str, float]],
    scale: int,
    style: str,
    colour: str,
    label: str,
) -> None:
    middle = [scale * row["median"] for row in rows]
    low = [scale * (row["median"] - row["min"]) for row in rows]
    high = [scale * (row["max"] - row["median"]) for row in rows]
    axis.errorbar(x, middle, [low, high], fmt=style, color=colour, label=label, ms=5, capsize=3, lw=1.4)


if __name__ == "__main__":
    main()
