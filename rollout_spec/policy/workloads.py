"""Rollouts to simulate: how long every sample is, when it arrives, and how well each drafter would do on it.

A trajectory does not depend on speculation, so a workload is all the simulator needs to know of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.devices import NF4
from rollout_spec.policy.records import HISTORY, PLAIN, Trace

MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # SplitMix64
QWEN_PROMPT = 150


@dataclass(frozen=True)
class Acceptance:
    """Chance that a draft token is accepted, given that the ones before it in its draft are.

    Attributes:
        rates: Of each request, float64 [N].
        by_depth: Factor of the first, second, ... draft token; the last one holds for all after it.
        by_output: (output position, factor) from which each factor holds, ascending.
        by_time: (seconds, factor), likewise.
        doubts: Shares of the output positions at which the drafter is more or less in doubt, each with its factor.
        doubts_seed: Of which positions those are.
    """

    rates: np.ndarray
    by_depth: tuple[float, ...] = (1.0,)
    by_output: tuple[tuple[int, float], ...] = ()
    by_time: tuple[tuple[float, float], ...] = ()
    doubts: tuple[tuple[float, float], ...] = ()
    doubts_seed: int = 0

    def at(self, requests: np.ndarray, positions_BK: np.ndarray, time: float) -> np.ndarray:
        """Chances [B, K] of draft tokens at these output positions, drafted at `time`."""
        depth = np.minimum(np.arange(positions_BK.shape[1]), len(self.by_depth) - 1)
        chances = self.rates[requests, None] * np.asarray(self.by_depth)[depth]
        for start, factor in reversed(self.by_time):
            if time >= start:
                chances = chances * factor
                break
        if self.by_output:
            starts, factors = zip(*self.by_output)
            table = np.array((1.0, *factors))
            chances = chances * table[np.searchsorted(starts, positions_BK, side="right")]
        if self.doubts:
            shares, factors = zip(*self.doubts)
            noise = uniform_noise(self.doubts_seed, requests, positions_BK, "doubt")
            kind = np.searchsorted(np.cumsum(shares), noise, side="right")
            chances = chances * np.array((*factors, 1.0))[kind]
        return np.clip(chances, 0.0, 1.0)


@dataclass(frozen=True)
class History:
    """Where text repeats. Blocks of `block` output tokens match, as a whole, with probability `coverage`.

    Attributes:
        acceptance: Of history's draft tokens where it matches.
        coverage: Of each request, float64 [N].
        block: Output tokens per block; a match ends with its block.
        confidence: What `Matches.confidence` claims, over what is true (1.0: calibrated).
    """

    acceptance: Acceptance
    coverage: np.ndarray
    block: int = 16
    confidence: float = 1.0

    def lengths(self, requests: np.ndarray, outputs: np.ndarray, seed: int) -> np.ndarray:
        """Tokens history could propose, int64 [B]."""
        matches = uniform_noise(seed, requests, outputs // self.block, "match") < self.coverage[requests]
        return np.where(matches, self.block - outputs % self.block, 0)


@dataclass(frozen=True)
class Workload:
    """One rollout, with times in seconds from its start.

    Attributes:
        prompts, outputs: Tokens of every request, int64 [N]; outputs at least 1.
        arrivals: When each could start, float64 [N], ascending. A first arrival after 0 stands for what comes
            before decoding (loading weights, prefill) and is the same under every policy.
        drafters: How well each drafter with weights does, in order of preference.
        history: What repeats, or None.
        limit: Output tokens allowed per request; policies see this, not `outputs`.
        slots: Most live sequences (max_num_seqs).
        stoppable: As in `StepState`; how sure a drafter is of a token is then the log odds of its acceptance.
    """

    name: str
    prompts: np.ndarray
    outputs: np.ndarray
    arrivals: np.ndarray
    drafters: Mapping[str, Acceptance] = field(default_factory=dict)
    history: History | None = None
    limit: int = 8192
    slots: int = 256
    stoppable: bool = False

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.outputs) == len(self.arrivals) > 0:
            raise ValueError("prompts, outputs and arrivals: give one of each per request, and a request")
        if self.outputs.min() < 1 or self.outputs.max() > self.limit or self.slots < 1:
            raise ValueError(f"outputs must be in 1..limit={self.limit}, slots={self.slots} at least 1")
        if (np.diff(self.arrivals) < 0).any():
            raise ValueError("arrivals: sort the requests by arrival")
        for name in self.drafters:
            if len(self.drafters[name].rates) != len(self.outputs):
                raise ValueError(f"drafters[{name!r}].rates: give one per request")


def uniform_noise(seed: int, requests: np.ndarray, positions: np.ndarray, purpose: str) -> np.ndarray:
    """Uniform numbers in [0, 1) keyed by (seed, request, output position, purpose), shape of `positions`.

    Keyed, not drawn, so that every policy meets the same luck at the same position.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(seed & 0xFFFFFFFF)
        for character in purpose.encode():
            key = _mix(key ^ np.uint64(character))
        by_request = _mix(key ^ requests.astype(np.uint64))
        if positions.ndim == 2:
            by_request = by_request[:, None]
        bits = _mix(by_request ^ (positions.astype(np.uint64) << np.uint64(20)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: Any) -> Any:
    """SplitMix64's finalizer, on uint64 scalars or arrays."""
    x = x + np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[1])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[2])
    return x ^ (x >> np.uint64(31))


