"""Which verifier: coupled sampling or rejection sampling? Acceptance, tau, makespan, and identical trajectories.

    python examples/ablations/verifier.py

The drafter is as it is, and made worse with noise on its weights, for a small trained policy quantizes kindly.
The baseline of each verifier is plain decoding under it: its trajectories are what speculation should not change.
All samples are live all the time, so that every case emits equally many tokens.
"""

from ablation import (
    Case,
    compare,
    full_work,
    load_engine,
    make_drafter,
    number,
    read_options,
    run,
    token_acceptance,
)
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

from rollout_spec.drafters.quantize import get_quantizer
from rollout_spec.drafters.quantizers.perturbed import PerturbedQuantizer
from rollout_spec.policy.baselines import Fixed
from rollout_spec.policy.records import Plan, StepOutcome, StepState

DRAFT_LENGTH = 4
NOISE = (0.0, 0.2, 0.4)  # standard deviations of the weights
VERIFIERS = ("coupled", "rejection")


class CountingTries(Fixed):
    """Also counts the draft tokens put to the test: those accepted, and the first rejected of each sequence."""

    tried = accepted = 0

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if plan.speculates:
            self.accepted += int(outcome.accepted.sum())
            self.tried += int((outcome.accepted + (outcome.accepted < plan.draft_lengths)).sum())

    @property
    def acceptance(self) -> float:
        """Per token tried."""
        return self.accepted / self.tried


def main() -> None:
    options = read_options("verifier", __doc__, tokens=128)
    engine = load_engine(options)
    backend = engine.backend
    if backend.weights.drafter is None:
        raise SystemExit("no drafter is expected to gain here; name one with --drafter")
    kind = backend.weights.drafter.name
    quantizer = get_quantizer(kind, backend.device, backend.dtype)
    work = full_work(options, options.requests)
    plain = {verifier: Case.plain(work, verifier, verifier == "coupled") for verifier in VERIFIERS}
    texts = run(engine, plain["coupled"]).completions
    pairs, shared, counters = [], {}, {}
    for noise in NOISE[-1:] if options.quick else NOISE:
        drafter = make_drafter(engine, PerturbedQuantizer(quantizer, noise, options.seed))
        alpha = token_acceptance(engine, drafter, texts)
        for verifier in VERIFIERS:
            name = f"{verifier}, {f'noise {noise}' if noise else kind}"
            shared[name], counters[name] = alpha, CountingTries(DRAFT_LENGTH)
            case = Case(name, work, counters[name], drafter, coupled=verifier == "coupled")
            pairs.append((plain[verifier], case))
    found = compare(engine, options, pairs)
    rows = {
        name: comparison.to_dict()
        | {
            "one_minus_tv": number(shared[name]),
            "coupled_bound": number(shared[name] / (2 - shared[name])),
            "acceptance_per_token": number(counters[name].acceptance),
        }
        for name, comparison in found.items()
    }
    table = speedup_table(found, {"per token": [f"{counters[name].acceptance:.3f}" for name in found]})

    def draw(figure: Figure) -> None:
        title(figure, f"Coupled or rejection sampling? ({options.requests} samples, K = {DRAFT_LENGTH})")
        left, right = figure.subplots(1, 2)
        low = min(shared.values())
        line = [low + (1 - low) * step / 50 for step in range(51)]
        left.plot(line, line, color="black", lw=1, label="1 − TV: rejection, in theory")
        left.plot(
            line,
            [a / (2 - a) for a in line],
            color="black",
            lw=1,
            ls=":",
            label="(1 − TV) / (1 + TV): coupled, at least",
        )
        for verifier, colour in zip(VERIFIERS, COLOURS):
            names = [name for name in found if name.startswith(verifier)]
            x = [shared[name] for name in names]
            left.plot(x, [counters[name].acceptance for name in names], "o", color=colour, label=verifier)
            right.plot(x, [found[name].paired.median for name in names], color=colour, lw=1.2)
            for name in names:
                comparison = found[name]
                text = None
                if name == names[0]:
                    same = sum(found[n].identical for n in names), sum(found[n].samples for n in names)
                    text = f"{verifier}: {same[0]} of {same[1]} trajectories as in plain decoding"
                draw_point(right, shared[name], comparison, colour, label=text)
        right.axhline(1, color="black", lw=1)
        left.set(xlabel="1 − TV between drafter and target", ylabel="acceptance per token tried")
        right.set(xlabel="1 − TV between drafter and target", ylabel=SPEEDUP)
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=8)

    conclude(
        options,
        {
            **describe(engine, options),
            "drafter": kind,
            "draft_length": DRAFT_LENGTH,
            "baseline": "plain, same verifier",
            "cases": rows,
        },
        table,
        draw,
        identity_check(engine, found),
    )


if __name__ == "__main__":
    main()
