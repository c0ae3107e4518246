"""No kernel reads or writes past its buffers, or does what C++ leaves undefined."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitize.sh")


def run(scratch, *flags):
    return subprocess.run([SCRIPT, scratch, *flags], capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("flags", [(), ("-DEMULATE_AVX512",)], ids=["avx2", "emulated"])
def test_kernels_are_clean(tmp_path, flags):
    result = run(tmp_path, *flags)
    assert result.returncode == 0 and result.stdout == "clean\n", result.stderr


def test_the_sanitizers_see_a_store_past_the_end(tmp_path):
    result = run(tmp_path, "-DBREAK_ON_PURPOSE")
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