def from_lengths(
    name: str,
    outputs: np.ndarray,
    *,
    prompt: int = 256,
    alpha: float | Mapping[str, float] = 0.9,
    arrivals: np.ndarray | None = None,
    limit: int = 8192,
    slots: int = 256,
) -> Workload:
    """These output lengths, int64 [N], every prompt `prompt` tokens long, acceptance `alpha` per drafter.

    A single `alpha` is that of one drafter, `nf4`.
    """
    outputs = np.asarray(outputs, np.int64)
    rates = {NF4: alpha} if isinstance(alpha, (int, float)) else alpha
    return Workload(
        name,
        np.full(len(outputs), prompt, np.int64),
        outputs,
        np.zeros(len(outputs)) if arrivals is None else arrivals,
        {drafter: Acceptance(np.full(len(outputs), rate)) for drafter, rate in rates.items()},
        limit=limit,
        slots=slots,
    )


def acceptance_of(shares: np.ndarray | float, K: int) -> np.ndarray:
    """Acceptance alpha of a token where `shares` of the tokens of drafts of K are accepted: alpha + ... + alpha^K is that."""
    grid = np.linspace(0.0, 1.0, 1001)
    return np.asarray(np.interp(shares, (grid[:, None] ** np.arange(1, K + 1)).mean(axis=1), grid))


def from_trace(trace: Trace, alpha: float | None = None) -> Workload:
    """The samples of a recorded rollout: lengths, the order they started in, and the acceptance each of them met.

    All are taken to wait from the start, for as many slots as the largest batch of the trace.
    Drafters with weights are those of the trace (`nf4` if none ran). A sample that was drafted for has its own
    acceptance per token, of the share accepted of drafts of the mean length and shrunk towards the rollout's by four
    draft tokens' worth; `alpha` replaces all of them.
    """
    if not trace.requests:
        raise ValueError("the trace holds no finished request: record one with requests, or use from_lengths")
    requests = sorted(trace.requests, key=lambda request: request.started)
    drafted = np.array([request.drafted for request in requests], float)
    accepted = np.array([request.accepted for request in requests], float)
    mean = accepted.sum() / drafted.sum() if drafted.any() else 0.8
    shares = (accepted + 4 * mean) / (drafted + 4)
    speculated = [step for step in trace.steps if step.drafted]
    K = round(sum(step.drafted for step in speculated) / max(1, sum(step.batch for step in speculated)))
    rates = acceptance_of(shares, max(1, K)) if alpha is None else np.full(len(requests), alpha)
    modes = dict.fromkeys(part for step in trace.steps for part in step.mode.split("+"))
    names = [mode for mode in modes if mode not in (PLAIN, HISTORY)] or [NF4]
    outputs = np.array([request.output_tokens for request in requests], np.int64)
    return Workload(
        str(trace.about.get("name", "trace")),
        np.array([request.prompt_tokens for request in requests], np.int64),
        outputs,
        np.zeros(len(outputs)),
        {name: Acceptance(rates) for name in names},
        limit=max(8192, int(outputs.max())),
        slots=max((step.batch for step in trace.steps), default=len(outputs)),
    )


def long_tail(samples: int = 128, seed: int = 0) -> Workload:
    """Lognormal lengths, median 500, with a Pareto tail for the last twentieth, up to 8192 tokens."""
    rng = np.random.default_rng(seed)
    tail = rng.random(samples) < 0.05
    outputs = np.where(tail, 1500 * (1 + rng.pareto(1.2, samples)), rng.lognormal(np.log(500), 0.6, samples))
    return from_lengths("long_tail", np.clip(outputs, 16, 8192).astype(np.int64))


def long_tail_32k(samples: int = 128, seed: int = 0) -> Workload:
    """The same four times as long, up to 32,768 tokens, as of policies that reason at length."""
    return from_lengths("long_tail_32k", 4 * long_tail(samples, seed).outputs, limit=32_768)


