"""What to decide for: the least makespan, or the most tokens per second at every pass?

    python examples/ablations/objective.py

The makespan is when the last sample ends; the mean completion time is what the samples wait on average, or the
area under the curve of live samples. History and the drafter with weights both draft, as shipped.
"""

import statistics

import numpy as np
from ablation import (
    Case,
    Comparison,
    Run,
    automatic,
    compare,
    cost_model,
    load_engine,
    new_history,
    number,
    ragged_work,
    read_options,
)
from show import COLOURS, MUTED, Figure, conclude, describe, draw_point, identity_check, speedup_table, title

from rollout_spec.config import OBJECTIVES

AGAIN = "plain, again"


def mean_completion(run: Run) -> float:
    """Seconds from the start of the rollout to the end of a sample, on average."""
    return sum(live * seconds for live, seconds in _passes(run)) / len(run.completions)


def _passes(run: Run) -> list[tuple[int, float]]:
    """Live samples and duration of every pass, the time between passes included."""
    steps = run.trace.steps
    ends = [
        *(step.time for step in steps[1:]),
        steps[-1].time + steps[-1].draft_seconds + steps[-1].target_seconds,
    ]
    starts = [0.0, *(step.time for step in steps[1:])]
    return [(step.batch, end - start) for step, start, end in zip(steps, starts, ends)]


def waiting_ratios(comparison: Comparison) -> list[float]:
    """Mean completion time of the baseline over that of the case, one per pair."""
    return [mean_completion(a) / mean_completion(b) for a, b in zip(comparison.baseline, comparison.runs)]


def median_run(runs: list[Run]) -> Run:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def main() -> None:
    options = read_options("objective", __doc__, requests=16)
    engine = load_engine(options)
    drafter = engine.backend.weights.drafter
    costs = cost_model(engine, options, drafter)
    work = ragged_work(options)
    plain = Case.plain(work)
    cases = [
        Case(objective, work, automatic(costs, options, objective=objective), drafter, new_history)
        for objective in OBJECTIVES
    ]
    found = compare(engine, options, [(plain, case) for case in (*cases, Case.plain(work, AGAIN))])
    rows = {}
    for name, comparison in found.items():
        ratios = waiting_ratios(comparison)
        rows[name] = comparison.to_dict() | {
            "mean_completion_seconds": number(statistics.median(map(mean_completion, comparison.runs))),
            "mean_completion_ratio": {
                "median": number(statistics.median(ratios)),
                "min": number(min(ratios)),
                "max": number(max(ratios)),
            },
        }
    cells = [f"{row['mean_completion_ratio']['median']:.2f}x" for row in rows.values()]
    table = speedup_table(found, {"completion": cells})

    def draw(figure: Figure) -> None:
        title(figure, f"What to decide for? ({work.samples} samples)")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        curves = {"plain decoding": found[OBJECTIVES[0]].baseline}
        curves |= {f"decided for {name}": found[name].runs for name in OBJECTIVES}
        for (name, runs), colour in zip(curves.items(), (MUTED, *COLOURS)):
            live, seconds = zip(*_passes(median_run(list(runs))))
            left.stairs(
                live,
                np.concatenate(([0.0], np.cumsum(seconds))),
                color=colour,
                lw=1.6,
                label=name,
                baseline=None,
            )
        left.set(xlabel="seconds, in the median run", ylabel="live samples", ylim=(0, None), xlim=(0, None))
        left.legend(frameon=False, fontsize=9)
        for name, colour, shift in zip(OBJECTIVES, COLOURS, (-0.12, 0.12)):
            comparison, row = found[name], rows[name]["mean_completion_ratio"]
            draw_point(right, shift, comparison, colour)
            error = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
            right.errorbar(
                [1 + shift], [row["median"]], error, fmt="o", color=colour, ms=6, capsize=3, lw=1.4
            )
        right.axhline(1, color="black", lw=1)
        noise = found[AGAIN].paired.spread
        right.axhspan(*noise, color=MUTED, alpha=0.18, lw=0, label="makespan, plain against plain")
        right.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        right.set_xticks([0, 1], ["makespan", "mean completion\ntime"])
        right.set(xlim=(-0.5, 1.5), ylabel="speedup over plain decoding, median and range")

    conclude(
        options,
        {
            **describe(engine, options),
            "drafter": None if drafter is None else drafter.name,
            "baseline": "plain",
            "cases": rows,
        },
        table,
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
