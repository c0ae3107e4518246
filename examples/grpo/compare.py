"""The same training twice, with speculation on and off, side by side: is it the same, and how much faster?

    python examples/grpo/compare.py --steps 20 --size 100m --json compare.json

The two trainings take their steps in turn, in alternating order. Every reward, token, logprob and parameter must
agree, bit for bit. Rollout time counts weight updates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from train import Grpo, starting_point

from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish


def same(on: Grpo, off: Grpo) -> list[Check]:
    """What has to be bitwise the same in both trainings."""
    pairs = {
        "rewards": (on.log.rewards, off.log.rewards),
        "tokens and logprobs": (on.log.tokens_sha256, off.log.tokens_sha256),
        "parameters": ([on.parameters_sha256()], [off.parameters_sha256()]),
    }
    checks = []
    for name, (a, b) in pairs.items():
        agree = sum(x == y for x, y in zip(a, b, strict=True))
        checks.append(Check(f"same {name}", f"{agree} of {len(a)}", "all, bit for bit", agree == len(a)))
    drafted = on.log.spec.drafted
    return [*checks, Check("draft tokens with speculation on", drafted, "> 0", drafted > 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare GRPO with speculation on and off.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=13.0, help="no step begins later than this")
    parser.add_argument("--size", choices=("policy", "100m"), default="policy")
    parser.add_argument("--prompts", type=int, default=4, help="problems per step")
    parser.add_argument("--group", type=int, default=4, help="answers per problem")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    start = time.perf_counter()
    chosen = {name: getattr(args, name) for name in ("steps", "prompts", "group", "lr", "seed")}
    policy = starting_point(args.size)
    runs = {name: Grpo(policy, **chosen, minibatches=1, speculation=name == "on") for name in ("on", "off")}
    before = runs["on"].parameters_sha256()
    for step in range(args.steps):
        if time.perf_counter() - start > 60 * args.minutes:
            break
        for name in ("on", "off") if step % 2 == 0 else ("off", "on"):
            runs[name].step()
        taken = {n: round(r.log.rollout[-1] + r.log.update[-1], 2) for n, r in runs.items()}
        print(
            f"step {step}: reward {runs['on'].log.rewards[-1]:.3f}, rollout and update {taken} s", flush=True
        )
    per_step = {name: [sum(t) for t in zip(run.log.rollout, run.log.update)] for name, run in runs.items()}
    spent = {name: sum(seconds) for name, seconds in per_step.items()}
    ratios = sorted(off / on for on, off in zip(per_step["on"], per_step["off"]))
    shorter = spent["off"] / spent["on"]
    checks = [
        *same(runs["on"], runs["off"]),
        Check("steps", len(runs["on"].log.rewards), f"{args.steps}", len(runs["on"].log.rewards) == args.steps),
        Check("parameters trained", runs["on"].parameters_sha256() != before, "changed",
              runs["on"].parameters_sha256() != before),
    ]  # fmt: skip
    if args.size == "100m":
        name = "time of rollouts and weight updates, plain over speculative"
        checks.append(Check(name, round(shorter, 3), ">= 1.15", shorter >= 1.15))
    results = {
        "rollout_time_ratio": round(shorter, 4),
        "ratio_per_step": {
            "smallest": round(ratios[0], 3),
            "median": round(statistics.median(ratios), 3),
            "largest": round(ratios[-1], 3),
        },
        "rollout_and_update_seconds": {name: round(value, 2) for name, value in spent.items()},
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "exactness": runs["on"].engine.stats().exactness,
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        **{name: run.log.summary() for name, run in runs.items()},
    }
    print(f"rollout time, weight updates included: {spent['off']:.1f} s without speculation, {spent['on']:.1f} s with"
          f" ({shorter:.2f} x)")  # fmt: skip
    finish(Report("grpo compare", results, checks, EvidenceLevel.L1, args.seed), args.json)


if __name__ == "__main__":
    main()
