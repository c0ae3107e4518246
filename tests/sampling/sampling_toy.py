"""A toy target and drafter, decoded by the real table, pipeline and verifiers over N sequences at once.

The toy's logits depend on the two tokens before. It is decoded four tokens deep with ragged draft lengths, and
the joint of the four tokens is enumerated with `reference.process`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import stats

from rollout_spec.contracts import SamplingParams
from rollout_spec.sampling import reference
from rollout_spec.sampling.noise import fold, row_keys
from rollout_spec.sampling.table import SamplingTable
from rollout_spec.sampling.verify import (
    Verdict,
    draft_coupled,
    draft_rejection,
    verify_coupled,
    verify_rejection,
)

N, DEPTH, VOCAB, PADDED = 60_000, 4, 6, 64
CHUNK = 10_000  # sequences decoded together
PROMPT = (1, 2)
END = (5,)

OPTIONS = {
    "none": {},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {0: 1.5, 3: -1.0}, "min_tokens": 2},
    "all": {
        "top_k": 5,
        "top_p": 0.93,
        "min_p": 0.03,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {4: 0.7},
        "min_tokens": 3,
    },
}


@cache
def tables(params_items: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and drafter logits [VOCAB, VOCAB, PADDED] by the two tokens before; mean processed TV 0.3."""
    params = SamplingParams(**{k: dict(v) if k == "logit_bias" else v for k, v in params_items})
    rng = np.random.default_rng(7)
    shape = (VOCAB, VOCAB, VOCAB)
    target, other = rng.normal(0, 1.2, shape), rng.normal(0, 1.2, shape)
    low, high = 0.0, 1.0
    for _ in range(6):
        share = (low + high) / 2
        drafter = (1 - share) * target + share * other
        low, high = (share, high) if mean_tv(target, drafter, params) < 0.3 else (low, share)
    assert 0.2 < mean_tv(target, drafter, params) < 0.4
    padded = np.full((2, *shape[:2], PADDED), -np.inf, dtype=np.float32)
    padded[..., :VOCAB] = target, drafter
    return torch.from_numpy(padded[0]), torch.from_numpy(padded[1])


def conditional(table: np.ndarray, params: SamplingParams, output: tuple[int, ...]) -> np.ndarray:
    context = (PROMPT + output)[-2:]
    processed, _ = reference.process(table[context].astype(np.float32), params, PROMPT, output, END)
    return reference.softmax(processed)


def mean_tv(target: np.ndarray, drafter: np.ndarray, params: SamplingParams) -> float:
    outputs = [(), *itertools.product(range(VOCAB), repeat=1), *itertools.product(range(VOCAB), repeat=2)]
    gaps = [
        np.abs(conditional(target, params, o) - conditional(drafter, params, o)).sum() / 2 for o in outputs
    ]
    return float(np.mean(gaps))


