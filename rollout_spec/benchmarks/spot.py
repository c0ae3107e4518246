"""What spot training costs the RL step: two workers with a long tail, and what the idle one does in the meantime."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.group import SpotGroup
from rollout_spec.adaptive.spot.protocol import Trainee
from rollout_spec.adaptive.spot.serving import NotedEngine, ServedEngine, Share
from rollout_spec.adaptive.spot.trainee import DrafterTrainee, usual_config
from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.example_policy import example_folder, load_problems

NEIGHBOURS = ("train", "local", "idle", "stream")
_ORDERS = (  # in four draws each kind follows each other one once: the end of one rollout can delay the next
    ("train", "local", "stream", "idle"),
    ("local", "idle", "train", "stream"),
    ("idle", "stream", "local", "train"),
    ("stream", "train", "idle", "local"),
)
_FILLING = 8  # rollouts before those that count: the drafter's start takes so many samples


class Neighbour:
    """A trainee that can be told, through a file, to do something else for as long as a micro-batch takes."""

    def __init__(self, trainee: Trainee, role: Path) -> None:
        self._trainee, self._role = trainee, role
        self._seconds: list[float] = [0.01]
        self._local = torch.randn(128, 128)  # 64 KiB: stays in the core's own cache
        self._wide = torch.randn(16 << 20)  # 64 MiB: does not

    def micro_step(self) -> float | None:
        """One micro-batch, or as much time spent otherwise."""
        role = self._role.read_text()
        start = time.perf_counter()
        if role == "train":
            loss = self._trainee.micro_step()
            self._seconds = [*self._seconds[-15:], time.perf_counter() - start]
            return loss
        end = start + statistics.median(self._seconds)
        while (left := end - time.perf_counter()) > 0:
            if role == "idle":
                time.sleep(left)
            elif role == "local":
                self._local = torch.tanh(self._local @ self._local)
            else:
                self._wide.mul_(1.0)
        return 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainee, name)


def served_policy(dtype: str) -> NotedEngine:
    """The shipped policy, coupled verifier, without drafters: all that is timed is plain decoding."""
    speculation = {"drafter": "none", "adaptive": False, "verifier": "coupled", "history": False}
    config = {"dtype": dtype, "max_model_len": 640, "max_num_seqs": 8, "speculation": speculation}
    served = NotedEngine.from_pretrained(str(example_folder() / "policy"), config)
    assert isinstance(served, NotedEngine)
    return served


def trainee(role: Path, served: ServedEngine) -> Neighbour:
    """The drafter's real trainer, which can be told to do something else."""
    config = replace(usual_config(), warmup_steps=5, row_tokens=192)
    return Neighbour(
        DrafterTrainee.begin(served, config, batch_tokens=192, judged_tokens=768, held_out=3), role
    )


