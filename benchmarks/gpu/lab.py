"""Random policies of realistic shapes on one device, the batches that live in them, and how long things take there.

Weights are random, so nothing here says anything about acceptance: where a figure needs one it is imposed, by
overwriting the verdict of the verifier (`imposed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from figures import Measured
from torch import Tensor

from rollout_spec.config import EngineConfig, SpeculationConfig
from rollout_spec.contracts import SamplingParams
from rollout_spec.drafters.quantize import QUANTIZERS, available_quantizers
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.models.spec import ModelSpec
from rollout_spec.models.weights import Piece, is_linear, slots_of, weight_shapes
from rollout_spec.policy import devices, graph_plan
from rollout_spec.policy.devices import DEVICES, Device
from rollout_spec.sampling import verify
from rollout_spec.sampling.noise import Stream, fold, uniform
from rollout_spec.sampling.verify import Verdict
from rollout_spec.torch_backend.backend import TorchBackend
from rollout_spec.torch_backend.graph_passes import model_shape
from rollout_spec.torch_backend.slots import Prompt, Sample

QWEN = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": QWEN
    | {
        "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "tie_word_embeddings": True,
    },
    "7b": QWEN
    | {
        "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        batches, contexts, draft_lengths: The grid: live sequences, tokens that attention may read, K.
        alphas: Imposed acceptance per token.
        rounds: Interleaved repeats.
        samples, median_output, longest_output: The long tail.
        lone_outputs: Tokens of every sequence in the sweep over B.
        proof: Prompts, seeds, longest answer and short completions per test of the proof.
        graph_bytes: Budget of the planned graph pool.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    alphas: tuple[float, ...]
    rounds: int
    samples: int
    median_output: int
    longest_output: int
    lone_outputs: int
    proof: tuple[int, int, int, int]
    graph_bytes: int

    @property
    def room(self) -> int:
        """Tokens by which a measured sequence may grow within its context: what `Turns` may emit at most."""
        return (self.rounds + 1) * (1 + sum(k + 1 for k in self.draft_lengths)) + 1


FULL = Scale(
    batches=(1, 8, 32, 128), contexts=(512, 4096), draft_lengths=(3, 7), alphas=(0.75, 0.85, 0.9, 0.95, 0.98),
    rounds=7, samples=64, median_output=80, longest_output=512, lone_outputs=64, proof=(8, 3, 96, 1500),
    graph_bytes=6 << 30,
)  # fmt: skip
DRY = Scale(
    batches=(1, 2), contexts=(128, 256), draft_lengths=(2,), alphas=(0.75, 0.98), rounds=3, samples=4,
    median_output=6, longest_output=24, lone_outputs=8, proof=(1, 2, 32, 500), graph_bytes=1 << 30,
)  # fmt: skip

_BURST, _MOST_INNER = 0.02, 4  # seconds timed at a time at least, if that takes no more runs
PROMPT = 32  # tokens known before a rollout


def hf_config(size: str, dry: bool) -> dict[str, Any]:
    """The model's `config.json`."""
    return SHAPES[size] | ({**TINY, "dtype": "float32"} if dry else {"dtype": "bfloat16"})


def cost_shape(spec: ModelSpec) -> devices.ModelShape:
    """What the cost model wants to know of a policy."""
    bits = 8.0 * torch.empty(0, dtype=spec.dtype).itemsize
    return devices.ModelShape.from_config(
        hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads, intermediate_size=spec.intermediate_size, vocab_size=spec.vocab_size,
        head_dim=spec.head_dim, weight_bits=bits, kv_bits=bits,
    )  # fmt: skip


def graph_shape(spec: ModelSpec) -> graph_plan.ModelShape:
    """What the plan of a graph pool wants to know of it."""
    return model_shape(spec, spec.dtype)


