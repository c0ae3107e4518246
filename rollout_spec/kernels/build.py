"""Builds the kernels with the local compiler, once per source, flags and machine, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rollout_spec.contracts import invalid

logger = logging.getLogger("rollout_spec")

FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
)
EXACT = ("-ffp-contract=off",)  # a row's bits must not depend on what the compiler may fuse
SILENT = (
    "-fno-math-errno",
    "-fno-trapping-math",
)  # nobody reads errno or exception flags, and loops become vectors
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16")
EMULATED = (*AVX2, "-DEMULATE_AVX512", "-O1")
TILES = "-DTILE_REGISTERS"
_FOR_AVX2 = {"avx2", "fma", "f16c"}
_FOR_AVX512 = {*_FOR_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
VARIANTS = {  # what a CPU must have, as in /proc/cpuinfo, and how to compile for it; the best first
    "amx": ({*_FOR_AVX512, "amx_tile", "amx_bf16", "amx_int8"}, (*AVX512, TILES)),
    "avx512": (_FOR_AVX512, AVX512),
    "avx2": (_FOR_AVX2, AVX2),
    # these test avx512 and amx on any machine
    "emulated": (_FOR_AVX2, EMULATED),
    "emulated-amx": (_FOR_AVX2, (*EMULATED, TILES)),
}
SWITCH = "ROLLOUT_SPEC_KERNELS"
NO_REGISTERS = f"the system does not let this process use AMX's registers; {SWITCH}=avx512 does without"


class Unavailable(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def cpu_flags() -> frozenset[str]:
    """The CPU's features by the kernel's names; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@cache
def may_use_tile_registers() -> bool:
    """Ask the system for AMX's registers, as a process on Linux must before it uses them; it may refuse.

    Granted once, for all threads and for what the process forks; their signal stacks must then be large enough for the
    registers too, or the system refuses them.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def variants() -> list[str]:
    """The variants to try on this CPU, the best first, or the one that $ROLLOUT_SPEC_KERNELS names.

    Raises:
        Unavailable: The CPU has none of them, lacks the one asked for, or the variable says `off`.
        InvalidRequest: The variable says something else.
    """
    wanted = os.environ.get(SWITCH, "auto")
    if wanted == "off":
        raise Unavailable(f"{SWITCH}=off")
    if wanted not in ("auto", *VARIANTS):
        raise invalid(SWITCH, wanted, f"use auto, off, {', '.join(VARIANTS)}")
    flags = cpu_flags()
    if wanted == "auto":
        if VARIANTS["amx"][0] <= flags and may_use_tile_registers():
            return ["amx", "avx512"]  # an assembler may be too old for the first
        wanted = "avx512" if VARIANTS["avx512"][0] <= flags else "avx2"
    if lacking := VARIANTS[wanted][0] - flags:
        raise Unavailable(f"this CPU lacks {', '.join(sorted(lacking))}")
    if wanted == "amx" and not may_use_tile_registers():
        raise Unavailable(NO_REGISTERS)
    return [wanted]


def build(name: str, extra: Sequence[str] = ()) -> Path:
    """The shared library of a variant, compiled unless the cache holds it.

    Safe with several processes: one compiles, the others wait, and nobody sees half a file.

    Args:
        name: Of `VARIANTS`.
        extra: Further flags (sanitizers).

    Raises:
        Unavailable: No compiler, no writable cache, or the compiler failed.
    """
    sources = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
    flags = (*FLAGS, *EXACT, *SILENT, *VARIANTS[name][1], *extra)
    openmp = openmp_of_this_process()
    digest = hashlib.sha256(repr((flags, openmp and Path(openmp).name)).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("ROLLOUT_SPEC_CACHE") or Path.home() / ".cache" / "rollout-spec") / "kernels"
    library = cache / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    import fcntl  # not on Windows, where there is no /proc/cpuinfo either

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile([path for path in sources if path.suffix == ".cpp"], flags, openmp, library)
    except OSError as error:
        raise Unavailable(f"{cache} cannot be written ({error}); set ROLLOUT_SPEC_CACHE") from error
    return library


def _compile(sources: Sequence[Path], flags: Sequence[str], openmp: str | None, library: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise Unavailable("no C++ compiler; install g++, or name one in CXX")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / source.with_suffix(".o").name for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(output)]
            for source, output in zip(sources, objects)
        ]
        running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
        complaints = [process.communicate()[1] for process in running]
        for process, complaint in zip(running, complaints):
            if process.returncode:
                raise Unavailable(f"{compiler} failed: {_last_error(complaint)}")
        linked = Path(scratch) / library.name
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        link = [compiler, "-shared", *sanitizers, *map(str, objects), openmp or "-fopenmp", "-o", str(linked)]
        result = subprocess.run(link, capture_output=True, text=True, check=False)
        if result.returncode:
            raise Unavailable(f"{compiler} failed to link: {_last_error(result.stderr)}")
        linked.replace(library)


def _last_error(output: str) -> str:
    lines = (
        [line for line in output.splitlines() if "error" in line.lower()]
        or output.splitlines()
        or ["no message"]
    )
    return lines[0][:200]


@cache
def openmp_of_this_process() -> str | None:
    """The OpenMP runtime that torch has loaded: a second one would bring a second team of busy threads."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    files = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    found = sorted(path for path in files if re.match(r"lib(gomp|iomp5|omp)\b.*\.so", Path(path).name))
    return found[0] if found else None
