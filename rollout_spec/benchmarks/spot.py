"""What spot training costs the rollout: two workers with a long tail, and what the idle one does in the meantime."""

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

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.group import SpotGroup
from rollout_spec.adaptive.spot.protocol import Trainee
from rollout_spec.adaptive.spot.serving import NotedEngine, ServedEngine, Share
from rollout_spec.adaptive.spot.trainee import DrafterTrainee, usual_config
from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.contracts import SamplingParams
from rollout_spec.example_policy import example_folder, load_problems

NEIGHBOURS = ("train", "local", "idle", "stream")
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


def served_policy() -> NotedEngine:
    """The shipped policy in float32, coupled verifier, without drafters: all that is timed is plain decoding."""
    speculation = {"drafter": "none", "adaptive": False, "verifier": "coupled", "history": False}
    config = {"dtype": "float32", "max_model_len": 640, "max_num_seqs": 8, "speculation": speculation}
    served = NotedEngine.from_pretrained(str(example_folder() / "policy"), config)
    assert isinstance(served, NotedEngine)
    return served


def trainee(role: Path, served: ServedEngine) -> Neighbour:
    """The drafter's real trainer, which can be told to do something else."""
    config = replace(usual_config(), warmup_steps=5, row_tokens=192)
    return Neighbour(DrafterTrainee.begin(served, config, batch_tokens=192, judged_tokens=768), role)


class Free:
    """Rollouts of two workers, one with short and one with long answers, beside each kind of neighbour.

    Args:
        draws: Rollouts per neighbour.
        seed: Of prompts and noise.
        short, long: Prompts of each worker.

    Attributes:
        seconds: Per neighbour, of each rollout.
    """

    def __init__(
        self,
        draws: int,
        seed: int,
        short: int = 4,
        long: int = 4,
    ) -> None:
        self.draws, self.seed, self.short, self.long = draws, seed, short, long
        self.options = SpotOptions()  # what a user gets
        self.seconds: dict[str, list[float]] = {kind: [] for kind in NEIGHBOURS}

    def run(self) -> dict[str, Any]:
        """Everything; JSON values."""
        pool = sorted(load_problems().prompts(512, self.seed, "test"), key=len)
        with tempfile.TemporaryDirectory() as folder:
            role = Path(folder) / "role"
            role.write_text("train")
            group = SpotGroup(2, served_policy, partial(trainee, role), folder, self.options)
            try:
                for draw in range(-_FILLING, 0):
                    group.rollout(self._shares(pool, draw))
                before = group.figures()
                training = []
                for draw in range(self.draws):
                    kinds = NEIGHBOURS[draw % 4 :] + NEIGHBOURS[: draw % 4]
                    for kind in kinds:
                        role.write_text(kind)
                        start = time.perf_counter()
                        group.rollout(self._shares(pool, draw), interval=5.0)
                        self.seconds[kind].append(time.perf_counter() - start)
                        after = group.figures()
                        if kind == "train":
                            training.append((before, after))
                        before = after
            finally:
                group.shutdown()
        return self._results(training, before)

    def _shares(self, pool: list[str], draw: int) -> list[Share]:
        shares = []
        for prompts in (pool[: self.short], pool[-self.long :]):
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

        medians = {kind: statistics.median(seconds) for kind, seconds in self.seconds.items()}
        ratios = {}
        for kind in NEIGHBOURS[1:]:
            pairs = [a / b for a, b in zip(self.seconds["train"], self.seconds[kind], strict=True)]
            low, high = median_interval(pairs)
            ratios[kind] = {"median": statistics.median(pairs), "interval_95": [low, high]}
        idler = max(last["workers"].values(), key=lambda worker: worker["micro_batches"])
        micro_batches = sum(self._count(after) - self._count(before) for before, after in training)
        kept = sum(agreed(after) - agreed(before) for before, after in training)
        return {
            "idle_seconds": spent("idle_seconds"),
            "used_share": spent("used_seconds") / max(spent("idle_seconds"), 1e-9),
            "micro_batches": micro_batches,
            "kept_share_of_micro_batches": kept / max(micro_batches, 1),
            "preemption_p99_over_micro_batch_p99": idler["preemption_seconds"]["p99"]
            / idler["micro_batch_seconds"]["p99"],
            "step_seconds": medians,
            "step_time_with_training_over": ratios,
            "workers": last["workers"],
            "coordinator": last["coordinator"],
            "threads_of_machine": os.cpu_count(),
        }

    @staticmethod
    def _count(figures: Any) -> int:
        return sum(worker["micro_batches"] for worker in figures["workers"].values())


def start_ray() -> None:
    """A small Ray of two CPUs, for this process alone."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, logging_level="ERROR")
