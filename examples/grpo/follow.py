"""Does a drafter follow the policy? GRPO with a spot-trained drafter and two frozen ones.

    rollout-spec drafter train examples/arithmetic/policy --out tv
    rollout-spec drafter train examples/arithmetic/policy --out kl --objective kl
    python examples/grpo/follow.py --drafter tv/step-00001600 --kl kl/step-00001600 --out follow

Whether a drafter that was trained for acceptance itself (total variation, TV) before RL needs no training during it, as has been
argued, is what the first of the frozen ones shows; the second was trained for KL only.

The policy is trained by `train.py`'s GRPO. Between rollout and update of every step the spot trainer has a fixed number of
micro-batches, on the answers just sampled; it publishes what is accepted more often. Every few steps all drafters are
judged on the same held-out text of the policy as it then is. At the end the first drafter is trained to convergence
on rollouts of the final policy: the most that following could have won. The last figures come from real decoding.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from train import ARITHMETIC, Grpo, sample

from rollout_spec import Completion, RolloutEngine, SamplingParams
from rollout_spec.adaptive.acceptance import measure
from rollout_spec.adaptive.checkpoint import Checkpoint, read_checkpoint
from rollout_spec.adaptive.features import episodes_of
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.offline import CurvePoint, decode, drafting_only, train
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.spot.checkpoint import begin_from
from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.local import LocalSpot
from rollout_spec.adaptive.spot.serving import NotedEngine, ServedEngine
from rollout_spec.adaptive.spot.trainee import DrafterTrainee
from rollout_spec.adaptive.trainer import DrafterTrainer, StepMetrics
from rollout_spec.observe.report import Check, EvidenceLevel, Report

DRAFT_LENGTH = 5
POLICY = ARITHMETIC / "policy"
LONGEST_CHAIN, MAX_TOKENS = 8, 100  # of problems and answers, as `train.py` has them


def prompts(count: int, seed: int, split: str) -> list[str]:
    """Of problems like those that the policy is trained on."""
    drawn = sample(4 * count, seed=seed, split=split)
    return [p.prompt for p in drawn if p.kind != "chain" or len(p.operands) <= LONGEST_CHAIN][:count]


class FollowedGrpo(Grpo):
    """GRPO, and a spot trainer that has `micro_batches` between each rollout and its update."""

    def follow(self, drafter: Path, micro_batches: int, learning_rate: float | None) -> None:
        """Begin with the drafter of a checkpoint."""
        saved = read_checkpoint(drafter)
        served: ServedEngine = NotedEngine(self.engine, saved.spec)
        config = replace(saved.config.without_end(), warmup_steps=micro_batches)
        if learning_rate is not None:
            config = replace(config, learning_rate=learning_rate)
        trainee = DrafterTrainee.begin(served, config, str(drafter), judged_tokens=2048)
        folder = Path(tempfile.mkdtemp())
        begin_from(folder, saved.module().state_dict())
        options = SpotOptions(micro_batches=micro_batches // 2, publish_every=2, save_every=10**6)
        self.spot, self.trainee, self.micro_batches = (
            LocalSpot(served, trainee, options, folder),
            trainee,
            micro_batches,
        )
        self.published, self.spot_seconds = served, 0.0

    def learn(self, completions: list[Completion], advantages: list[torch.Tensor]) -> float:
        """Train the drafter, as idle workers would while the last answers are decoded; then the policy."""
        begun, start = len(self.spot.host.times.micro_batches), time.perf_counter()
        self.spot.train(lambda: len(self.spot.host.times.micro_batches) - begun > self.micro_batches)
        self.spot_seconds += time.perf_counter() - start
        return super().learn(completions, advantages)


class Judge:
    """An engine beside the one in training, whose held-out rollouts all drafters are judged by."""

    def __init__(self, count: int) -> None:
        self.problems = prompts(count, seed=11, split="test")
        options = drafting_only(DRAFT_LENGTH, "rejection")
        self.engine = RolloutEngine.from_pretrained(
            POLICY, dtype="float32", max_model_len=640, max_num_seqs=64, speculation=options
        )

    def update(self, run: Grpo) -> None:
        self.engine.update_weights(run.model.named_parameters())

    @property
    def target(self) -> TargetTensors:
        return TargetTensors.of(self.engine.backend.weights.target)

    def episodes(self, module: EagleModule, texts: list[str], seed: int) -> list[Episode]:
        params = SamplingParams(max_tokens=MAX_TOKENS, seed=seed)
        return episodes_of(
            self.engine.backend.weights.target, module.spec, self.engine.generate(texts, params)
        )

    def taus(self, drafters: dict[str, EagleModule]) -> dict[str, float]:
        """Tau of each, on the same text, computed."""
        episodes = self.episodes(next(iter(drafters.values())), self.problems, seed=0)
        return {
            name: measure(module, self.target, episodes, DRAFT_LENGTH).tau
            for name, module in drafters.items()
        }

    def decoded(self, drafters: dict[str, EagleModule]) -> dict[str, dict[str, float]]:
        """Tau and acceptance of each by decoding held-out prompts."""
        found = {}
        for name, module in drafters.items():
            spec = decode(
                self.engine, module, self.problems * 2, SamplingParams(max_tokens=MAX_TOKENS, seed=1)
            )
            found[name] = {
                "tau": spec.tau,
                "accepted_share_of_drafts": spec.acceptance,
                "verifications": spec.verify_steps,
            }
        return found


def retrain(
    judge: Judge, saved: Checkpoint, count: int, steps: int, seed: int
) -> tuple[EagleModule, list[CurvePoint]]:
    """Train the drafter on, on new rollouts of the judge's policy; its held-out curve shows whether it converged."""
    module = saved.module()
    texts = prompts(count, seed=100 + seed, split="train")
    episodes = judge.episodes(module, texts, seed=2)
    held = len(episodes) // 10
    config = replace(
        saved.config.without_end(), learning_rate=saved.config.learning_rate, total_steps=steps, average=0.0
    )
    trainer = DrafterTrainer(module, judge.target, config)

    def progress(metrics: StepMetrics, point: CurvePoint | None) -> None:
        if point is not None:
            print(f"retrained for {point.step}: tau {point.held_out.tau:.3f}", flush=True)

    batches = EpisodeBatches(episodes[held:], 512, seed=seed)
    done = train(
        trainer, batches, episodes[:held], steps,
        draft_length=DRAFT_LENGTH, evaluate_every=max(1, steps // 6), progress=progress,
    )  # fmt: skip
    return module, list(done.curve)


def plot(
    curves: dict[str, list[tuple[int, float]]], retrained: float, rewards: list[float], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for name, points in curves.items():
        left.plot(*zip(*points), "o-", markersize=3, label=name)
    left.plot(curves["frozen"][-1][0], retrained, "k*", label="retrained at the end")
    left.set(xlabel="GRPO step", ylabel=f"tau at K={DRAFT_LENGTH}, held-out prompts")
    left.legend(fontsize=8)
    right.plot(rewards, linewidth=0.8)
    right.set(xlabel="GRPO step", ylabel="reward")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a drafter follows a policy that GRPO trains.")
    parser.add_argument("--drafter", type=Path, required=True, help="checkpoint to begin with")
    parser.add_argument("--kl", type=Path, help="one trained with --objective kl, for the ablation")
    parser.add_argument("--out", type=Path, required=True, help="stem of the .json and .png to write")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=32, help="problems per step")
    parser.add_argument("--group", type=int, default=8, help="answers per problem")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of the policy, relative to a tensor's size")
    parser.add_argument("--micro-batches", type=int, default=32, help="of the drafter per step")
    parser.add_argument("--drafter-lr", type=float, help="default: a third of its training's")
    parser.add_argument("--judged", type=int, default=96, help="held-out prompts")
    parser.add_argument("--every", type=int, default=10, help="steps between judgements")
    parser.add_argument("--retrain-prompts", type=int, default=6000)
    parser.add_argument("--retrain-steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'rollout-spec[plots]'")
    run = FollowedGrpo(
        POLICY, speculation=False, steps=args.steps, prompts=args.prompts, group=args.group, lr=args.lr,
        longest_chain=LONGEST_CHAIN, max_tokens=MAX_TOKENS, seed=args.seed,
    )  # fmt: skip
    run.follow(args.drafter, args.micro_batches, args.drafter_lr)
    judge, saved = Judge(args.judged), read_checkpoint(args.drafter)
    drafters = {"frozen": saved.module()}
    if args.kl is not None:
        drafters["frozen, trained for KL"] = read_checkpoint(args.kl).module()
    spot = drafters["spot-trained"] = saved.module()
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in drafters}

    for step in itertools.count():
        if step % args.every == 0 or step == args.steps:
            if step:
                judge.update(run)
            spot.load_state_dict(dict(run.published.published))
            for name, tau in judge.taus(drafters).items():
                curves[name].append((step, tau))
            shown = ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in curves.items())
            print(f"step {step}: tau {shown}", flush=True)
        if step == args.steps:
            break
        run.step()
        print(
            f"step {step}: reward {run.log.rewards[-1]:.3f}, rollout {run.log.rollout[-1]:.1f} s", flush=True
        )

    retrained, curve = retrain(judge, saved, args.retrain_prompts, args.retrain_steps, args.seed)
    drafters["retrained on the final policy"] = retrained
    decoded = judge.decoded(drafters)
    frozen, followed, best = (
        decoded[name]["tau"] for name in ("frozen", "spot-trained", "retrained on the final policy")
    )
    gap, closed = (best - frozen) / best, (followed - frozen) / (best - frozen)
    rewards = run.log.rewards
    first, last = (sum(part) / len(part) for part in (rewards[:8], rewards[-8:]))
    results = {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "decoded_on_the_final_policy": decoded,
        "gap": gap,
        "closed": closed,
        "curves": curves,
        "retraining": [{"step": p.step, "tau": p.held_out.tau} for p in curve],
        "reward": {"first_8_steps": first, "last_8_steps": last, "each": rewards},
        "spot": run.spot.host.figures() | {"said": len(rewards), "version": run.spot.coordinator.version},
        "spot_seconds_over_rollout_seconds": run.spot_seconds / sum(run.log.rollout),
    }  # fmt: skip
    checks = [
        Check("GRPO steps", args.steps, ">= 30", args.steps >= 30),
        Check("reward rises", round(last - first, 4), "> 0", last > first),
        Check("gap between frozen and retrained", round(gap, 4), ">= 0.1", gap >= 0.1),
        Check("gap closed by spot training", round(closed, 4), ">= 0.7", closed >= 0.7),
    ]
    Report("grpo follow", results, checks, EvidenceLevel.L1, args.seed).write(args.out.with_suffix(".json"))
    best_computed = measure(
        retrained, judge.target, judge.episodes(retrained, judge.problems, seed=0), DRAFT_LENGTH
    ).tau
    plot(curves, best_computed, rewards, args.out.with_suffix(".png"))
    for check in checks:
        print(f"{check.name}: {check.value} ({check.target})")


if __name__ == "__main__":
    main()
