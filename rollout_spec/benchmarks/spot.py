"""What spot training costs the rollout: two workers with a long tail, and what the idle one does in the meantime."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor, nn

from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.group import SpotGroup
from rollout_spec.adaptive.spot.protocol import Generator, Tensors, Trainee
from rollout_spec.adaptive.spot.serving import ServedEngine, Share
from rollout_spec.contracts import SamplingParams
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import example_folder, load_problems

NEIGHBOURS = ("train", "local", "idle", "stream")


class SmallTrainee:
    """Learns a fixed random distribution over `vocab` from vectors of `width`: a stand-in for a drafter's trainer."""

    def __init__(self, width: int = 128, vocab: int = 256, batch: int = 256, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(1)
        self._teacher = torch.randn(width, vocab, generator=made)
        self._held_out = torch.randn(256, width, generator=made)
        torch.manual_seed(1)
        self._model = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, vocab))
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-3)
        self._data = torch.Generator().manual_seed(seed)
        self._batch = batch
        self.micro_step()  # so that the optimizer has its moments

    @property
    def bytes(self) -> int:
        """Parameters, gradients and two moments."""
        return 4 * sum(p.numel() * p.element_size() for p in self._model.parameters())

    def micro_step(self) -> float:
        """Cross-entropy against the teacher on a fresh batch."""
        x = torch.randn(self._batch, self._teacher.shape[0], generator=self._data)
        loss = nn.functional.cross_entropy(self._model(x), (x @ self._teacher).softmax(-1))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        return {name: tensor.clone() for name, tensor in self._parts().items()}

    def load(self, state: Tensors) -> None:
        """Take a state over."""
        for name, tensor in self._parts().items():
            tensor.copy_(state[name])

    def candidate(self) -> dict[str, Tensor]:
        """The parameters."""
        return {name: tensor.detach().clone() for name, tensor in self._model.named_parameters()}

    def evaluate(self, tensors: Tensors) -> tuple[float, int]:
        """1 - TV against the teacher."""
        with torch.no_grad():
            logits = torch.func.functional_call(self._model, dict(tensors), (self._held_out,))
            p, q = (self._held_out @ self._teacher).softmax(-1), logits.softmax(-1)
            return float(torch.minimum(p, q).sum(-1).mean()), len(p)

    def _parts(self) -> dict[str, Tensor]:
        parts = {}
        for name, parameter in self._model.named_parameters():
            parts[name] = parameter.detach()
            for moment, tensor in self._optimizer.state[parameter].items():
                parts[f"{moment}/{name}"] = tensor
        return parts


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


class NotedEngine(ServedEngine):
    """An engine for trainees whose drafters it could not run: it takes note of what is published."""

    published: Mapping[str, Tensor] | None = None

    def publish(self, tensors: Tensors, version: int) -> None:
        """Keep it."""
        self.published = tensors


def served_policy(path: Path | None = None, **options: Any) -> Callable[[], NotedEngine]:
    """Makes engines on a policy (default: the shipped one), coupled verifier, without drafters."""
    folder = str(path or example_folder() / "policy")
    speculation = {"drafter": "none", "verifier": "coupled", "history": False}
    config = {"max_model_len": 640, "max_num_seqs": 8, "speculation": speculation} | options
    return lambda: NotedEngine(RolloutEngine.from_pretrained(folder, config))


class Free:
    """Rollouts of two workers, one with short and one with long answers, beside each kind of neighbour.

    Args:
        draws: Rollouts per neighbour.
        seed: Of prompts and noise.
        make_engine, make_trainee: What the workers run; default: the shipped policy, and a small module.
        short, long: Prompts of each worker.

    Attributes:
        seconds: Per neighbour, of each rollout.
    """

    def __init__(
        self,
        draws: int,
        seed: int,
        make_engine: Callable[[], Generator] | None = None,
        make_trainee: Callable[[Generator], Trainee] | None = None,
        short: int = 2,
        long: int = 2,
    ) -> None:
        self.draws, self.seed, self.short, self.long = draws, seed, short, long
        self._make_engine = make_engine or served_policy()
        self._make_trainee = make_trainee or (lambda engine: SmallTrainee())
        self.seconds: dict[str, list[float]] = {kind: [] for kind in NEIGHBOURS}

    def run(self) -> dict[str, Any]:
        """Everything; JSON values."""
        pool = sorted(load_problems().prompts(512, self.seed, "test"), key=len)
        with tempfile.TemporaryDirectory() as folder:
            role = Path(folder) / "role"
            role.write_text("train")
            make = self._make_trainee
            group = SpotGroup(
                2,
                self._make_engine,
                lambda engine: Neighbour(make(engine), role),  # type: ignore[arg-type, return-value]
                folder,
                SpotOptions(micro_batches=8, publish_every=8),
            )
            try:
                group.rollout(self._shares(pool, -1))
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

        medians = {kind: statistics.median(seconds) for kind, seconds in self.seconds.items()}
        ratios = {
            kind: statistics.median(
                a / b for a, b in zip(self.seconds["train"], self.seconds[kind], strict=True)
            )
            for kind in NEIGHBOURS[1:]
        }
        return {
            "idle_seconds": spent("idle_seconds"),
            "used_share": spent("used_seconds") / max(spent("idle_seconds"), 1e-9),
            "step_seconds": medians,
            "step_time_with_training_over": ratios,
            "workers": last["workers"],
            "coordinator": last["coordinator"],
            "threads_of_machine": os.cpu_count(),
        }


def start_ray() -> None:
    """A small Ray of two CPUs, for this process alone."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, logging_level="ERROR")
