"""The measurements behind `rollout-spec bench longtail`: whole rollouts with the policy's own lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.benchmarks.calibrated import calibrated
from rollout_spec.benchmarks.degrade import degrade, perturb
from rollout_spec.benchmarks.turns import Work, in_turns
from rollout_spec.benchmarks.watching import Listening, Timing, adding_up
from rollout_spec.contracts import Completion, SamplingParams, SpecCounts
from rollout_spec.drafters.history import History
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import EfficientRollout, Fixed, Off, TLTBandit
from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.records import HISTORY, PassTiming, SpeculationPolicy
from rollout_spec.policy.simulator import makespan, simulate
from rollout_spec.policy.workloads import Acceptance, Workload, from_lengths

_LONGEST, _PROMPT = 512, 11  # tokens; prompts are 5 to 49 long, this on average
_DEGRADED, _DEGRADED_DRAWS = (0.96, 0.90), 8
_WARMUP = 2  # draws before the first counted one
PUBLISHED = ("EfficientRollout rule, tuned", "TLT bandit, tuned")
_RULES = ("best fixed", *PUBLISHED)
_HISTORY_K, _HISTORY_ALONE = (4, 8), "fixed, history alone, K={} while B <= {}"
SELF, ALL = "automatic, self-drafter", "automatic, all drafters"
_GRID_K, _GRID_BATCH = (1, 2, 3, 4, 5, 6, 8, 10, 12), (1, 2, 4, 8, 16, 32)


@dataclass
class Rollouts:
    """What one way of deciding did, draw by draw.

    Attributes:
        seconds: Makespan of every draw.
        spec: Speculation counts over all draws.
        differing: Trajectories that are not those of plain decoding.
    """

    seconds: list[float]
    spec: SpecCounts
    differing: int = 0


def stratified(count: int, draws: int, seed: int) -> list[str]:
    """Prompts for `draws` rollouts of `count` prompts, each rollout with its share of short and of long ones.

    Answers are about as long as their problem is large, and few prompts drawn blindly often hold no long one: of
    each rollout's prompts, one comes from every 1/count of a large sample ordered by length.
    """
    pool = sorted(load_problems().prompts(64 * count * draws, seed, "test"), key=len)
    rng = np.random.default_rng(seed)
    share = len(pool) // count
    rollouts = [[pool[row * share + rng.integers(share)] for row in range(count)] for _ in range(draws)]
    return [prompt for rollout in rollouts for prompt in rollout]


class LongTail:
    """Rollouts of `batch` prompts, one sample of each, drawn anew `draws` times; all ways of deciding roll the same draws out.

    Each does so in an engine of its own, they take turns within a rollout and change engines from draw to draw. The
    policies with a memory keep it, as in use: to them every draw is an RL step. Before the first counted draw all have
    had two of their own.

    Attributes:
        results: By name: speedup over plain decoding with its interval, and counts.
        over: Speed of automatic mode over the other rules, by epoch and names: median of the draws' ratios, and its
            interval. With all drafters it remembers the answers of its draws, as in use; the first finds none.
        notes: What was found on the way: acceptance, the best fixed rule, predictions.
    """

    def __init__(self, path: Path, batch: int, draws: int, seed: int, console: Console) -> None:
        self.path, self.batch, self.draws, self.seed, self.console = path, batch, draws, seed, console
        self.engines = [
            RolloutEngine.from_pretrained(
                path,
                seed=seed,
                max_model_len=640,
                max_num_seqs=batch,
                speculation={
                    "drafter": usual_quantizer("cpu", torch.bfloat16),
                    "draft_length": 6,
                    "verifier": "coupled",
                    "canary_min_acceptance": 0.0,
                },
            )
            for _ in range(3 + len(_RULES) + 1)  # the last one's passes are timed
        ]
        drafter = self.engines[0].backend.weights.drafter
        assert drafter is not None
        self.drafter = drafter.name
        calibration = calibrated(self.engines[0], console)
        self.costs = calibration.cost_model
        self._timings: list[list[PassTiming]] = []  # of passes within each draw of the first epoch
        self.results: dict[str, dict[str, Any]] = {}
        self.over: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {
            "drafter": self.drafter,
            "exactness": self.engines[0].stats().exactness,
            "costs": self.costs.to_dict(),
            "held_out_error": {kind: vars(error) for kind, error in calibration.held_out.items()},
        }
        self._prompts = stratified(batch, draws + _WARMUP, seed)
        self._tuning = stratified(batch, 8, seed + 1)
        self._texts: list[Completion] = []
        self._doubts: tuple[tuple[float, float], ...] = ()  # shares of tokens drafted, and how often accepted
        self._answers: list[Completion] = []  # of the first epoch
        self._plain: dict[str, list[list[int]]] = {}

    def run(self) -> None:
        """Tune on other prompts, first epoch, second epoch."""
        workload = self._tuning_workload()
        fixed, efficient, bandit = self._tune(workload)
        runs, lengths = self._epoch(
            "epoch 1",
            {
                "plain": Off(),
                SELF: self._automatic(),
                ALL: self._automatic(),
                **dict(zip(_RULES, (fixed(), efficient(), bandit()), strict=True)),
            },
            self._prompts,
            {ALL: History()},
            timed=True,
        )
        self._compare("epoch 1", runs, SELF)
        self._compare("epoch 1", runs, ALL)
        self._predict(runs, lengths)
        self._second_epoch(dict(zip(_RULES, (fixed(), efficient(), bandit()), strict=True)))

    def degraded(self) -> None:
        """The first rollouts again, after `run`, with a drafter of which noise has made a worse one."""
        for acceptance in _DEGRADED:
            with self.console.status(f"degrading the drafter to acceptance {acceptance}"):
                found = [degrade(engine, acceptance, self._texts, self.seed) for engine in self.engines[:2]]
            self.notes[f"acceptance, asked for {acceptance}"] = round(found[0], 4)
            self._epoch(
                f"acceptance {acceptance}",
                {"plain": Off(), SELF: self._automatic()},
                self._prompts[: (_DEGRADED_DRAWS + _WARMUP) * self.batch],
            )
        for engine in self.engines[:2]:
            perturb(engine, 0.0)

    # --- the parts -------------------------------------------------------------------------------------

    def _automatic(self) -> AutomaticPolicy:
        return AutomaticPolicy(self.costs, seed=self.seed)

    def _epoch(
        self,
        epoch: str,
        policies: dict[str, SpeculationPolicy],
        prompts: Sequence[str],
        history: dict[str, History] | None = None,
        timed: bool = False,
    ) -> tuple[dict[str, Rollouts], list[list[int]]]:
        runs = {name: Rollouts([], SpecCounts()) for name in policies}
        draws = len(prompts) // self.batch
        lengths: list[list[int]] = []
        for draw in range(draws):
            texts = prompts[draw * self.batch : (draw + 1) * self.batch]
            ids = [f"{epoch}-{self.batch}-{draw}-{row}" for row in range(self.batch)]
            names = list(policies)
            names = names[draw % len(names) :] + names[: draw % len(names)]
            works = [
                self._work(engine, policies[name], texts, ids, (history or {}).get(name))
                for engine, name in zip(self.engines, names, strict=False)
            ]
            timing = Timing()
            if timed:
                works.append(self._work(self.engines[-1], timing, texts, ids))
                self._timings.append(timing.timings)
            with self.console.status(f"{epoch}, B={self.batch}, draw {draw + 1} of {draws}"):
                done = dict(zip(names, in_turns(works), strict=False))  # without the one that was timed
            for name, (seconds, completions) in done.items():
                policies[name].after_update()  # a draw is an RL step
                if (memory := (history or {}).get(name)) is not None:
                    memory.after_update()
                tokens = [completion.token_ids for completion in completions]
                expected = self._plain.setdefault(
                    ids[0], [completion.token_ids for completion in done["plain"][1]]
                )
                if epoch == "epoch 1" and name == "plain":
                    self._answers += completions
                if draw >= _WARMUP:
                    run = runs[name]
                    run.seconds.append(seconds)
                    run.spec = sum((completion.spec for completion in completions), run.spec)
                    run.differing += sum(a != b for a, b in zip(tokens, expected, strict=True))
            lengths.append([len(tokens) for tokens in self._plain[ids[0]]])
        self._report(epoch, runs)
        return runs, lengths

    def _work(
        self,
        engine: RolloutEngine,
        policy: SpeculationPolicy,
        texts: Sequence[str],
        ids: list[str],
        history: History | None = None,
    ) -> Work[list[Completion]]:
        engine.backend.history = history
        params = SamplingParams(max_tokens=_LONGEST)
        return Work(engine, policy, partial(engine.generate, list(texts), params, request_ids=ids))

    def _compare(self, epoch: str, runs: dict[str, Rollouts], automatic: str) -> None:
        for rule, run in runs.items():
            if rule in ("plain", SELF, ALL):
                continue
            ratios = [other / ours for other, ours in zip(run.seconds, runs[automatic].seconds, strict=True)]
            low, high = median_interval(ratios)
            self.over[f"{epoch}, {automatic} over {rule}"] = {
                "median_ratio": round(float(np.median(ratios)), 4),
                "interval_95": [round(low, 4), round(high, 4)],
            }

    def _report(self, epoch: str, runs: dict[str, Rollouts]) -> None:
        plain = np.array(runs["plain"].seconds)
        for name, run in runs.items():
            ratios = plain / np.array(run.seconds)
            low, high = median_interval(ratios.tolist())
            spec = run.spec
            key = f"{epoch}, B={self.batch}, {name}"
            self.results[key] = {
                "speedup": round(float(np.median(ratios)), 4),
                "interval_95": [round(low, 4), round(high, 4)],
                "of_total_time": round(float(plain.sum() / sum(run.seconds)), 4),
                "draws": len(run.seconds),
                "median_seconds": round(float(np.median(run.seconds)), 3),
                "tau": None if not spec.verify_steps else round(spec.tau, 3),
                "accepted_share_of_drafts": None if not spec.drafted else round(spec.acceptance, 4),
                "differing_trajectories": run.differing,
            }
            self.console.print(f"{key}: {np.median(ratios):.3f} ({low:.3f}-{high:.3f})", highlight=False)

    def _predict(self, runs: dict[str, Rollouts], lengths: list[list[int]]) -> None:
        """What the simulator makes of the same draws, given their lengths, the acceptance and what passes cost.

        How often a token is accepted, and how sure the drafter is of it, is what it was on the tuning prompts.

        Machines drift within seconds: passes of a draw cost what passes of one more rollout of it took, that had its turns
        with the others. The policy believes what was measured before the epoch, and has its draws before the first counted
        one here, too.

        Args:
            runs: Of the counted draws.
            lengths: Output tokens, of all draws.
        """
        true = [adding_up(timings) for timings in self._timings]
        plain = [
            costs.target(self.batch, self.batch, 0) / self.costs.target(self.batch, self.batch, 0)
            for costs in true[_WARMUP:]
        ]
        self.notes["a plain pass in epoch 1 over one before"] = {
            "least": round(float(min(plain)), 4), "most": round(float(max(plain)), 4)
        }  # fmt: skip
        policies: dict[str, SpeculationPolicy] = {
            "plain": Off(),
            SELF: self._automatic(),
        }
        for name, policy in policies.items():
            workloads = [
                self._workload(draw, *known) for draw, known in enumerate(zip(lengths, true, strict=True))
            ]
            predicted = _simulated(workloads, policy, true)[_WARMUP:]
            ratios = np.array(predicted) / np.array(runs[name].seconds)
            self.notes[f"simulated over measured makespan, {name}"] = {
                "median": round(float(np.median(ratios)), 4),
                "of_total": round(float(sum(predicted) / sum(runs[name].seconds)), 4),
            }

    def _second_epoch(self, rules: dict[str, SpeculationPolicy]) -> None:
        """The same prompts again, with other noise and the same weights, and the first epoch's answers in memory.

        `rules` have no use for that memory and draft with the self-drafter alone. Here, where history finds most, it is
        compared with history alone, too, in the whole rollout and in its tail.
        """
        alone: dict[str, SpeculationPolicy] = {
            _HISTORY_ALONE.format(k, most): Fixed(k, most, HISTORY)
            for k, most in zip(_HISTORY_K, (self.batch, self.batch // 4), strict=True)
        }
        policies = {"plain": Off(), ALL: self._automatic(), **rules, **alone}
        histories = {name: self._first_answers() for name in (ALL, *alone)}
        runs, _ = self._epoch("epoch 2", policies, self._prompts, histories)
        self._compare("epoch 2", runs, ALL)

    def _first_answers(self) -> History:
        history = History()
        for completion in self._answers:
            tokens = np.array([completion.token_ids])
            history.begin(0, np.array(completion.prompt_token_ids))
            history.extend(np.zeros(1, np.int64), tokens, np.array([tokens.size]))
            history.finish(0)
        history.after_update()
        return history

    # --- the best that fixed rules can do, from the simulator ------------------------------------------

    def _tuning_workload(self) -> list[Workload]:
        """Rollouts on other prompts: real lengths, and the acceptance measured on them, by how sure the drafter was."""
        policy = Listening(Fixed(6))
        for draw in range(len(self._tuning) // self.batch):
            texts = self._tuning[draw * self.batch : (draw + 1) * self.batch]
            ids = [f"tuning-{draw}-{row}" for row in range(self.batch)]
            self._texts += in_turns([self._work(self.engines[0], policy, texts, ids)])[0][1]
        shares, acceptance = policy.leads.shares, policy.leads.acceptance(1.0)
        self._doubts = tuple(zip(shares.tolist(), acceptance.tolist(), strict=True))
        self.notes["acceptance, self-drafter"] = round(float(shares @ acceptance), 4)
        self.notes["of tokens from unsure to sure: share, acceptance"] = np.round(self._doubts, 4).tolist()
        lengths = [len(completion.token_ids) for completion in self._texts]
        return [
            self._workload(draw, lengths[row : row + self.batch], self.costs)
            for draw, row in enumerate(range(0, len(lengths), self.batch))
        ]

    def _workload(self, draw: int, lengths: Sequence[int], costs: CostModel) -> Workload:
        """Decoding begins when a pass over all prompts ends."""
        count = len(lengths)
        prefilled = np.full(count, costs.target(count, count * _PROMPT, count * _PROMPT))
        workload = from_lengths(
            "rollout", np.array(lengths), prompt=_PROMPT, arrivals=prefilled, limit=_LONGEST
        )
        acceptance = Acceptance(np.ones(count), doubts=self._doubts, doubts_seed=draw)
        return replace(workload, drafters={self.drafter: acceptance}, stoppable=True)

    def _tune(self, workloads: list[Workload]) -> tuple[Callable[[], SpeculationPolicy], ...]:
        """The best of each family of rules, by simulated makespan over the tuning rollouts."""

        def best(options: Mapping[str, Callable[[], SpeculationPolicy]]) -> Callable[[], SpeculationPolicy]:
            costs = [self.costs] * len(workloads)
            seconds = {name: sum(_simulated(workloads, make(), costs)) for name, make in options.items()}
            name = min(seconds, key=seconds.__getitem__)
            plain = sum(_simulated(workloads, Off(), costs))
            self.notes.setdefault("tuned", {})[name] = {"simulated speedup": round(plain / seconds[name], 3)}
            return options[name]

        batches = [b for b in _GRID_BATCH if b <= self.batch]
        fixed = {f"fixed K={k} while B <= {b}": partial(Fixed, k, b) for k in _GRID_K for b in batches}
        efficient = {
            f"EfficientRollout, ladder from {k}, on at a gain of {gain}": partial(
                EfficientRollout, self.costs, ladder=(k, k + 2, k + 4), armed_above=0, least_gain=gain
            )
            for k in (1, 2, 3, 5)
            for gain in (1.0, 1.05, 1.2)
        }
        bandit = {
            f"TLT bandit, up to B={b}, {arms}": partial(
                TLTBandit, {b: arms}, seed=self.seed, largest_batch=b, epsilon=0.05
            )
            for arms in ((2, 4, 6), (3, 5, 8), (4, 6, 10))
            for b in batches
        }
        return best(fixed), best(efficient), best(bandit)


def _simulated(
    workloads: Sequence[Workload], policy: SpeculationPolicy, costs: Sequence[CostModel]
) -> list[float]:
    """Makespans of rollouts one after the other, each an RL step with luck of its own."""
    seconds = []
    for draw, (workload, true) in enumerate(zip(workloads, costs, strict=True)):
        seconds.append(makespan(simulate(workload, policy, true, seed=draw)))
        policy.after_update()
    return seconds
