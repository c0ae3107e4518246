"""What the ablations share: options, an engine, cases, and paired and interleaved runs.

A case is one way of rolling out some work. Every repetition runs each case right beside its baseline, in
alternating order, and only their ratio counts. A repetition stands for an RL step: policies keep what they have
learnt, and are told that the weights have changed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.benchmarks.paired import Paired
from rollout_spec.commands.demo import spread
from rollout_spec.config import DRAFTERS
from rollout_spec.contracts import Completion, SpecCounts
from rollout_spec.drafters.base import Drafter
from rollout_spec.drafters.history import History
from rollout_spec.drafters.quantize import Quantizer
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.example_policy import SIZES, example_folder, expanded_policy, load_problems
from rollout_spec.models.weights import Piece, is_linear, slots_of
from rollout_spec.observe.trace import TraceRecorder
from rollout_spec.policy import calibration
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Off
from rollout_spec.policy.calibration import Calibration
from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.records import SpeculationPolicy, Trace
from rollout_spec.torch_backend.calibrate import BRIEF, calibration_key, measure

HISTORY_TOKENS = 200_000
POOL = 16  # held-out problems per problem used


@dataclass(frozen=True)
class Options:
    """The command line. `requests` prompts of `group` samples each, `tokens` output tokens at most."""

    name: str
    size: str
    model: Path | None
    device: str
    dtype: str
    drafter: str
    requests: int
    group: int
    tokens: int
    repeats: int
    seed: int
    out: Path
    quick: bool

    @property
    def policy(self) -> str:
        """The model, in words."""
        if self.model is not None:
            return str(self.model)
        return "shipped policy" + ("" if self.size == "policy" else f", expanded to {self.size}")


def read_options(
    name: str, doc: str, *, requests: int = 8, group: int = 1, tokens: int = 384, model: bool = True
) -> Options:
    """Read the command line; the numbers are defaults, `model=False` leaves out what a model needs."""
    parser = argparse.ArgumentParser(description=doc.strip().partition("\n")[0])
    if model:
        parser.add_argument(
            "--size", choices=("policy", *SIZES), default="100m", help="of the shipped policy"
        )
        parser.add_argument("--model", type=Path, help="a checkpoint folder of your own")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
        parser.add_argument(
            "--drafter", choices=DRAFTERS, default="auto", help="where it is not the question"
        )
        parser.add_argument("--requests", type=int, default=requests, help="prompts")
        parser.add_argument("--group", type=int, default=group, help="samples of each prompt")
        parser.add_argument("--tokens", type=int, default=tokens, help="most output tokens of a sample")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, each paired with its baseline")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--out", type=Path, default=Path("ablation-results"), help="folder for JSON and PNG")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: to see that it runs"
    )
    values: dict[str, Any] = {"model": None, **dict.fromkeys(("size", "device", "dtype", "drafter"), "")}
    values |= {**dict.fromkeys(("requests", "group", "tokens"), 0), **vars(parser.parse_args())}
    if values["repeats"] < 1:
        parser.error(f"--repeats {values['repeats']}: use 3 or more, or 1 to try")
    options = Options(name, **values)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        return options
    return replace(
        options,
        size="policy",
        drafter="int8",
        requests=min(options.requests, 2),
        group=min(options.group, 2),
        tokens=min(options.tokens, 12),
        repeats=1,
    )


def model_folder(options: Options) -> Path:
    """The checkpoint."""
    if options.model is not None:
        return options.model
    return example_folder() / "policy" if options.size == "policy" else expanded_policy(options.size)


def load_engine(options: Options, **speculation: Any) -> RolloutEngine:
    """An engine that decides nothing itself (cases bring their policies) and never sets a drafter aside.

    It captures no graphs: they would be for one drafter and for the draft lengths of the engine's own policy, and cases with
    others would be compared with those.
    """
    fixed = {"draft_length": 1, "verifier": "coupled", "canary": False, "canary_min_acceptance": 0.0}
    engine = RolloutEngine.from_pretrained(
        model_folder(options),
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        max_num_seqs=max(16, options.requests * options.group),
        max_model_len=max(768, options.tokens + 256),
        graph_bytes=0,
        speculation={"drafter": options.drafter, **fixed, **speculation},
    )
    if engine.tokenizer is None:
        raise SystemExit(f"{model_folder(options)}: no tokenizer; the ablations' prompts are text")
    return engine


@torch.inference_mode()
def make_drafter(engine: RolloutEngine, quantizer: Quantizer) -> QuantizedSelfDrafter:
    """Another drafter of the policy in force; what is not quantized is shared, so many fit beside one target."""
    weights, drafter = engine.backend.weights, QuantizedSelfDrafter(quantizer)
    for slot, linear in slots_of(weights.target.weights).items():
        if is_linear(slot):
            drafter.stage(Piece(slot, linear.dense(), linear.bias))
    drafter.commit(weights.target, weights.version)
    return drafter


def cost_model(engine: RolloutEngine, options: Options, drafter: Drafter | None) -> CostModel:
    """Costs as an engine with this drafter would know them: from `rollout-spec calibrate`, or measured briefly."""
    backend = engine.backend
    own, backend.weights.drafter = backend.weights.drafter, drafter
    key = calibration_key(backend)
    found = calibration.cached(key)
    if found is None:
        grid = replace(BRIEF, seconds=0.5) if options.quick else BRIEF
        found = Calibration.of(key, measure(backend, grid), brief=True)
    backend.weights.drafter = own
    return found.cost_model


def automatic(costs: CostModel, options: Options, **changes: Any) -> AutomaticPolicy:
    """The policy as shipped, but for `changes`."""
    return AutomaticPolicy(costs, seed=options.seed, **changes)


@dataclass(frozen=True)
class Work:
    """Requests. The ids fix the noise, so that all cases write the same text."""

    prompts: tuple[str, ...]
    params: SamplingParams

    @property
    def ids(self) -> list[str]:
        return [f"ablation-{row}" for row in range(len(self.prompts))]

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.params.n


def ragged_work(options: Options) -> Work:
    """Problems of all lengths, answered to their ends: the batch shrinks to a tail, as in a rollout."""
    problems = load_problems().sample(POOL * options.requests, options.seed, "test")
    prompts = tuple(problem.prompt for problem in spread(problems, options.requests))
    return Work(prompts, SamplingParams(n=options.group, max_tokens=options.tokens))


def full_work(options: Options, batch: int) -> Work:
    """The longest problems, cut at `tokens`: `batch` samples are live all the time."""
    problems = load_problems().sample(POOL * max(batch, 4), options.seed, "test")
    prompts = sorted((problem.prompt for problem in problems), key=len)[-batch:]
    return Work(tuple(prompts), SamplingParams(max_tokens=options.tokens, ignore_eos=True))


@dataclass(frozen=True, eq=False)
class Case:
    """One way of rolling out `work`.

    Attributes:
        drafter: With weights, or None.
        history: Makes the history of a run, or gives one that lives on; None: no history.
        coupled: Which verifier.
    """

    name: str
    work: Work
    policy: SpeculationPolicy
    drafter: Drafter | None = None
    history: Callable[[], History] | None = None
    coupled: bool = True

    @classmethod
    def plain(cls, work: Work, name: str = "plain", coupled: bool = True) -> Case:
        """Plain decoding."""
        return cls(name, work, Off(), coupled=coupled)


def new_history() -> History:
    """One that has seen nothing yet."""
    return History(HISTORY_TOKENS)


@dataclass(frozen=True)
class Run:
    """One rollout: its makespan in seconds, what it wrote, and its passes."""

    seconds: float
    completions: list[Completion]
    trace: Trace

    @property
    def tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


def run(engine: RolloutEngine, case: Case) -> Run:
    """Roll a case out once."""
    backend = engine.backend
    backend.policy, backend.coupled, backend.weights.drafter = case.policy, case.coupled, case.drafter
    backend.history = case.history() if case.history is not None else None
    backend.recorder = TraceRecorder()
    start = time.perf_counter()
    completions = engine.generate(list(case.work.prompts), case.work.params, request_ids=case.work.ids)
    return Run(time.perf_counter() - start, completions, backend.recorder.trace())


def token_acceptance(engine: RolloutEngine, drafter: Drafter, texts: Sequence[Completion]) -> float:
    """Mean 1 - TV between target and drafter over the answers' tokens: acceptance per token, at T=1."""
    engine.backend.weights.drafter = drafter
    shared = []
    for text in texts:
        logits = engine.backend.compare(np.array(text.prompt_token_ids + text.token_ids))
        assert logits is not None, "no room in the KV cache"
        target, draft = (x[len(text.prompt_token_ids) - 1 : -1].float().softmax(-1) for x in logits)
        shared.append(torch.minimum(target, draft).sum(-1))
    return torch.cat(shared).mean().item()


