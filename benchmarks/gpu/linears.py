"""What each kind of quantized linear costs on a GPU, vLLM's Marlin kernel among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from figures import Measured, Part

from rollout_spec.drafters.quantize import QUANTIZERS, get_quantizer
from rollout_spec.drafters.quantizers.base import relative_error


def linears(part: Part) -> None:
    """One layer of a 7B model in each kind of quantized linear: error against float32, time against bf16."""
    from rollout_spec.integrations.vllm.quantized_layers import quantizer_for  # imports vLLM

    device, dtype = torch.device("cuda", 0), torch.bfloat16
    shapes = ((4608, 3584), (3584, 3584), (2 * 18944, 3584), (3584, 18944))
    weights = [torch.randn(*shape, device=device, dtype=dtype) * 0.02 for shape in shapes]
    makers = {
        "marlin int4": lambda w: quantizer_for("int4", device, dtype).quantize(w),
        "torch int4": lambda w: get_quantizer("int4", device, dtype).quantize(w),
        "nf4": lambda w: get_quantizer("nf4", device, dtype).quantize(w),
        "int8": lambda w: get_quantizer("int8", device, dtype).quantize(w),
        "bf16": lambda w: lambda x: x @ w.t(),
    }
    if why := QUANTIZERS["nf4"].unavailable(device, dtype):
        del makers["nf4"]
        part.note(f"nf4: {why}")
    for name, make in makers.items():
        with part.attempt(name):
            layers = [make(weight) for weight in weights]
            for weight, layer in zip(weights, layers, strict=True):
                x = torch.randn(5, weight.shape[1], device=device, dtype=dtype)
                error = relative_error(layer(x), x.float() @ weight.float().t())
                most = {"bf16": 0.01, "int8": 0.02}.get(name, 0.12)
                part.check(f"{name} {list(weight.shape)}", f"{error:.4f}", f"at most {most}", error <= most)
            for rows in (1, 4, 8, 16, 32, 64, 128):
                inputs = [torch.randn(rows, w.shape[1], device=device, dtype=dtype) for w in weights]
                part.figure(f"{name}, {rows} rows", _microseconds(layers, inputs), "us")
            began = time.perf_counter()
            layers = [make(weight) for weight in weights]
            torch.cuda.synchronize()
            part.figure(f"{name}, quantizing", 1e3 * (time.perf_counter() - began), "ms")


def _microseconds(layers: Sequence[Any], inputs: Sequence[Any]) -> Measured:
    """Of one pass through the layers, on a graph; they are larger together than the GPU's cache."""
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(100 * start.elapsed_time(end))
    return Measured.of(times)