def jumping_batch(samples: int = 128, seed: int = 0) -> Workload:
    """Waves: a fifth of the samples whenever most of the last fifth are done, so that B falls and jumps up again."""
    rng = np.random.default_rng(seed)
    waves = np.sort(np.arange(samples) % 5)
    outputs = np.clip(rng.lognormal(np.log(250), 0.5, samples), 16, 2048).astype(np.int64)
    return from_lengths("jumping_batch", outputs, arrivals=2.0 * waves)


def collapsing_acceptance(samples: int = 64, seed: int = 0) -> Workload:
    """A good drafter that gets next to nothing right after output token 400, as when text leaves its domain."""
    workload = replace(long_tail(samples, seed), name="collapsing_acceptance")
    drafters = {
        name: replace(acceptance, by_output=((400, 0.1),)) for name, acceptance in workload.drafters.items()
    }
    return replace(workload, drafters=drafters)


def kv_heavy(samples: int = 24, seed: int = 0) -> Workload:
    """Few sequences with 30,000 tokens of context each: the KV cache outweighs the weights, B says otherwise."""
    rng = np.random.default_rng(seed)
    return from_lengths("kv_heavy", rng.integers(200, 1000, samples), prompt=30_000, alpha=0.85)


def one_straggler(samples: int = 64, seed: int = 0) -> Workload:
    """Short samples and a single one of 6000 tokens."""
    rng = np.random.default_rng(seed)
    outputs = rng.integers(100, 400, samples)
    outputs[rng.integers(samples)] = 6000
    return from_lengths("one_straggler", outputs)


def uniform(samples: int = 32, seed: int = 0) -> Workload:
    """Lengths spread evenly from 100 to 2000 tokens."""
    return from_lengths("uniform", np.random.default_rng(seed).integers(100, 2000, samples))


def many_medium(samples: int = 512, seed: int = 0) -> Workload:
    """More samples than slots, all of middling length: the batch stays full nearly to the end."""
    return from_lengths(
        "many_medium", np.random.default_rng(seed).integers(400, 800, samples), slots=96, alpha=0.8
    )


def repeating(samples: int = 32, seed: int = 0) -> Workload:
    """A long tail where half of the text has been seen before."""
    workload = long_tail(samples, seed)
    history = History(Acceptance(np.full(samples, 0.9)), np.full(samples, 0.5), block=32)
    return replace(workload, name="repeating", history=history)


SYNTHETIC: dict[str, Callable[..., Workload]] = {
    builder.__name__: builder
    for builder in (
        long_tail,
        long_tail_32k,
        jumping_batch,
        collapsing_acceptance,
        kv_heavy,
        one_straggler,
        uniform,
        many_medium,
        repeating,
    )
}


def efficientrollout_qwen7b(
    costs: CostModel, mean_response: float = 640.0, last: float = 88.0, drafter: str = NF4
) -> Workload:
    """One GPU's share of the rollouts behind EfficientRollout's end-to-end figures for Qwen2.5-7B on an A100.

    Published for plain decoding: 50 / 90 / 99 % of 128 samples are done after 13 / 22 / 30 s and the last after
    88 s. Lengths follow from these times and from what `costs`, fitted to their sweep of forward passes, says of
    plain passes. What goes by before the first pass (weights, prefill) is not published; it is taken to be what
    makes the mean response `mean_response`, and stands in `arrivals`.

    Args:
        last: When the last sample is done, in seconds; at most 8192 tokens long, it may be done earlier.
        drafter: Name of the 4-bit self-drafter, which accepts 98.2 % of tokens.
    """
    low, high = 0.0, 12.0
    while high - low > 1e-3:
        start = (low + high) / 2
        longer = _outputs_until(costs, start, last).mean() > mean_response
        low, high = (start, high) if longer else (low, start)
    return from_lengths(
        "efficientrollout_qwen7b",
        _outputs_until(costs, low, last),
        prompt=QWEN_PROMPT,
        alpha={drafter: 0.982},
        arrivals=np.full(128, low),
    )


def _outputs_until(costs: CostModel, start: float, last: float) -> np.ndarray:
    """Lengths, int64 [128], that plain decoding from `start` completes at the published times."""
    batch, stride = 128, 16
    done = (np.arange(batch) + 0.5) / batch
    finish = np.interp(done, (0.0, 0.5, 0.9, 0.99, done[-1]), (start, 13.0, 22.0, 30.0, last))
    outputs, tokens, clock = np.zeros(batch), 0.0, start
    for i in range(batch):
        live = batch - i
        while clock < finish[i] and tokens < 8192:
            step = costs.target(live, live, int(live * (QWEN_PROMPT + tokens)))
            ahead = min(stride, (finish[i] - clock) / step)
            tokens, clock = tokens + ahead, clock + ahead * step
        outputs[i] = tokens
    return np.clip(np.round(outputs), 1, 8192).astype(np.int64)
