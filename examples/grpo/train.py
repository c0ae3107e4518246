"""GRPO from end to end on the rollout engine: a small arithmetic policy is trained on its grader's rewards. Runs on any CPU.

    python examples/grpo/train.py --speculation on --out grpo-run

Every step samples a group of answers to each prompt, scores them, compares each with its siblings, takes a few
policy-gradient steps, and hands the new weights to the engine. Batches come in the order of the requests and nothing
else is random, so one seed gives one training, with speculation on or off.

GRPO: Shao et al. 2024, arXiv 2402.03300, with process supervision and without its KL term. The grader judges each step of
an answer up to the first wrong one; a step is compared with all steps of its siblings. The loss is a mean over tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from training_log import TrainingLog, digest
from transformers import AutoModelForCausalLM

from rollout_spec import Completion, RolloutEngine, SamplingParams
from rollout_spec.contracts import FinishReason
from rollout_spec.example_policy import expanded_policy
from rollout_spec.observe.report import Check, EvidenceLevel, Report, finish

ARITHMETIC = Path(__file__).parents[1] / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))

from problems import CHAIN_MAX, Problem, judge_steps, reward, sample  # noqa: E402

CLIP = 0.2  # the ratio of new to old probability counts up to 1 ± CLIP
MICRO_BATCH_TOKENS = 2048
MAX_TOKENS = 512
LAST_GAIN_RATE = 15.0  # of the last norm's gain: it scales all logits, and its gradient is hardly noise
WARMUP_STEPS = 10  # the first steps of Adam go as far as its rate allows, whatever the gradient says


class Grpo:
    """A policy in training, and the engine that samples from it.

    Args:
        policy: Folder of the checkpoint to start from.
        speculation: Whether to speculate; it changes times and nothing else.
        steps: Of training; the learning rate rises in the first ones, and falls to 0 at the last.
        prompts, group: Problems per step, and answers to each.
        longest_chain: Terms of the longest chains to train on.
        max_tokens: Of an answer in training.
        minibatches: Optimizer steps per rollout.
        lr: Of Adam, relative to each tensor's root mean square at the start (as Adafactor has it, arXiv 1804.04235).
        draft_length: Of every draft; None leaves it to the engine.
    """

    def __init__(
        self,
        policy: Path,
        *,
        speculation: bool,
        steps: int,
        prompts: int = 32,
        group: int = 8,
        longest_chain: int = CHAIN_MAX,
        max_tokens: int = MAX_TOKENS,
        minibatches: int = 4,
        lr: float = 1.5e-3,
        draft_length: int | None = None,
        seed: int = 0,
    ) -> None:
        torch.use_deterministic_algorithms(True)
        self.prompts, self.group, self.minibatches, self.seed = prompts, group, minibatches, seed
        self.steps, self.lr, self.longest_chain, self.max_tokens = steps, lr, longest_chain, max_tokens
        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        last = self.model.model.norm.weight
        sizes = [p.detach().pow(2).mean().sqrt().item() for p in self.model.parameters()]
        groups = [
            {"params": [p], "size": size * (LAST_GAIN_RATE if p is last else 1.0)}
            for p, size in zip(self.model.parameters(), sizes)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.engine = RolloutEngine.from_pretrained(
            policy,
            dtype="float32",
            seed=seed,
            max_model_len=640,
            max_num_seqs=max(prompts * group, 64),
            speculation={"verifier": "coupled"}
            | ({"draft_length": draft_length} if speculation else {"drafter": "none", "history": False}),
        )
        self.log = TrainingLog()

    def step(self) -> None:
        """One step of training: roll out, score, learn, update the engine."""
        log, start = self.log, time.perf_counter()
        problems = self.problems(len(log.rewards))
        completions = self.generate(problems, self.group, max_tokens=self.max_tokens)
        rolled_out = time.perf_counter()

        rewards = grade(problems, completions).view(-1, self.group)
        difference = self.learn(completions, token_advantages(problems, completions))
        learnt = time.perf_counter()

        self.engine.update_weights(self.model.named_parameters())
        log.update.append(time.perf_counter() - learnt)
        log.rollout.append(rolled_out - start)
        log.training.append(learnt - rolled_out)
        log.rewards.append(rewards.mean().item())
        log.tokens.append(sum(len(c.token_ids) for c in completions))
        log.longest.append(max(len(c.token_ids) for c in completions))
        log.logprob_difference.append(difference)
        log.tokens_sha256.append(
            digest(np.array(values) for c in completions for values in (c.token_ids, c.logprobs))
        )
        log.spec = sum((c.spec for c in completions), log.spec)

    def problems(self, step: int) -> list[Problem]:
        """The problems of a step, from the training split."""
        drawn = sample(4 * self.prompts, seed=1000 * self.seed + step, split="train")
        fitting = [p for p in drawn if p.kind != "chain" or len(p.operands) <= self.longest_chain]
        return fitting[: self.prompts]

    def generate(
        self, problems: list[Problem], n: int = 1, temperature: float = 1.0, max_tokens: int = MAX_TOKENS
    ) -> list[Completion]:
        params = SamplingParams(n=n, temperature=temperature, max_tokens=max_tokens)
        return self.engine.generate([problem.prompt for problem in problems], params)

    def learn(self, completions: list[Completion], advantages: list[torch.Tensor]) -> float:
        """Clipped policy-gradient steps, one per minibatch of whole groups; see `TrainingLog.logprob_difference`.

        Args:
            completions: Those of a problem are adjacent.
            advantages: Of every token, float32 [tokens of the completion].
        """
        size = -(-self.prompts // self.minibatches) * self.group
        step, difference = len(self.log.rewards), 0.0
        rate = min((step + 1) / WARMUP_STEPS, 1.0) * max(0.0, 1 - step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate * group["size"]
        for start in range(0, len(completions), size):
            rows = range(start, min(start + size, len(completions)))
            tokens = sum(len(advantages[row]) for row in rows)
            for batch in micro_batches([row for row in rows if advantages[row].any()], completions):
                new_BT, old_BT, mask_BT = self.logprobs([completions[row] for row in batch])
                if start == 0:
                    difference = max(difference, ((new_BT - old_BT) * mask_BT).abs().max().item())
                gain_BT = torch.zeros_like(new_BT)
                gain_BT[mask_BT > 0] = torch.cat([advantages[row] for row in batch])
                ratio_BT = (new_BT - old_BT).exp()
                surrogate_BT = torch.minimum(ratio_BT * gain_BT, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * gain_BT)
                (-(surrogate_BT * mask_BT).sum() / tokens).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return difference

    def logprobs(self, completions: list[Completion]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per sampled token its logprob now and as sampled, and the mask of what is not padding, all [B, T]."""
        prompts = [len(c.prompt_token_ids) for c in completions]
        ids_BS = pad_sequence([torch.tensor(c.prompt_token_ids + c.token_ids) for c in completions], True)
        old_BT = pad_sequence(
            [torch.tensor([0.0] * (n - 1) + c.logprobs) for n, c in zip(prompts, completions)], True
        )
        mask_BT = pad_sequence(
            [torch.tensor([0.0] * (n - 1) + [1.0] * len(c.logprobs)) for n, c in zip(prompts, completions)],
            True,
        )
        logits_BTV = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
        new_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
        return torch.where(mask_BT > 0, new_BT, 0.0), old_BT, mask_BT

    def accuracy(self, problems: list[Problem], n: int = 1, temperature: float = 1.0) -> torch.Tensor:
        """Share of `n` answers by the engine's policy that are right, per problem [len(problems)]."""
        return grade(problems, self.generate(problems, n, temperature)).view(-1, n).mean(1)

    def parameters_sha256(self) -> str:
        """Of all parameters, bit for bit."""
        return digest(p.detach().numpy() for p in self.model.parameters())


