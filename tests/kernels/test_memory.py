"""Memory for weights and KV caches: large pages, nobody's part in another's, and back to the system in the end."""

import threading
import time
from pathlib import Path

import pytest
import torch

from rollout_spec.contracts import InvalidRequest
from rollout_spec.kernels import memory as memory_module
from rollout_spec.kernels.memory import LARGE_PAGE, REGION, WeightMemory, zeros_on_large_pages
from rollout_spec.torch_backend.kv_cache import KVCache

SIZES = [1, 63, 64, 65, 3 << 19, LARGE_PAGE - 1, 5 << 20, REGION - 64, REGION, REGION + 1]


def asks_for_large_pages(tensor):
    """Whether all mappings that the tensor lies in were advised so, by /proc/self/smaps."""
    first, last, held, found = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            start, stop = (int(part, 16) for part in word.split("-"))
            held = start < last and first < stop
        elif held and word == "VmFlags:":
            found.append("hg" in line.split())
    return bool(found) and all(found)


def virtual_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages"
)
def test_weights_and_caches_ask_for_large_pages(kernels):
    weight = torch.randn(768, 1024).bfloat16()  # packed it is less than a large page
    assert asks_for_large_pages(kernels.pack_bf16(weight))
    assert asks_for_large_pages(kernels.quantize("nf4", weight)[0])
    cache = KVCache(2, 30, 2, 16, 64, torch.bfloat16, torch.device("cpu"))
    assert asks_for_large_pages(cache.keys) and asks_for_large_pages(cache.values)
    assert not asks_for_large_pages(torch.zeros(5 << 20))


def test_zeros_begin_a_large_page():
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        for count in (0, 1, LARGE_PAGE + 3):
            zeros = zeros_on_large_pages(count, dtype)
            assert zeros.shape == (count,) and zeros.dtype == dtype and not zeros.any()
            assert zeros.data_ptr() % LARGE_PAGE == 0 or not count


def test_a_system_that_refuses_large_pages_gives_ordinary_ones(monkeypatch):
    class Refusing(memory_module.mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory_module.mmap, "mmap", Refusing)
    assert not zeros_on_large_pages(1000, torch.float32).any()


def test_tensors_have_no_byte_in_common():
    memory = WeightMemory()
    taken = [memory.take(size, torch.uint8).fill_(i) for i, size in enumerate(SIZES)]
    taken += [memory.take(size // 2, torch.bfloat16).fill_(i) for i, size in enumerate(SIZES)]
    assert [x.numel() for x in taken] == SIZES + [size // 2 for size in SIZES]
    for i, tensor in enumerate(taken):
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        assert (tensor == i % len(SIZES)).all()


def test_small_tensors_lie_beside_each_other():
    memory = WeightMemory()
    places = [memory.take(1000, torch.uint8).data_ptr() for _ in range(10)]
    assert [place - places[0] for place in places] == [1024 * i for i in range(10)]


def test_memory_goes_back_with_the_last_tensor():
    memory = WeightMemory()
    before = virtual_bytes()
    taken = [memory.take(REGION // 4, torch.uint8) for _ in range(40)]
    assert virtual_bytes() - before >= 10 * REGION
    last = taken[2]
    del taken
    assert REGION <= virtual_bytes() - before <= 3 * REGION  # of the last tensor, and the one being given out
    last.fill_(1)
    del last, memory
    assert virtual_bytes() - before < REGION


def test_threads_get_memory_of_their_own(monkeypatch):
    memory, barrier, taken = WeightMemory(), threading.Barrier(4), []

    def slowly(*arguments):
        time.sleep(0.05)  # time for the others to ask, too
        return zeros_on_large_pages(*arguments)

    def take():
        barrier.wait()
        taken.extend(memory.take(REGION // 4, torch.uint8) for _ in range(2))

    monkeypatch.setattr(memory_module, "zeros_on_large_pages", slowly)
    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {x.numel() for x in taken} == {REGION // 4}
    assert len({x.untyped_storage().data_ptr() for x in taken}) == 2, "a region was thrown away"
    assert len({x.data_ptr() for x in taken}) == len(taken) == 8


@pytest.mark.parametrize("count", [1 << 50, 1 << 62])
def test_more_than_there_is_says_so(count):
    with pytest.raises(MemoryError, match=f"{4 * count} bytes"):
        zeros_on_large_pages(count, torch.float32)
    with pytest.raises(InvalidRequest, match="kv_cache_tokens"):
        KVCache(1, count // 1024, 1, 16, 64, torch.float32, torch.device("cpu"))
