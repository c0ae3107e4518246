"""Which drafter: 4-bit or 8-bit copies of the policy, an unquantized one as the control, history alone, or none?

    python examples/ablations/drafter_kind.py

Everything else is as shipped: the automatic policy decides, before every pass, from the costs of that drafter.
"""

from ablation import (
    Case,
    automatic,
    compare,
    cost_model,
    load_engine,
    make_drafter,
    new_history,
    number,
    ragged_work,
    read_options,
    run,
    token_acceptance,
)
from show import Figure, conclude, describe, draw_speedups, identity_check, speedup_table, title

from rollout_spec.drafters.quantize import QUANTIZERS, available_quantizers

NONE = "none (plain, again)"


def main() -> None:
    options = read_options("drafter_kind", __doc__)
    engine = load_engine(options, drafter="none")
    work = ragged_work(options)
    plain = Case.plain(work)
    texts = run(engine, plain).completions
    reasons = available_quantizers(engine.backend.device, engine.backend.dtype)
    cases, accepted = [], {}
    for kind in ("int8",) if options.quick else QUANTIZERS:
        if reasons[kind] is not None:
            print(f"{kind} left out: {reasons[kind]}")
            continue
        drafter = make_drafter(engine, QUANTIZERS[kind])
        accepted[kind] = token_acceptance(engine, drafter, texts)
        costs = cost_model(engine, options, drafter)
        cases.append(Case(kind, work, automatic(costs, options), drafter))
    costs = cost_model(engine, options, None)
    cases.append(Case("history only", work, automatic(costs, options), history=new_history))
    cases.append(Case.plain(work, NONE))

    found = compare(engine, options, [(plain, case) for case in cases])
    rows = {
        name: c.to_dict() | {"acceptance": number(accepted.get(name, float("nan")))}
        for name, c in found.items()
    }

    def draw(figure: Figure) -> None:
        title(figure, "Which drafter?")
        axis, side = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        draw_speedups(axis, found, NONE)
        apart = [100 * (1 - alpha) for alpha in accepted.values()]
        heights = [list(found).index(kind) for kind in accepted]
        side.barh(heights, apart, height=0.4, color="#7fb0ea")
        for height, value in zip(heights, apart):
            side.annotate(
                f"{value:.2f}", (value, height), (3, 0), textcoords="offset points", va="center", size=8
            )
        side.margins(x=0.25)
        side.set_xlabel("TV to the target (%),\n1 − acceptance per token")

    conclude(
        options,
        {**describe(engine, options), "baseline": "plain", "cases": rows},
        speedup_table(found),
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