def this_device(device: torch.device) -> tuple[Device, str]:
    """Peaks of this device, and where they are from: a datasheet or, for a device without one, its own best."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    for known in DEVICES.values():
        if known.name.split("-")[0] in words:
            return known, "datasheet"
    peaks = Device(name, max(matmul_rates(device, 3)), max(copy_rates(device, 3)))
    return peaks, f"measured here: rollout_spec.policy.devices knows {', '.join(DEVICES)}"


def copy_rates(device: torch.device, rounds: int) -> list[float]:
    """Bytes read and written per second by copies on the device."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(device, lambda: target.copy_(source), 5) for _ in range(rounds + 1)]
    return [2 * source.nbytes / x for x in seconds[1:]]


def matmul_rates(device: torch.device, rounds: int) -> list[float]:
    """FLOP/s of a large product in bf16, on random numbers."""
    side = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = [timed(device, lambda: a @ b, 3) for _ in range(rounds + 1)]
    return [2 * side**3 / x for x in seconds[1:]]


def long_tail(scale: Scale, seed: int) -> np.ndarray:
    """Output tokens of every sample: lognormal, and every sixteenth four times as long; int64 [samples]."""
    rng = np.random.default_rng(seed)
    outputs = rng.lognormal(np.log(scale.median_output), 0.5, scale.samples)
    outputs[:: max(2, scale.samples // 4)] *= 4
    outputs[0] = scale.longest_output
    return np.clip(outputs, 2, scale.longest_output).astype(np.int64)


class Lab:
    """A random policy on the device, its drafter, and whatever batch is live in it.

    Attributes:
        backend: The engine's backend; its drafter and policy are the benchmark's to choose.
        reasons: Why kinds of drafter are not available, None for those that are.
    """

    def __init__(self, size: str, scale: Scale, device: torch.device, seed: int) -> None:
        self.size, self.scale, self.device = size, scale, device
        self.spec = ModelSpec.from_hf_config(hf_config(size, device.type == "cpu"))
        most = max(scale.batches) * max(scale.contexts)
        config = EngineConfig(
            device=str(device),
            seed=seed,
            max_model_len=max(max(scale.contexts), PROMPT + scale.longest_output + 64),
            max_num_seqs=max(*scale.batches, scale.samples),
            kv_cache_tokens=max(most, 2 * scale.samples * (PROMPT + scale.longest_output)),
            graph_bytes=0,
            speculation=SpeculationConfig(
                drafter="none", draft_length=1, verifier="coupled", history=False, canary=False, canary_min_acceptance=0.0
            ),
        )  # fmt: skip
        self.backend = TorchBackend(self.spec, config, self.spec.dtype, device, None)
        self.backend.start(self._random_weights(seed), version=0)
        self.backend.cache.keys.normal_()
        self.backend.cache.values.normal_()
        self.reasons = available_quantizers(device, self.spec.dtype)
        self.shape = cost_shape(self.spec)
        self._rng = np.random.default_rng(seed)

    @property
    def kinds(self) -> list[str]:
        """Kinds of drafter that run here."""
        return [kind for kind, reason in self.reasons.items() if reason is None]

    def _random_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, shape in weight_shapes(self.spec).items():
            tensor = torch.empty(shape, dtype=self.spec.dtype, device=self.device)
            yield name, tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02, generator=generator)

    # --- drafters --------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """The target's linears, as an update would bring them."""
        slots = slots_of(self.backend.weights.target.weights)
        return [Piece(slot, x.dense(), x.bias) for slot, x in slots.items() if is_linear(slot)]

    def use(self, kind: str) -> QuantizedSelfDrafter:
        """Let a drafter of this kind follow the policy; the one before is given up."""
        weights = self.backend.weights
        if weights.drafter is None or weights.drafter.name != kind:
            weights.drafter = None
            drafter = QuantizedSelfDrafter(QUANTIZERS[kind])
            for piece in self.pieces():
                drafter.stage(piece)
            drafter.commit(weights.target, weights.version)
            weights.drafter = drafter
        assert isinstance(weights.drafter, QuantizedSelfDrafter)
        return weights.drafter

    # --- live batches ----------------------------------------------------------------------------------

    def occupy(self, known: Sequence[int], limits: Sequence[int]) -> np.ndarray:
        """Live sequences of `known` random tokens each that may grow to `limits`, as if prefilled; their slots [B]."""
        backend = self.backend
        self.clear()
        for index, (length, limit) in enumerate(zip(known, limits, strict=True)):
            tokens = self._rng.integers(0, self.spec.vocab_size, length)
            key = fold(backend.config.seed, index)
            params = SamplingParams(ignore_eos=True)
            sample = Sample(f"bench-{index}", 0, Prompt(tokens), params, key, int(limit), ())
            backend.scheduler.adopt(
                sample, backend.pool.allocate(-(-int(limit) // backend.config.block_size))
            )
            backend.assign(sample)
        return backend.scheduler.ready()

    def fill(self, batch: int, context: int) -> np.ndarray:
        """`batch` sequences that know as much of `context` tokens as leaves room to measure; their slots [B]."""
        return self.occupy([context - self.scale.room] * batch, [context] * batch)

    def clear(self) -> None:
        """End whatever is live."""
        self.backend.abort([sample for sample in self.backend.slots.samples if sample is not None])


# --- acceptance that is imposed ----------------------------------------------------------------------------


def accept(verdict: Verdict, draft_lengths: Tensor | None, keys: Tensor, alpha: float) -> Verdict:
    """The verdict, with drafts accepted by luck: each with probability `alpha`, keyed by sample and position.

    Keyed, so that every way to run the same samples meets the same luck at the same place.
    """
    depth = verdict.tokens.shape[1] - 1
    lucky = uniform(keys[:, :depth], Stream.ACCEPT) < alpha
    if draft_lengths is not None:
        lucky &= torch.arange(depth, device=keys.device) < draft_lengths[:, None]
    accepted = lucky.long().cumprod(1).sum(1)
    return Verdict(verdict.tokens, accepted + 1, accepted)


@contextmanager
def imposed(alpha: float) -> Iterator[None]:
    """Within, the engine's coupled verifier does its work, and its verdict is then overwritten by `accept`."""
    original = verify.verify_coupled

    def overwritten(
        target_logits: Tensor,
        drafts: Tensor | None,
        draft_lengths: Tensor | None,
        keys: Tensor | None,
        ragged: verify.Ragged | None = None,
    ) -> Verdict:
        verdict = original(target_logits, drafts, draft_lengths, keys, ragged)
        if drafts is None or keys is None:
            return verdict
        return accept(verdict, draft_lengths, keys, alpha)

    verify.verify_coupled = overwritten
    try:
        yield
    finally:
        verify.verify_coupled = original


# --- time --------------------------------------------------------------------------------------------------


def timed(device: torch.device, run: Callable[[], object], inner: int = 1) -> float:
    """Seconds of one `run`, from `inner` of them back to back: on CUDA by events, else by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(inner):
            run()
        return (time.perf_counter() - start) / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / inner


@dataclass(frozen=True)
class Interleaved:
    """Seconds of several sides that took turns: one entry per round, in order."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, side: str) -> Measured:
        return Measured.of(self.seconds[side])

    def ratio(self, above: str, below: str) -> Measured:
        """Of neighbouring runs: `above` over `below`."""
        return Measured.of([a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)])


def interleaved(device: torch.device, sides: Mapping[str, Callable[[], object]], rounds: int) -> Interleaved:
    """Time the sides in turns, in the order A B C, C B A, A B C, ..., after an uncounted round.

    Short runs are timed several at a time, so that launching the first does not count.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    longest = max(timed(device, run) for run in sides.values())
    inner = max(1, min(_MOST_INNER, int(_BURST / longest)))
    for turn in range(rounds):
        for side in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            seconds[side].append(timed(device, sides[side], inner))
    return Interleaved({side: tuple(values) for side, values in seconds.items()})