def starting_point(size: str) -> Path:
    """Folder of the checkpoint: the shipped policy, or a copy of it grown to `size`."""
    return ARITHMETIC / "policy" if size == "policy" else expanded_policy(size)


def grade(problems: list[Problem], completions: list[Completion]) -> torch.Tensor:
    """The reward of every completion [N]; completions of a problem are adjacent."""
    n = len(completions) // len(problems)
    return torch.tensor([reward(problems[row // n], c.text) for row, c in enumerate(completions)])


def token_advantages(problems: list[Problem], completions: list[Completion]) -> list[torch.Tensor]:
    """The advantage of every token of every completion, float32 [tokens of the completion].

    A step is worth 1 or 0, less the mean of the steps of all answers to this problem, by their standard deviation. What
    follows the first wrong step tells nothing and has 0. A token is a character, and the end one more.
    """
    n, found = len(completions) // len(problems), []
    for row, problem in enumerate(problems):
        group = completions[n * row : n * (row + 1)]
        judged = [judge_steps(problem, c.text) for c in group]
        for c, steps in zip(group, judged):
            if c.finish_reason is FinishReason.LENGTH and steps[-1][1] > len(c.token_ids):
                steps.pop()  # cut in its middle
        worth = torch.tensor([float(right) for steps in judged for _, _, right in steps])
        mean, deviation = worth.mean(), worth.std(correction=0) + 1e-4
        for c, steps in zip(group, judged):
            gains = torch.zeros(len(c.token_ids))
            for start, stop, right in steps:
                gains[start:stop] = (float(right) - mean) / deviation
            found.append(gains)
    return found


def micro_batches(rows: list[int], completions: list[Completion]) -> list[list[int]]:
    """Rows of like length together, at most MICRO_BATCH_TOKENS tokens with padding."""

    def length(row: int) -> int:
        return len(completions[row].prompt_token_ids) + len(completions[row].token_ids)

    batches: list[list[int]] = []
    for row in sorted(rows, key=length):
        if not batches or (len(batches[-1]) + 1) * length(row) > MICRO_BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def held_out_gain(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Of accuracies per problem: their means, the difference and its standard error over problems."""
    gain = after - before
    error = gain.std().item() / len(gain) ** 0.5
    figures = {"before": before.mean(), "after": after.mean(), "gain": gain.mean(), "standard_error": error}
    return {name: round(float(value), 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the arithmetic policy by GRPO.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=13.0, help="no step begins later than this")
    parser.add_argument("--speculation", choices=("on", "off"), default="on")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and reward.png")
    parser.add_argument("--prompts", type=int, default=32, help="problems per step")
    parser.add_argument("--group", type=int, default=8, help="answers per problem")
    parser.add_argument(
        "--longest-chain",
        type=int,
        default=8,
        help="terms; longer ones are hardly ever right, so that their groups teach nothing",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=100, help="of an answer in training; no right one there is longer"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3, help="relative to a tensor's size")
    parser.add_argument("--held-out", type=int, default=400, help="held-out problems, of any length")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'rollout-spec[plots]'")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    chosen = {
        name: getattr(args, name)
        for name in ("steps", "prompts", "group", "longest_chain", "max_tokens", "lr", "seed")
    }
    run = Grpo(starting_point("policy"), **chosen, speculation=args.speculation == "on")
    held_out = sample(args.held_out, seed=7, split="test")

    def accuracies() -> tuple[torch.Tensor, torch.Tensor]:
        found = run.accuracy(held_out, n=4), run.accuracy(held_out, temperature=0.0)
        run.log.held_out[len(run.log.rewards)] = found[0].mean().item()
        print(f"held-out accuracy {found[0].mean():.3f}, greedy {found[1].mean():.3f}", flush=True)
        return found

    log, before = run.log, accuracies()
    while len(log.rewards) < args.steps and time.perf_counter() - start < 60 * args.minutes:
        run.step()
        print(f"step {len(log.rewards)}: reward {log.rewards[-1]:.3f}, rollout {log.rollout[-1]:.1f} s, "
              f"training {log.training[-1]:.1f} s, update {log.update[-1]:.2f} s", flush=True)  # fmt: skip
    after = accuracies()
    sampled, greedy = (held_out_gain(*pair) for pair in zip(before, after))
    seconds = round(time.perf_counter() - start, 1)
    results = log.summary() | {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "held_out": {"problems": args.held_out, "sampled": sampled, "greedy": greedy},
        "seconds_in_all": seconds,
        "exactness": run.engine.stats().exactness,
        "parameters_sha256": run.parameters_sha256(),
    }
    log.plot(args.out / "reward.png")
    checks = (
        Check("steps", len(log.rewards), f"{args.steps}", len(log.rewards) == args.steps),
        Check("gain in held-out accuracy, T=1", sampled["gain"], ">= 0.10", sampled["gain"] >= 0.1),
        Check("its standard error", sampled["standard_error"], "< 0.025", sampled["standard_error"] < 0.025),
        Check("minutes in all", round(seconds / 60, 1), "<= 15", seconds <= 900),
    )
    shown = ("seconds", "tau", "passes", "held_out", "seconds_in_all")
    print(json.dumps({"speculation": args.speculation} | {name: results[name] for name in shown}, indent=1))
    finish(Report("grpo", results, checks, EvidenceLevel.L1, args.seed), args.out / "result.json")


if __name__ == "__main__":
    main()
