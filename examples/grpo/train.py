"""GRPO from end to end on the rollout engine: a small arithmetic policy is trained on its grader's rewards. Runs on any CPU.

    python examples/grpo/train.py --steps 60 --speculation on --out grpo-run

Every step samples a group of answers to each prompt, scores them, compares each with its siblings, takes a few
policy-gradient steps, and hands the new weights to the engine. Batches come in the order of the requests and nothing
else is random, so one seed gives one training, with speculation on or off.

GRPO: Shao et al. 2024, arXiv 2402.03300, without its KL term: the loss is a mean over answers of a mean over tokens.
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
from rollout_spec.example_policy import expanded_policy
from rollout_spec.observe.report import EvidenceLevel, Report

ARITHMETIC = Path(__file__).parents[1] / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))

from problems import Problem, reward, sample  # noqa: E402

CLIP = 0.2  # the ratio of new to old probability counts up to 1 ± CLIP
MICRO_BATCH_TOKENS = 2048
MAX_TOKENS = 512


class Grpo:
    """A policy in training, and the engine that samples from it.

    Args:
        policy: Folder of the checkpoint to start from.
        speculation: Whether to speculate; it changes times and nothing else.
        prompts, group: Problems per step, and answers to each.
        minibatches: Optimizer steps per rollout.
        dtype: Of the engine's copy of the weights; the trainer's are float32.
        draft_length: Of every draft; None leaves it to the engine.
    """

    def __init__(
        self,
        policy: Path,
        *,
        speculation: bool,
        prompts: int = 32,
        group: int = 8,
        minibatches: int = 2,
        lr: float = 2e-5,
        dtype: str = "float32",
        draft_length: int | None = None,
        seed: int = 0,
    ) -> None:
        torch.use_deterministic_algorithms(True)
        self.prompts, self.group, self.minibatches, self.seed = prompts, group, minibatches, seed
        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.engine = RolloutEngine.from_pretrained(
            policy,
            dtype=dtype,
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
        completions = self.generate(problems, n=self.group)
        rolled_out = time.perf_counter()

        rewards = grade(problems, completions).view(-1, self.group)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        difference = self.learn(completions, advantages.flatten())
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
        return sample(self.prompts, seed=1000 * self.seed + step, split="train")

    def generate(self, problems: list[Problem], n: int = 1, temperature: float = 1.0) -> list[Completion]:
        params = SamplingParams(n=n, temperature=temperature, max_tokens=MAX_TOKENS)
        return self.engine.generate([problem.prompt for problem in problems], params)

    def learn(self, completions: list[Completion], advantages: torch.Tensor) -> float:
        """Clipped policy-gradient steps, one per minibatch of whole groups; see `TrainingLog.logprob_difference`."""
        size = -(-self.prompts // self.minibatches) * self.group
        difference = 0.0
        for start in range(0, len(completions), size):
            rows = range(start, min(start + size, len(completions)))
            for batch in micro_batches([row for row in rows if advantages[row]], completions):
                new_BT, old_BT, mask_BT = self.logprobs([completions[row] for row in batch])
                if start == 0:
                    difference = max(difference, ((new_BT - old_BT) * mask_BT).abs().max().item())
                ratio_BT = (new_BT - old_BT).exp()
                gain_B1 = advantages[batch][:, None]
                surrogate_BT = torch.minimum(ratio_BT * gain_B1, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * gain_B1)
                mean_B = (surrogate_BT * mask_BT).sum(1) / mask_BT.sum(1)
                (-mean_B.sum() / len(rows)).backward()
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

    def accuracy(self, n: int, temperature: float = 1.0) -> float:
        """Share of `n` held-out problems that the engine's policy answers correctly, one sample each."""
        problems = sample(n, seed=7, split="test")
        return grade(problems, self.generate(problems, temperature=temperature)).mean().item()

    def parameters_sha256(self) -> str:
        """Of all parameters, bit for bit."""
        return digest(p.detach().numpy() for p in self.model.parameters())


def starting_point(size: str) -> dict:
    """Folder of the checkpoint and dtype of the engine: the shipped policy, or a copy of it grown to `size`."""
    if size == "policy":
        return {"policy": ARITHMETIC / "policy", "dtype": "float32"}
    return {"policy": expanded_policy(size), "dtype": "bfloat16"}


def grade(problems: list[Problem], completions: list[Completion]) -> torch.Tensor:
    """The reward of every completion [N]; completions of a problem are adjacent."""
    n = len(completions) // len(problems)
    return torch.tensor([reward(problems[row // n], c.text) for row, c in enumerate(completions)])


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the arithmetic policy by GRPO.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=13.0, help="no step begins later than this")
    parser.add_argument("--speculation", choices=("on", "off"), default="on")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and reward.png")
    parser.add_argument("--size", choices=("policy", "100m"), default="policy")
    parser.add_argument("--prompts", type=int, default=32, help="problems per step")
    parser.add_argument("--group", type=int, default=8, help="answers per problem")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--check", type=int, default=20, help="steps between held-out checks")
    parser.add_argument("--held-out", type=int, default=400, help="held-out problems")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'rollout-spec[plots]'")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    chosen = {name: getattr(args, name) for name in ("prompts", "group", "lr", "seed")}
    run = Grpo(**starting_point(args.size), **chosen, speculation=args.speculation == "on")
    log, greedy = run.log, [run.accuracy(args.held_out, temperature=0.0)]
    while True:
        step = len(log.rewards)
        last = step == args.steps or time.perf_counter() - start > 60 * args.minutes
        if step % args.check == 0 or last:
            log.held_out[step] = run.accuracy(args.held_out)
            print(f"step {step}: held-out accuracy {log.held_out[step]:.3f}", flush=True)
        if last:
            break
        run.step()
        print(f"step {step}: reward {log.rewards[-1]:.3f}, rollout {log.rollout[-1]:.1f} s, "
              f"training {log.training[-1]:.1f} s, update {log.update[-1]:.2f} s", flush=True)  # fmt: skip
    greedy.append(run.accuracy(args.held_out, temperature=0.0))
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = log.summary() | {
        "options": options,
        "held_out_accuracy_greedy": {"before": round(greedy[0], 4), "after": round(greedy[1], 4)},
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "exactness": run.engine.stats().exactness,
        "parameters_sha256": run.parameters_sha256(),
    }
    Report("grpo", results, (), EvidenceLevel.L1, args.seed).write(args.out / "result.json")
    log.plot(args.out / "reward.png")
    shown = ("seconds", "tau", "passes", "held_out_accuracy", "held_out_accuracy_greedy", "seconds_in_all")
    print(json.dumps({"speculation": args.speculation} | {name: results[name] for name in shown}, indent=1))


if __name__ == "__main__":
    main()
