"""int4 weights as vLLM's Marlin kernel takes them; the kernel itself ran on a GPU, in `benchmarks/gpu/vllm_cells.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout_spec.drafters.quantizers.base import relative_error
from rollout_spec.integrations.vllm import marlin


def decoded(words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What `quantize_groups` made of a weight: [N, K] float32, padding included."""
    codes = torch.stack([words >> (4 * place) & 15 for place in range(8)], 1).flatten(0, 1)  # [K, N]
    groups = codes.unflatten(0, (-1, marlin.GROUP)) - zeros[:, None]
    return (groups * scales.float()[:, None]).flatten(0, 1).t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (100, 200), (3, 1), (257, 640)])
def test_codes_stand_for_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    padded = -(-shape[0] // 64) * 64, -(-shape[1] // 128) * 128
    words, scales, zeros = marlin.quantize_groups(weight, padded, dtype)
    assert words.shape == (padded[1] // 8, padded[0]) and scales.dtype == dtype
    assert zeros.min() >= 0 and zeros.max() <= 15  # else neighbours in a word would be spoilt
    made = decoded(words, scales, zeros)
    assert relative_error(made[: shape[0], : shape[1]], weight) <= 0.11
    made[: shape[0], : shape[1]] = 0
    assert not made.any()  # padding multiplies to nothing
    again = marlin.quantize_groups(weight, padded, dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, (words, scales, zeros), strict=True))


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_weights_of_one_sign_use_all_codes(sign: int, zero: int) -> None:
    weight = sign * torch.linspace(0.5, 1, 128).expand(64, 128)
    words, scales, zeros = marlin.quantize_groups(weight, (64, 128), torch.bfloat16)
    assert (zeros == zero).all()
    assert relative_error(decoded(words, scales, zeros), weight) < 0.03


def test_the_kernels_order_of_columns() -> None:
    """Of each 64, place 8 i + j holds column 8 j + i; of zero points, eight to a word, the even ones come first."""
    tiled = marlin._tiled(torch.arange(128)[None])
    assert tiled[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert tiled[0, 64:67].tolist() == [64, 72, 80]
    assert marlin._words(torch.arange(8, dtype=torch.int32)[None]).tolist() == [[0x76543210]]
    assert marlin._words(torch.full((1, 8), 15, dtype=torch.int32)).tolist() == [[-1]]
    by_column = torch.arange(64, dtype=torch.int32)[None] // 8
    packed = marlin._packed_zeros(by_column)
    assert packed.shape == (1, 8) and (packed == 0x75316420).all()


def test_it_is_for_gpus() -> None:
    assert "GPU" in (marlin.MarlinQuantizer().missing(torch.device("cpu")) or "")