def enumerate_joint(target: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Exact probability of every output of DEPTH tokens: [VOCAB ** DEPTH]."""
    joint = np.ones(1)
    for depth in range(DEPTH):
        outputs = itertools.product(range(VOCAB), repeat=depth)
        rows = np.stack([conditional(target, params, output) for output in outputs])
        joint = (joint[:, None] * rows).reshape(-1)
    return joint


@cache
def noise_bases(sample: int = 0) -> torch.Tensor:
    """One noise base per request, of one of its samples."""
    return torch.tensor([fold(2024, i, sample) for i in range(N)])


@dataclass
class Step:
    """What a verifier gets to see in one step; broken ones also read what they should not."""

    target: torch.Tensor
    target_raw: torch.Tensor
    drafts: torch.Tensor
    lengths: torch.Tensor
    q: torch.Tensor | None
    q_raw: torch.Tensor
    keys: torch.Tensor


Verify = Callable[[Step], Verdict]


def coupled(step: Step) -> Verdict:
    return verify_coupled(step.target, step.drafts, step.lengths, step.keys)


def rejection(step: Step) -> Verdict:
    return verify_rejection(step.target, step.drafts, step.lengths, step.q, step.keys)


DRAFT = {coupled: draft_coupled, rejection: draft_rejection}
VERIFIERS = {"coupled": coupled, "rejection": rejection}


def prepare(params: SamplingParams, base: torch.Tensor) -> SamplingTable:
    """A table with the same request in every slot, each under its own noise base."""
    table = SamplingTable(len(base), PADDED, "cpu", true_vocab_size=VOCAB)
    table.assign(0, params, PROMPT, (), END, 0)
    for name in ("_floats", "_ints", "_bias", "_bias_ids", "_end_ids", "_counts", "_in_prompt"):
        state = getattr(table, name)
        if state is not None:
            state[:] = state[0].clone()
    table._ints[:, 0] = base
    table._stages = table._stages[:1] * len(base)
    return table


def simulate(
    params: SamplingParams,
    k: int,
    verify: Verify,
    *,
    version: int = 1,
    draft: Callable | None = None,
    bases: torch.Tensor | None = None,
    corrupt: float = 0.0,
    advance: Callable[[Verdict], torch.Tensor] = lambda verdict: verdict.emitted,
) -> torch.Tensor:
    """Decode DEPTH tokens for every noise base (N by default); returns int64 [N, DEPTH].

    `draft` None drafts greedily and tells the verifier nothing of q. `corrupt` is the share of drafter rows
    that are NaN. `advance` is by how much the position behind the keys moves.
    """
    bases = noise_bases() if bases is None else bases
    generator = torch.Generator().manual_seed(fold(version, k) % 2**31)
    parts = [
        _simulate(params, k, verify, version, draft, base, corrupt, advance, generator)
        for base in bases.split(CHUNK)
    ]
    return torch.cat(parts)


def _simulate(params, k, verify, version, draft, base, corrupt, advance, generator) -> torch.Tensor:
    target_table, drafter_table = tables(frozen(params))
    table = prepare(params, base)
    n = len(base)
    history = torch.zeros(n, len(PROMPT) + DEPTH + k + 1, dtype=torch.int64)
    history[:, : len(PROMPT)] = torch.tensor(PROMPT)
    length = torch.full((n,), len(PROMPT))
    position = length.clone()
    while len(live := (length < len(PROMPT) + DEPTH).nonzero().squeeze(1)):
        batch = table.select(live, live[:1].tolist())
        keys = row_keys(batch.key, version, position[live].unsqueeze(1) + torch.arange(k + 1))
        context = torch.stack([history[live, length[live] - 2], history[live, length[live] - 1]], 1)
        block, q, q_raw = context[:, :0], [], []
        for j in range(k):
            last = torch.cat([context, block], 1)[:, -2:]
            raw = drafter_table[last[:, 0], last[:, 1]].unsqueeze(1)
            raw = raw.masked_fill(torch.rand(len(live), 1, 1, generator=generator) < corrupt, torch.nan)
            q_raw.append(raw)
            q.append(batch.process(raw, block, first=j).logits)
            drafted = q[-1].argmax(-1) if draft is None else draft(q[-1], keys[:, j : j + 1])
            block = torch.cat([block, drafted], 1)
        tokens = torch.cat([context, block], 1)
        raw = target_table[tokens[:, :-1], tokens[:, 1:]]
        verdict = verify(
            Step(
                target=batch.process(raw, block).logits,
                target_raw=raw,
                drafts=block,
                lengths=torch.randint(0, k + 1, (len(live),), generator=generator),
                q=torch.cat(q, 1) if q and draft else None,
                q_raw=torch.cat(q_raw, 1) if q_raw else raw[:, :0],
                keys=keys,
            )
        )
        columns = length[live].unsqueeze(1) + torch.arange(k + 1)
        history[live] = history[live].scatter(1, columns, verdict.tokens)
        table.record(live, verdict.tokens, verdict.emitted)
        length[live] += verdict.emitted
        position[live] += advance(verdict)
    return history[:, len(PROMPT) : len(PROMPT) + DEPTH]


def frozen(params: SamplingParams) -> tuple:
    default = SamplingParams()
    items = {k: v for k, v in vars(params).items() if v != getattr(default, k)}
    return tuple((k, tuple(v.items()) if k == "logit_bias" else v) for k, v in items.items())


def chi_square(cells: torch.Tensor, probs: np.ndarray) -> float:
    """p-value of observed cell numbers against probabilities, cells pooled to an expectation >= 5."""
    observed = np.bincount(cells.numpy(), minlength=len(probs))
    expected = probs * len(cells)
    if observed[probs == 0].any():
        return 0.0
    order = np.argsort(expected)
    pools, seen, mass = [], 0.0, 0.0
    for cell in order:
        seen, mass = seen + observed[cell], mass + expected[cell]
        if mass >= 5:
            pools.append((seen, mass))
            seen, mass = 0.0, 0.0
    pools[-1] = (pools[-1][0] + seen, pools[-1][1] + mass)
    got, want = np.array(pools).T
    return float(stats.chi2.sf(((got - want) ** 2 / want).sum(), len(pools) - 1))


def joint_p_value(tokens: torch.Tensor, params: SamplingParams) -> float:
    target_table, _ = tables(frozen(params))
    joint = enumerate_joint(target_table[..., :VOCAB].numpy(), params)
    weights = VOCAB ** torch.arange(DEPTH - 1, -1, -1)
    return chi_square((tokens * weights).sum(1), joint)


def pair_p_value(first: torch.Tensor, second: torch.Tensor, params: SamplingParams) -> float:
    """p-value of two runs' first two tokens being independent draws from the exact distribution."""
    target_table, _ = tables(frozen(params))
    single = enumerate_joint(target_table[..., :VOCAB].numpy(), params).reshape(VOCAB**2, -1).sum(1)
    cells = (first[:, 0] * VOCAB + first[:, 1]) * VOCAB**2 + second[:, 0] * VOCAB + second[:, 1]
    return chi_square(cells, np.outer(single, single).reshape(-1))
