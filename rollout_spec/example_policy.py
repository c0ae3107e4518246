"""The shipped arithmetic policy, for commands that need a real one: where it is, its prompts, its larger copies."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from rollout_spec.contracts import RolloutSpecError

SIZES = ("100m", "300m")


def example_folder() -> Path:
    """`examples/arithmetic` of the checkout this package runs from, or of the current folder."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        folder = root / "examples" / "arithmetic"
        if (folder / "problems.py").is_file():
            return folder
    raise RolloutSpecError(
        "examples/arithmetic: not found; the shipped policy lives in a checkout of the project, run it in one"
    )


def load_problems() -> ModuleType:
    """The example's prompts and rewards (`problems.py`)."""
    name = "rollout_spec_example_problems"
    spec = importlib.util.spec_from_file_location(name, example_folder() / "problems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def expanded_policy(size: str, vocab: int = 32000, device: str = "cpu") -> Path:
    """The shipped policy grown to `size` with a padded vocabulary, on `device`; made once and kept in the cache.

    The cache is $ROLLOUT_SPEC_CACHE, else ~/.cache/rollout-spec.
    """
    example = example_folder()
    policy, script = example / "policy", example / "expand.py"
    weights = policy / "model.safetensors"
    if not weights.is_file():
        raise RolloutSpecError(
            f"{weights}: no policy here; restore it from the repository, train one with "
            "`python examples/arithmetic/train.py`, or name a model of your own"
        )
    digest = hashlib.sha256(weights.read_bytes() + script.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("ROLLOUT_SPEC_CACHE") or Path.home() / ".cache" / "rollout-spec")
    target = cache / f"arithmetic-{size}-{vocab}-{digest}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "policy"
        options = ["--size", size, "--vocab", str(vocab), "--policy", str(policy), "--out", str(made)]
        options += ["--device", device]
        run = subprocess.run(
            [sys.executable, str(script), *options], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RolloutSpecError(f"expand.py failed: {run.stderr.strip().splitlines()[-1]}")
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                shutil.move(made, target)
    return target
