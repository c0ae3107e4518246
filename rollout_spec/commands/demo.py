"""`rollout-spec demo`: a real reasoning policy rolled out twice, plainly and speculatively, the same to the token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_spec.contracts import Completion, RolloutSpecError, SpecCounts
from rollout_spec.example_policy import SIZES, expanded_policy, load_problems
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish, report_options

if TYPE_CHECKING:
    from rollout_spec.engine import RolloutEngine

MAX_TOKENS = 512  # the longest worked solution of the example
SHOWN, LONGEST_SHOWN = 3, 200  # sample answers, and characters of one
POOL = 16  # held-out problems per problem of the demo, which are spread over their lengths
PLAIN, SPECULATIVE = "plain", "speculative"


@dataclass(frozen=True)
class Rollout:
    """One rollout's figures; lengths in tokens, times in seconds, acceptance and tau None without drafts."""

    makespan: float
    tokens: int
    tokens_per_second: float
    tau: float | None
    acceptance: float | None
    mean_reward: float
    length_median: int
    length_p99: int
    length_max: int

    @classmethod
    def of(cls, completions: Sequence[Completion], rewards: Sequence[float], seconds: float) -> Rollout:
        lengths = sorted(len(completion.token_ids) for completion in completions)
        spec = sum((completion.spec for completion in completions), SpecCounts())
        return cls(
            makespan=seconds,
            tokens=sum(lengths),
            tokens_per_second=sum(lengths) / seconds,
            tau=spec.tau if spec.verify_steps else None,
            acceptance=spec.acceptance if spec.drafted else None,
            mean_reward=statistics.fmean(rewards),
            length_median=lengths[len(lengths) // 2],
            length_p99=lengths[min(len(lengths) - 1, len(lengths) * 99 // 100)],
            length_max=lengths[-1],
        )


def spread(problems: Sequence[Any], count: int) -> list[Any]:
    """`count` of the problems, evenly spaced from the shortest to the longest: few problems, all lengths."""
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    last = len(ordered) - 1
    return [ordered[row * last // max(count - 1, 1)] for row in range(count)]


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--requests", type=click.IntRange(1, 1024), default=16, show_default=True, help="Problems.")
@click.option("--group", type=click.IntRange(1, 1024), default=2, show_default=True, help="Samples of each.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the problems and the noise.")
@click.option(
    "--size",
    type=click.Choice(SIZES),
    default="300m",
    show_default=True,
    help="Parameters to grow the shipped policy to.",
)
@report_options
def command(
    model: Path | None, requests: int, group: int, seed: int, size: str, json_path: Path | None
) -> None:
    """Roll a policy out for GRPO, plainly and speculatively, and show that nothing but time differs.

    Without MODEL, the policy shipped in examples/arithmetic is used, grown to --size parameters that compute
    the same function. MODEL, a folder, is used as it is.
    """
    problems_module = load_problems()
    console = Console()
    with console.status("preparing the policy"):
        folder = expanded_policy(size) if model is None else model
        engine = _engine(folder, seed)
    problems = spread(problems_module.sample(POOL * requests, seed, "test"), requests)
    about = f"{_parameters(engine) / 1e6:.0f} M parameters"
    console.print(
        f"[bold]{requests} problems x {group} samples[/], {about}, {_how(engine)}\n", highlight=False
    )
    runs, seconds = roll_out(engine, [problem.prompt for problem in problems], group, console)
    rewards = {
        name: [
            problems_module.reward(problems[row // group], completion.text)
            for row, completion in enumerate(completions)
        ]
        for name, completions in runs.items()
    }
    rollouts = {name: Rollout.of(runs[name], rewards[name], seconds[name]) for name in runs}
    same = sum(
        a.token_ids == b.token_ids and a.logprobs == b.logprobs
        for a, b in zip(runs[PLAIN], runs[SPECULATIVE])
    )
    spec = sum((completion.spec for completion in runs[SPECULATIVE]), SpecCounts())
    checks = [
        Check(
            "trajectories, with logprobs",
            f"{same} of {len(runs[PLAIN])} identical",
            "all",
            same == len(runs[PLAIN]),
        ),
        Check("drafts accepted", spec.accepted, "some", spec.accepted > 0),
    ]
    speedup = seconds[PLAIN] / seconds[SPECULATIVE]
    results = {
        "rollouts": {name: asdict(rollout) for name, rollout in rollouts.items()},
        "speedup": speedup,
        "parameters": _parameters(engine),
        "grown_from_shipped_policy": model is None,
        "drafter": _drafter(engine),
        "exactness": engine.stats().exactness,
        "requests": requests,
        "group": group,
    }
    report = Report("demo", results, checks, EvidenceLevel.L1, seed)
    console.print()
    console.print(figures(rollouts))
    console.print(f"\n[bold]speedup {speedup:.2f}x[/] (makespan)", highlight=False)
    print_proof(console, runs[SPECULATIVE], rewards[SPECULATIVE], same, group)
    console.print(f"\n{escape(caveat(report, engine, model))}", style="dim", highlight=False)
    finish(report, json_path, console, show_checks=not report.passed)


def _engine(folder: Path, seed: int) -> RolloutEngine:
    import torch

    from rollout_spec.drafters.quantize import usual_quantizer
    from rollout_spec.engine import RolloutEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    speculation = {"verifier": "coupled", "drafter": usual_quantizer(device, torch.bfloat16)}
    engine = RolloutEngine.from_pretrained(folder, seed=seed, speculation=speculation)
    if engine.tokenizer is None:
        raise RolloutSpecError(f"{folder}: no tokenizer; the demo's prompts are text")
    return engine


def _drafter(engine: RolloutEngine) -> str:
    drafter = engine.backend.weights.drafter
    return "none" if drafter is None else drafter.name


def _parameters(engine: RolloutEngine) -> int:
    from rollout_spec.torch_backend.weights import linear_shapes

    spec = engine.backend.spec
    return sum(n * k for n, k in linear_shapes(spec)) + spec.vocab_size * spec.hidden_size


def _how(engine: RolloutEngine) -> str:
    dtype = str(engine.backend.dtype).removeprefix("torch.")
    return f"{dtype} on {engine.backend.device}, drafter {_drafter(engine)}"


def roll_out(
    engine: RolloutEngine, prompts: list[str], group: int, console: Console
) -> tuple[dict[str, list[Completion]], dict[str, float]]:
    """The same requests plainly and speculatively; completions and seconds of each.

    Text seen before helps only where it would in use: the plain run's answers, which are the very same, and those of
    the warm-up are not remembered.
    """
    from rollout_spec.contracts import SamplingParams
    from rollout_spec.observe.live import LiveRollouts
    from rollout_spec.policy.baselines import Off

    backend = engine.backend
    policies = {PLAIN: (Off(), None), SPECULATIVE: (backend.policy, backend.history)}
    backend.history = None
    ids = [f"demo-{row}" for row in range(len(prompts))]
    runs, seconds = {}, {}
    for policy, _ in policies.values():  # both ways once, so that neither pays for the first pass
        backend.policy = policy
        engine.generate(prompts, SamplingParams(n=group, max_tokens=8))
    watch = LiveRollouts(console, list(policies))
    with watch.shown():
        for name, (policy, history) in policies.items():
            backend.policy, backend.history = policy, history
            params = SamplingParams(n=group, max_tokens=MAX_TOKENS)

            def call(params: SamplingParams = params) -> tuple[list[Completion], float]:
                start = time.perf_counter()
                completions = engine.generate(prompts, params, request_ids=ids)
                return completions, time.perf_counter() - start

            runs[name], seconds[name] = watch.run(name, engine, len(prompts) * group, call)
    return runs, seconds


def figures(rollouts: dict[str, Rollout]) -> Table:
    """Figures side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for name in rollouts:
        table.add_column(name, justify="right")
    rows: list[tuple[str, str, str]] = [
        ("makespan", "makespan", "{:.1f} s"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
        ("tokens per verification (tau)", "tau", "{:.2f}"),
        ("acceptance", "acceptance", "{:.2f}"),
        ("mean reward", "mean_reward", "{:.2f}"),
        ("response length, median", "length_median", "{}"),
        ("response length, p99", "length_p99", "{}"),
        ("response length, longest", "length_max", "{}"),
    ]
    for label, name, form in rows:
        values = [getattr(rollout, name) for rollout in rollouts.values()]
        table.add_row(label, *("–" if value is None else form.format(value) for value in values))
    return table


def print_proof(
    console: Console, completions: Sequence[Completion], rewards: Sequence[float], same: int, group: int
) -> None:
    """What was the same, and some of the answers."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    style = "bold green" if same == len(completions) else "bold red"
    console.print(
        f"[{style}]{same} of {len(completions)} trajectories identical[/], {tokens:,} tokens and their logprobs "
        "compared\n",
        highlight=False,
    )
    short = sorted(range(0, len(completions), group), key=lambda row: len(completions[row].token_ids))
    for row in short[:SHOWN]:
        console.print(f"reward {rewards[row]:g}  {escape(_text(completions[row]))}", highlight=False)


def _text(completion: Completion) -> str:
    """The answer on one line; what a model says must not drive a terminal."""
    text = "".join(character if character.isprintable() else "·" for character in completion.text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def caveat(report: Report, engine: RolloutEngine, model: Path | None) -> str:
    """What the figures are, and what they are not."""
    machine = report.machine
    where = (
        f"{machine.cpu}, {machine.threads} threads"
        if engine.backend.device.type == "cpu"
        else machine.gpus[0]
    )
    text = (
        f"Measured once each, one after the other, on this machine ({where}). In the speculative run "
        "the engine decides before every pass, from costs measured here, who drafts and how far ahead."
    )
    if model is None:
        text += (
            " The policy is the shipped one, trained on this task, grown with weights that keep its function: its "
            "answers and acceptance are the small policy's, its cost is the larger size's."
        )
    return f"{text} Nothing here says what a GPU or another policy gains."
