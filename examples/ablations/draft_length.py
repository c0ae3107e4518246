"""How far ahead to draft: every fixed K from 1 to 12 against the automatic policy, at one and at many live samples.

    python examples/ablations/draft_length.py

Nothing but the drafter with weights drafts, and all samples are live all the time, so that K is all that differs.
"""

from ablation import Case, automatic, compare, cost_model, full_work, load_engine, read_options
from show import (
    COLOURS,
    SPEEDUP,
    Figure,
    conclude,
    describe,
    draw_point,
    identity_check,
    speedup_table,
    title,
)

from rollout_spec.policy.baselines import Fixed

LENGTHS = tuple(range(1, 13))


def main() -> None:
    options = read_options("draft_length", __doc__, tokens=48)
    engine = load_engine(options)
    drafter = engine.backend.weights.drafter
    if drafter is None:
        raise SystemExit("no drafter is expected to gain here; name one with --drafter")
    costs = cost_model(engine, options, drafter)
    lengths = (1, 4) if options.quick else LENGTHS
    batches = sorted({1, options.requests})
    pairs = []
    for batch in batches:
        work = full_work(options, batch)
        plain = Case.plain(work, f"B={batch} plain")
        cases = [Case(f"B={batch} K={K}", work, Fixed(K), drafter) for K in lengths]
        cases.append(Case(f"B={batch} automatic", work, automatic(costs, options), drafter))
        cases.append(Case.plain(work, f"B={batch} plain, again"))
        pairs += [(plain, case) for case in cases]
    found = compare(engine, options, pairs)

    def draw(figure: Figure) -> None:
        title(figure, "How far ahead to draft?")
        axis = figure.subplots()
        last = lengths[-1]
        for batch, colour in zip(batches, COLOURS):
            fixed = [found[f"B={batch} K={K}"] for K in lengths]
            axis.plot(
                lengths, [c.paired.median for c in fixed], color=colour, lw=1.4, label=f"fixed K, B = {batch}"
            )
            for K, comparison in zip(lengths, fixed):
                draw_point(axis, K, comparison, colour)
            chosen = found[f"B={batch} automatic"]
            axis.axhline(
                chosen.paired.median, color=colour, lw=1.2, ls=(0, (5, 3)), label=f"automatic, B = {batch}"
            )
            draw_point(axis, last + 0.8, chosen, colour)
            axis.axhspan(*found[f"B={batch} plain, again"].paired.spread, color=colour, alpha=0.12, lw=0)
        axis.axhline(1, color="black", lw=1)
        axis.set_xticks([*lengths, last + 0.8], [*map(str, lengths), "auto"])
        axis.set(xlabel="draft length K (tokens)", ylabel=SPEEDUP)
        axis.legend(frameon=False, fontsize=9, ncols=2)

    conclude(
        options,
        {
            **describe(engine, options),
            "drafter": drafter.name,
            "baseline": "plain",
            "cases": {name: comparison.to_dict() for name, comparison in found.items()},
        },
        speedup_table(found),
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