class Learner:
    """The rest of an RL step, where the driver runs: one policy-gradient step on a rollout's answers.

    REINFORCE with the mean reward as baseline (Williams 1992), in float32. The learning rate is 0, so that the steps of one
    draw have the same answers; it takes as long as with any other.
    """

    def __init__(self) -> None:
        self._reward = load_problems().reward
        self._model = AutoModelForCausalLM.from_pretrained(example_folder() / "policy", dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.0)

    def learn(self, problems: list[list[Any]], answers: list[list[Completion]]) -> None:
        """Of each worker's problems and its answers to them."""
        rewards = [
            torch.tensor([self._reward(problem, answer.text) for problem, answer in zip(*share, strict=True)])
            for share in zip(problems, answers, strict=True)
        ]
        mean, tokens = torch.cat(rewards).mean(), sum(len(a.token_ids) for share in answers for a in share)
        for gains, share in zip(rewards, answers, strict=True):
            logprobs, sampled = self.logprobs(share)
            (-(logprobs * sampled * (gains - mean)[:, None]).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def logprobs(self, answers: list[Completion]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all tokens but the first, float32 [B, T], and whether each was sampled, bool [B, T]; padded on the right."""
        texts = [torch.tensor(answer.prompt_token_ids + answer.token_ids) for answer in answers]
        sampled = [torch.arange(len(text)) >= len(a.prompt_token_ids) for text, a in zip(texts, answers)]
        ids = pad_sequence(texts, True)
        logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return chosen, pad_sequence(sampled, True)[:, 1:]

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy by name, float32."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}


class Free:
    """RL steps on two workers, one with short and one with long answers, beside each kind of neighbour.

    Args:
        draws: Steps per neighbour.
        seed: Of prompts and noise.
        dtype: Of the policy's weights.
        short, long: Prompts of each worker.

    Attributes:
        steps, rollouts: Per neighbour, seconds of each step, and of its rollout.
    """

    def __init__(
        self,
        draws: int,
        seed: int,
        dtype: str = "bfloat16",
        short: int = 4,
        long: int = 4,
    ) -> None:
        self.draws, self.seed, self.dtype, self.short, self.long = draws, seed, dtype, short, long
        self.options = SpotOptions()  # what a user gets
        self.steps: dict[str, list[float]] = {kind: [] for kind in NEIGHBOURS}
        self.rollouts: dict[str, list[float]] = {kind: [] for kind in NEIGHBOURS}

    def run(self) -> dict[str, Any]:
        """Everything; JSON values."""
        drawn = sorted(
            load_problems().sample(512, self.seed, "test"), key=lambda problem: len(problem.prompt)
        )
        problems, learner, version = [drawn[: self.short], drawn[-self.long :]], Learner(), 0
        with tempfile.TemporaryDirectory() as folder:
            role = Path(folder) / "role"
            role.write_text("train")
            group = SpotGroup(
                2, partial(served_policy, self.dtype), partial(trainee, role), folder, self.options
            )
            try:
                for draw in range(-_FILLING, 0):
                    group.rollout(self._shares(problems, draw))
                before = group.figures()
                training = []
                for draw in range(self.draws):
                    for kind in _ORDERS[draw % len(_ORDERS)]:
                        role.write_text(kind)
                        start = time.perf_counter()
                        answers = group.rollout(self._shares(problems, draw), interval=5.0)
                        self.rollouts[kind].append(time.perf_counter() - start)
                        learner.learn(problems, answers)
                        version += 1
                        group.update_weights(learner.weights(), version)
                        self.steps[kind].append(time.perf_counter() - start)
                        after = group.figures()
                        if kind == "train":
                            training.append((before, after))
                        before = after
            finally:
                group.shutdown()
        return self._results(training, before)

    def _shares(self, problems: list[list[Any]], draw: int) -> list[Share]:
        shares = []
        for prompts in ([problem.prompt for problem in share] for share in problems):
            ids = tuple(f"draw-{draw}-{prompt}" for prompt in prompts)
            shares.append(Share(tuple(prompts), ids, SamplingParams(max_tokens=512, seed=self.seed)))
        return shares

    def _results(self, training: list[tuple[Any, Any]], last: Any) -> dict[str, Any]:
        def spent(name: str) -> float:
            return sum(
                after["workers"][worker][name] - before["workers"][worker][name]
                for before, after in training
                for worker in after["workers"]
            )

        def agreed(figures: Any) -> int:
            return int(figures["coordinator"]["step"]) * self.options.micro_batches

        idler = max(last["workers"].values(), key=lambda worker: worker["micro_batches"])
        micro_batches = sum(self._count(after) - self._count(before) for before, after in training)
        kept = sum(agreed(after) - agreed(before) for before, after in training)
        return {
            "dtype": self.dtype,
            "idle_seconds": spent("idle_seconds"),
            "used_share": spent("used_seconds") / max(spent("idle_seconds"), 1e-9),
            "micro_batches": micro_batches,
            "kept_share_of_micro_batches": kept / max(micro_batches, 1),
            "preemption_p99_over_micro_batch_p99": idler["preemption_seconds"]["p99"]
            / idler["micro_batch_seconds"]["p99"],
            "step_seconds": _medians(self.steps),
            "step_time_with_training_over": _ratios(self.steps),
            "rollout_seconds": _medians(self.rollouts),
            "rollout_time_with_training_over": _ratios(self.rollouts),
            "workers": last["workers"],
            "coordinator": last["coordinator"],
            "threads_of_machine": os.cpu_count(),
        }

    @staticmethod
    def _count(figures: Any) -> int:
        return sum(worker["micro_batches"] for worker in figures["workers"].values())


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {kind: statistics.median(each) for kind, each in seconds.items()}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of the time beside a worker that trains to that beside every other kind: medians of ratios within draws."""
    ratios = {}
    for kind in NEIGHBOURS[1:]:
        pairs = [a / b for a, b in zip(seconds["train"], seconds[kind], strict=True)]
        low, high = median_interval(pairs)
        ratios[kind] = {"median": statistics.median(pairs), "interval_95": [low, high]}
    return ratios


def start_ray() -> None:
    """A small Ray of two CPUs, for this process alone."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, logging_level="ERROR")
