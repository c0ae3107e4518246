"""Every variant of the kernels that this machine can run."""

import pytest
import torch

from rollout_spec.kernels.build import VARIANTS, Unavailable, build, cpu_flags, may_use_tile_registers
from rollout_spec.kernels.library import Kernels

RUNNABLE = [
    name
    for name, (needed, _) in VARIANTS.items()
    if needed <= cpu_flags() and (name != "amx" or may_use_tile_registers())
]


@pytest.fixture(scope="session", params=RUNNABLE)
def kernels(request):
    try:
        return Kernels(build(request.param), request.param)
    except Unavailable as reason:
        pytest.fail(f"the kernels do not build here: {reason}")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield
