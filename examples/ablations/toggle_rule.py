"""When to speculate: never, always, below a batch size, by two published rules, or by the automatic policy?

    python examples/ablations/toggle_rule.py

One drafter with weights and no history under every rule. The batch shrinks from `--requests` samples to one.
EfficientRollout arms itself only after more than 32 samples were live; as fewer are by default, it is also run
armed from the start. Policies live through all repetitions, as through the steps of a training run.
"""

from ablation import Case, automatic, compare, cost_model, load_engine, ragged_work, read_options
from show import Figure, conclude, describe, draw_speedups, identity_check, speedup_table, title

from rollout_spec.policy.baselines import EfficientRollout, Fixed, TLTBandit
from rollout_spec.policy.records import SpeculationPolicy

DRAFT_LENGTH = 4  # of the rules that choose none
OFF = "off (plain, again)"


def main() -> None:
    options = read_options("toggle_rule", __doc__)
    engine = load_engine(options)
    drafter = engine.backend.weights.drafter
    if drafter is None:
        raise SystemExit("no drafter is expected to gain here; name one with --drafter")
    costs = cost_model(engine, options, drafter)
    largest = options.requests * options.group
    thresholds = [limit for limit in (1, 2, 4, 8, 16, 32, 64) if limit < largest]
    rules: dict[str, SpeculationPolicy] = {
        "always on": Fixed(DRAFT_LENGTH),
        **{f"on while B ≤ {limit}": Fixed(DRAFT_LENGTH, limit) for limit in thresholds},
        "EfficientRollout": EfficientRollout(costs),
        "EfficientRollout, armed": EfficientRollout(costs, armed_above=0),
        "TLT bandit": TLTBandit(seed=options.seed),
        "automatic": automatic(costs, options),
    }
    work = ragged_work(options)
    plain = Case.plain(work)
    cases = [Case.plain(work, OFF), *(Case(name, work, rule, drafter) for name, rule in rules.items())]
    found = compare(engine, options, [(plain, case) for case in cases])

    def draw(figure: Figure) -> None:
        title(figure, f"When to speculate? ({largest} samples, {drafter.name} drafter)")
        draw_speedups(figure.subplots(), found, OFF)

    conclude(
        options,
        {
            **describe(engine, options),
            "drafter": drafter.name,
            "draft_length": DRAFT_LENGTH,
            "baseline": "plain",
            "cases": {name: comparison.to_dict() for name, comparison in found.items()},
        },
        speedup_table(found),
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