@dataclass(frozen=True)
class Comparison:
    """A case and its baseline, run by run."""

    case: Case
    runs: Sequence[Run]
    baseline: Sequence[Run]

    @property
    def paired(self) -> Paired:
        mine, base = ([run.seconds for run in runs] for runs in (self.runs, self.baseline))
        ratios = tuple(a / b for a, b in zip(base, mine))
        return Paired(ratios, statistics.median(base), statistics.median(mine))

    @property
    def spec(self) -> SpecCounts:
        return sum((c.spec for run in self.runs for c in run.completions), SpecCounts())

    @property
    def identical(self) -> int:
        """Samples with the tokens and logprobs of the baseline's, of all runs."""
        return sum(
            a.token_ids == b.token_ids and a.logprobs == b.logprobs
            for mine, base in zip(self.runs, self.baseline)
            for a, b in zip(mine.completions, base.completions)
        )

    @property
    def samples(self) -> int:
        return sum(len(run.completions) for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON values; None where nothing was drafted."""
        steps = [step for run in self.runs for step in run.trace.steps]
        return {
            **self.paired.to_dict(),
            "tokens_per_second": round(statistics.median(run.tokens / run.seconds for run in self.runs), 2),
            "tau": number(self.spec.tau),
            "accepted_share_of_drafts": number(self.spec.acceptance),
            "speculated_share_of_passes": number(sum(step.drafted > 0 for step in steps) / len(steps)),
            "tokens": sum(run.tokens for run in self.runs),
            "identical_trajectories": self.identical,
            "trajectories": self.samples,
        }


def number(value: float) -> float | None:
    """Rounded; None for NaN."""
    return round(value, 4) if math.isfinite(value) else None


def compare(
    engine: RolloutEngine,
    options: Options,
    pairs: Sequence[tuple[Case, Case]],
    before: Callable[[], object] = lambda: None,
) -> dict[str, Comparison]:
    """Run (baseline, case) pairs: all once to warm up, then `repeats` times; by name of the case.

    `before` is called before every repetition.
    """
    runs: dict[str, tuple[list[Run], list[Run]]] = {case.name: ([], []) for _, case in pairs}
    with Console(stderr=True).status("") as status:
        for case in dict.fromkeys(case for pair in pairs for case in pair):
            status.update(f"warming up: {case.name}")
            run(engine, case)
        for repeat in range(options.repeats):
            before()
            for case in dict.fromkeys(case for pair in pairs for case in pair):
                case.policy.after_update()
            for place, pair in enumerate(pairs if repeat % 2 == 0 else pairs[::-1]):
                status.update(f"repetition {repeat + 1} of {options.repeats}: {pair[1].name}")
                for side in (0, 1) if (repeat + place) % 2 == 0 else (1, 0):
                    runs[pair[1].name][side].append(run(engine, pair[side]))
    return {case.name: Comparison(case, runs[case.name][1], runs[case.name][0]) for _, case in pairs}
