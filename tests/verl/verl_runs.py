"""Runs of verl's `main_ppo` that are recorded and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from parquet_files import write_problems

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "verl"
POLICY = ROOT / "examples" / "arithmetic" / "policy"
OURS = "actor_rollout_ref.rollout.engine_kwargs.rollout_spec"
SMALL = (
    "data.train_batch_size=4",
    "data.max_response_length=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.optim.lr=1e-4",  # policies that differ visibly
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "trainer.logger=[file]",
)
_LONGEST = 400  # seconds; a run takes half of that on an idle machine
DRAFTS = f"+{OURS}.speculation={{drafter:int8,draft_length:4}}"


@dataclass(frozen=True)
class Run:
    """A finished run of verl and what was recorded of it (see `recorder.py`)."""

    folder: Path
    status: int

    @property
    def output(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def metrics(self) -> list[dict[str, float]]:
        """verl's metrics of each step."""
        return [line["data"] for line in read_lines(self.folder / "metrics.jsonl")]

    def records(self, kind: str) -> dict[str, list[dict[str, Any]]]:
        """Recorded lines of a kind, per process."""
        return {
            path.stem.split("-")[1]: read_lines(path) for path in sorted(self.folder.glob(f"{kind}-*.jsonl"))
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_example(folder: Path, script: str, *settings: str, **environment: str) -> Run:
    """Run an example, small and recorded, for `_LONGEST` seconds at most; of `environment`, PYTHONPATH comes on top."""
    write_problems(folder / "data")
    helpers = [environment.pop("PYTHONPATH", ""), str(Path(__file__).parent)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / script), *SMALL, *(() if "vllm" in script else (DRAFTS,)), *settings],
            env={
                **os.environ,
                "RECORD": str(folder),
                "DATA": str(folder / "data"),
                "PYTHON": sys.executable,
                "PYTHONPATH": os.pathsep.join(filter(None, helpers)),
                "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
                "VERL_USE_EXTERNAL_MODULES": "recorder",
                "HYDRA_FULL_ERROR": "1",
                "RAY_DEDUP_LOGS": "0",
                **environment,
            },
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            end_all(folder, process.pid)
    return Run(folder, status)


def end_all(folder: Path, group: int | None = None) -> None:
    """Kill what a run left: its process group, and whatever (Ray's services) was started with its folder."""
    if group is not None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RECORD") == str(folder):
                process.kill()
