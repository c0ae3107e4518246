"""Checkpoints of a drafter in training: its own tensors and nothing of the target's, written behind training's back.

A checkpoint is a folder `step-NNNNNNNN` with `drafter.safetensors` (checkpoint names), `optimizer.safetensors` and
`drafter.json`, which holds the rest and a checksum of both. It appears under its name complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from rollout_spec.adaptive.losses import Objective
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.drafters.eagle_spec import EagleSpec

WEIGHTS, OPTIMIZER, RECORD = "drafter.safetensors", "optimizer.safetensors", "drafter.json"
_FORMAT = 1
_AVERAGE = "average"  # in names of the optimizer's file, where an index stands otherwise


class CheckpointError(RolloutSpecError, ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a folder holds.

    Attributes:
        spec, config: Of the drafter and its training.
        weights: By checkpoint name.
        optimizer: State per parameter index.
        steps_done: Micro-batches trained.
        version: The drafter's, as published.
        extra: What else was saved with it, JSON values (the state of the batches).
        average: Running average of the trained weights, by checkpoint name; empty if none was kept.
    """

    spec: EagleSpec
    config: TrainConfig
    weights: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    steps_done: int
    version: int
    extra: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)

    def module(self) -> EagleModule:
        """The drafter, on the CPU."""
        d2t = self.weights.get("d2t")
        tokens = None if d2t is None else d2t + torch.arange(len(d2t))
        module = EagleModule(self.spec, tokens)
        module.load_state_dict(self.weights)
        return module

    def trainer(self, target: TargetTensors) -> DrafterTrainer:
        """Training as it stood."""
        trainer = DrafterTrainer(self.module().to(target.embed.device), target, self.config)
        trainer.load_state_dict(
            {
                "steps_done": self.steps_done,
                "config": asdict(self.config),
                "module": self.weights,
                "average": self.average,
                "optimizer": self.optimizer,
            }
        )
        return trainer


class Checkpointer:
    """Saves checkpoints below `root` in a thread of its own, one after the other.

    Beside the one written last, the `keep` - 1 of the most steps stay: a folder may hold those of a longer run.
    """

    def __init__(self, root: str | Path, *, keep: int = 2) -> None:
        self.root, self.keep = Path(root), keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drafter-checkpoint")

    def save(
        self, trainer: DrafterTrainer, *, version: int = 0, extra: Mapping[str, Any] | None = None
    ) -> Future[Path]:
        """Copy what is to be saved, now, and write it later; the result is the folder, or why it was not written."""
        state = trainer.state_dict()
        weights = {name: _copy(tensor) for name, tensor in state["module"].items()}
        optimizer = {
            f"{index}.{name}": _copy(tensor)
            for index, tensors in state["optimizer"].items()
            for name, tensor in tensors.items()
        } | {f"{_AVERAGE}.{name}": _copy(tensor) for name, tensor in state["average"].items()}
        record = {
            "format": _FORMAT,
            "spec": trainer.module.spec.to_dict(),
            "config": state["config"],
            "steps_done": state["steps_done"],
            "version": version,
            "extra": dict(extra or {}),
        }
        return self._thread.submit(self._write, weights, optimizer, record)

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown()

    def _write(
        self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], record: dict[str, Any]
    ) -> Path:
        folder = _write_folder(self.root, weights, optimizer, record)
        others = [path for path in checkpoints(self.root) if path != folder]
        for old in others[: max(0, len(others) + 1 - self.keep)]:
            shutil.rmtree(old)
        return folder


def write_drafter(root: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint's drafter below `root`, without the state of its training; returns the folder."""
    record = {
        "format": _FORMAT, "spec": checkpoint.spec.to_dict(), "config": asdict(checkpoint.config),
        "steps_done": checkpoint.steps_done, "version": checkpoint.version, "extra": checkpoint.extra,
    }  # fmt: skip
    weights = {name: _copy(tensor) for name, tensor in checkpoint.weights.items()}
    return _write_folder(Path(root), weights, {}, record)


def _write_folder(
    root: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], record: dict[str, Any]
) -> Path:
    folder = root / f"step-{record['steps_done']:08d}"
    scratch = root / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    files = {WEIGHTS: save(weights), OPTIMIZER: save(optimizer)}
    record["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for name, data in (*files.items(), (RECORD, json.dumps(record).encode())):
        _write_through(scratch / name, data)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    return folder


def checkpoints(root: str | Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest first."""
    return sorted(path for path in Path(root).glob("step-*") if path.is_dir())


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: A file is missing, truncated, altered, or of another format.
    """
    folder = Path(folder)
    file = folder / RECORD
    try:
        record = json.loads(_bytes(file))
        sums, spec = record["sha256"], EagleSpec.from_dict(record["spec"])
        config = _config(record["config"])
        steps, version, extra = record["steps_done"], record["version"], record["extra"]
        known = record["format"] == _FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: not a drafter's record ({error!r}); use another checkpoint"
        ) from error
    if not known:
        raise CheckpointError(f"{file}: format {record['format']}, but this release reads {_FORMAT}")
    tensors = {}
    for name in (WEIGHTS, OPTIMIZER):
        data = _bytes(folder / name)
        if hashlib.sha256(data).hexdigest() != sums.get(name):
            raise CheckpointError(
                f"{folder / name}: truncated or altered since it was written; use another checkpoint"
            )
        tensors[name] = load(data)
    average: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors[OPTIMIZER].items():
        index, _, key = name.partition(".")
        (average if index == _AVERAGE else optimizer.setdefault(int(index), {}))[key] = tensor
    return Checkpoint(spec, config, tensors[WEIGHTS], optimizer, steps, version, extra, average)


def _config(values: dict[str, Any]) -> TrainConfig:
    known = {"objective": Objective(**values["objective"]), "betas": tuple(values["betas"])}
    if values["last_objective"] is not None:
        known["last_objective"] = Objective(**values["last_objective"])
    return TrainConfig(**{**values, **known})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; use a complete checkpoint folder") from error


def _write_through(file: Path, data: bytes) -> None:
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
