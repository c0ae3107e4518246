"""Building and choosing: once per machine, whole or not at all, and without a compiler everything still works."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout_spec.contracts import InvalidRequest
from rollout_spec.kernels import build as building
from rollout_spec.kernels import library
from rollout_spec.kernels.build import VARIANTS, Unavailable, build, variants
from rollout_spec.models.linear import KernelLinear, make_linear

FAKE = """#!/bin/sh
echo "$@" >> "{log}"
sleep {seconds}
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo half > "$out"
{end}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(seconds, end): a stand-in for g++ that writes its arguments down; returns how often it ran."""

    def make(seconds=0, end=""):
        log, script = tmp_path / "compiler.log", tmp_path / "compiler"
        script.write_text(FAKE.format(log=log, seconds=seconds, end=end))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(log.read_text().splitlines()) if log.exists() else 0

    return make


@pytest.fixture
def afresh():
    library.kernels.cache_clear()
    yield
    library.kernels.cache_clear()


SOURCES = len(list(building.FOLDER.glob("*.cpp")))


def test_it_is_built_once(cache, compiler):
    runs = compiler()
    first = build("avx2")
    assert first.parent == cache and first.read_text() == "half\n" and runs() == SOURCES + 1
    assert build("avx2") == first and runs() == SOURCES + 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


def test_sources_flags_and_variant_have_libraries_of_their_own(cache, compiler, tmp_path, monkeypatch):
    compiler()
    found = {build("avx2"), build("avx512"), build("avx2", ["-g"])}
    changed = tmp_path / "kernels"
    changed.mkdir()
    for path in building.FOLDER.iterdir():
        if path.suffix in (".cpp", ".h"):
            (changed / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(building, "FOLDER", changed)
    assert build("avx2") in found
    header = changed / "simd.h"
    header.write_text(header.read_text() + "\n// another\n")
    assert build("avx2") not in found


def test_several_processes_build_once(cache, compiler):
    runs = compiler(seconds=0.3)
    code = "from rollout_spec.kernels.build import build; print(build('avx2').read_text())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["half\n\n"] * 4
    assert runs() == SOURCES + 1


def test_a_failing_compiler_leaves_nothing_behind(cache, compiler):
    for word in ("error", "Error"):  # the compiler's and the assembler's
        compiler(end=f"echo it failed >&2; echo '{word}: no such register' >&2; exit 1")
        with pytest.raises(Unavailable, match="no such register"):
            build("avx2")
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_no_compiler_and_no_cache_are_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler; install g\+\+"):
        build("avx2")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"cannot be written.*set ROLLOUT_SPEC_CACHE"):
        build("avx2")


def test_the_variant_follows_the_cpu_and_the_switch(monkeypatch):
    def on(flags, switch="auto", permitted=True):
        monkeypatch.setattr(building, "may_use_tile_registers", lambda: permitted)
        monkeypatch.setattr(building, "cpu_flags", lambda: frozenset(flags))
        monkeypatch.setenv("ROLLOUT_SPEC_KERNELS", switch)
        return variants()[0]

    avx2, avx512, amx = (VARIANTS[name][0] for name in ("avx2", "avx512", "amx"))
    assert on(avx2) == on(avx512, "avx2") == "avx2"
    assert on(avx512 - {"avx512_bf16"}) == on(avx512 - {"avx512_vnni"}) == "avx2"
    assert on(avx512) == on(avx512, "avx512") == "avx512" and on(avx2, "emulated") == "emulated"
    assert on(amx) == on(amx, "amx") == "amx" and on(amx, "avx512") == on(amx, permitted=False) == "avx512"
    on(amx)
    assert variants() == ["amx", "avx512"], "where the first does not build"
    on(amx, "amx")
    assert variants() == ["amx"], "who asked for it is told"
    assert on(amx - {"amx_int8"}) == on(amx - {"amx_bf16"}) == "avx512"
    with pytest.raises(Unavailable, match=r"does not let this process use AMX's registers.*KERNELS=avx512"):
        on(amx, "amx", permitted=False)
    with pytest.raises(Unavailable, match="this CPU lacks avx2, f16c, fma"):
        on({"sse2"})
    with pytest.raises(Unavailable, match="this CPU lacks avx512_bf16, avx512_vnni"):
        on(avx2, "avx512")
    with pytest.raises(Unavailable, match="ROLLOUT_SPEC_KERNELS=off"):
        on(avx512, "off")
    with pytest.raises(
        InvalidRequest,
        match="ROLLOUT_SPEC_KERNELS='fast': use auto, off, amx, avx512, avx2, emulated, emulated-amx",
    ):
        on(avx512, "fast")


def test_without_them_stock_layers_are_used_and_one_line_says_so(cache, monkeypatch, caplog, afresh):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, "rollout_spec"):
        layers = [make_linear(torch.randn(8, 8).bfloat16()) for _ in range(3)]
    assert not any(isinstance(layer, KernelLinear) for layer in layers)
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels are not available, torch's own are used: no C++ compiler; install g++, or name one in CXX"
    ]


def test_without_an_assembler_for_amx_the_next_best_is_used(cache, monkeypatch, caplog, afresh):
    """As with binutils from before AMX."""
    monkeypatch.setattr(library, "variants", lambda: ["amx", "emulated"])
    monkeypatch.setattr(library, "may_use_tile_registers", lambda: True)

    def old(name):
        if name == "amx":
            raise Unavailable("no such instruction: tileloadd")
        return build(name)

    monkeypatch.setattr(library, "build", old)
    with caplog.at_level(logging.WARNING, "rollout_spec"):
        assert library.kernels().variant == "emulated"
    (record,) = caplog.records
    assert "amx are not available, those for emulated are used: no such instruction" in record.getMessage()


def test_a_library_that_cannot_be_loaded_is_named_and_done_without(cache, compiler, caplog, afresh):
    compiler()  # what it writes is no library
    with caplog.at_level(logging.WARNING, "rollout_spec"):
        assert library.kernels() is None
    (record,) = caplog.records
    assert str(cache) in record.getMessage() and "set ROLLOUT_SPEC_CACHE" in record.getMessage()


ENGINE = """
from transformers import Qwen3Config, Qwen3ForCausalLM
from rollout_spec import RolloutEngine, SamplingParams
model = Qwen3ForCausalLM(Qwen3Config(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
)).eval()
for dtype in ("float32", "bfloat16"):
    engine = RolloutEngine.from_model(model, dtype=dtype, speculation={"drafter": "int8", "draft_length": 3})
    done = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=20, seed=1))
    print(dtype, len(done), type(engine.backend.weights.target.weights.lm_head).__name__)
"""


def test_the_engine_works_without_a_compiler(tmp_path):
    environment = {**os.environ, "PATH": "/nonexistent", "ROLLOUT_SPEC_CACHE": str(tmp_path)}
    environment.pop("CXX", None)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", ENGINE], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "KernelLinear" not in run.stdout and run.stdout.count("Linear") == 2
    assert run.stderr.count("CPU kernels are not available") == 1


def test_one_openmp_runtime_serves_torch_and_the_kernels(kernels):
    """Asked in a process that has loaded nothing else: other packages may bring a runtime of their own."""
    script = (
        "import re, torch\n"
        "from rollout_spec.kernels.build import build\n"
        "from rollout_spec.kernels.library import Kernels\n"
        f"Kernels(build({kernels.variant!r}), {kernels.variant!r}).pack_bf16(torch.ones(16, 2, dtype=torch.bfloat16))\n"
        "found = {line.split()[5] for line in open('/proc/self/maps') if re.search('lib(gomp|iomp5|omp)', line)}\n"
        "print(len(found))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "1", run.stderr
