"""No kernel reads or writes past its buffers, or does what C++ leaves undefined."""

import subprocess
from pathlib import Path

import pytest

from rollout_spec.kernels.build import AVX512, TILES, VARIANTS, cpu_flags

SCRIPT = Path(__file__).with_name("sanitize.sh")


EMULATED = "-DEMULATE_AVX512"


@pytest.mark.parametrize(
    "flags",
    [(), (EMULATED,), (EMULATED, TILES), AVX512],
    ids=["avx2", "emulated", "emulated-amx", "avx512"],
)
def test_kernels_are_clean_and_a_store_past_the_end_is_seen(tmp_path, flags):
    if flags is AVX512 and not VARIANTS["avx512"][0] <= cpu_flags():
        pytest.skip("this CPU lacks AVX512")

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    clean = run(SCRIPT, tmp_path, *flags)
    assert clean.returncode == 0 and clean.stdout == "clean\n", clean.stderr
    broken = run(tmp_path / "sanitize", "break")
    assert broken.returncode != 0 and "heap-buffer-overflow" in broken.stderr
