"""Is what is emitted distributed as the policy says? Chi-square tests against probabilities from a plain pass.

The joint of a few tokens cannot be enumerated over a real vocabulary, so the first token is tested against p,
and each later one given the most frequent beginnings. The exact p comes from `sampling.reference`, which shares
no code with the fast pipeline.

A good drafter hides a bad verifier: what is hardly ever rejected is hardly ever drawn from the residual. So the
drafter is also distorted on purpose, which must not show in what is emitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.drafters.base import Drafter, DraftRound, Proposal
from rollout_spec.engine import RolloutEngine
from rollout_spec.models.decoder import Decoder
from rollout_spec.models.weights import Piece
from rollout_spec.policy.baselines import Fixed
from rollout_spec.policy.records import SpeculationPolicy
from rollout_spec.proofs.runs import mode
from rollout_spec.sampling import reference
from rollout_spec.torch_backend.backend import TorchBackend

DRAFT_LENGTH = 3
TOKENS = DRAFT_LENGTH + 1  # up to the bonus token
LEAST_EXPECTED = 5.0  # of a cell; rarer tokens are pooled
BEGINNINGS = 6  # tested per length
LEAST_SAMPLES = 50  # with a beginning, to test what follows it
LONGEST_CONTEXT = 256
DISTORTION = 1.5  # standard deviation of what is added to a distorted drafter's logits


@dataclass(frozen=True)
class Distribution:
    """Tests of one verifier.

    Attributes:
        pvalues: Of every test with at least one degree of freedom.
        freedom: Their degrees of freedom together.
        samples: Completions drawn.
        residual: Those of them with a rejected draft, and so with a draw from the residual.
    """

    pvalues: tuple[float, ...] = ()
    freedom: int = 0
    samples: int = 0
    residual: int = 0

    @property
    def pvalue(self) -> float:
        """Smallest p-value, corrected for the number of tests (Bonferroni)."""
        return min(1.0, min(self.pvalues, default=1.0) * len(self.pvalues))

    def __add__(self, other: Distribution) -> Distribution:
        return Distribution(
            self.pvalues + other.pvalues,
            self.freedom + other.freedom,
            self.samples + other.samples,
            self.residual + other.residual,
        )


def chi_square(counts: np.ndarray, probs: np.ndarray) -> tuple[float, int]:
    """p-value and degrees of freedom of Pearson's test; 0 degrees if there is nothing to test.

    Args:
        counts: int [V], observed.
        probs: float64 [V]. A token of probability 0 that was observed gives p = 0.
    """
    if counts[probs == 0].any():
        return 0.0, 1
    expected = counts.sum() * probs
    alone = expected >= LEAST_EXPECTED
    cells = [*zip(counts[alone].tolist(), expected[alone].tolist())]
    pooled = counts[~alone].sum(), expected[~alone].sum()
    if pooled[1] >= LEAST_EXPECTED:
        cells.append(pooled)
    elif cells:
        smallest = min(range(len(cells)), key=lambda cell: cells[cell][1])
        cells[smallest] = (cells[smallest][0] + pooled[0], cells[smallest][1] + pooled[1])
    freedom = len(cells) - 1
    if freedom < 1:
        return 1.0, 0
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    halves = torch.tensor([freedom, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(halves[0], halves[1])), freedom


class _Distorted:
    """A drafter whose logits are off by a fixed random vector."""

    def __init__(self, drafter: Drafter, bias: Tensor) -> None:
        self._drafter, self._bias = drafter, bias
        self.name, self.version = drafter.name, drafter.version

    def propose(self, round: DraftRound) -> Proposal:
        def forward(model: Decoder, tokens: Tensor | None, step: int) -> Tensor:
            return round.forward(model, tokens, step) + self._bias

        return self._drafter.propose(replace(round, forward=forward))

    def stage(self, piece: Piece) -> None:
        self._drafter.stage(piece)

    def commit(self, target: Decoder, version: int) -> None:
        self._drafter.commit(target, version)
        self.version = version

    def rollback(self) -> None:
        self._drafter.rollback()

    def discard(self) -> None:
        self._drafter.discard()


def _bias(engine: RolloutEngine) -> Tensor:
    """float32 [V], V the padded vocabulary."""
    noise = torch.randn(engine.backend.spec.padded_vocab_size, generator=torch.Generator().manual_seed(0))
    return (DISTORTION * noise).to(engine.backend.device)


@contextmanager
def distorted(engine: RolloutEngine) -> Iterator[None]:
    """Draft with a distorted drafter for a while. The engine must be idle."""
    backend, bias = engine.backend, _bias(engine)
    if not isinstance(backend, TorchBackend):
        with backend.biased_drafter(bias):
            yield
        return
    weights = backend.weights
    drafter = weights.drafter
    if drafter is not None:
        weights.drafter = _Distorted(drafter, bias)
    try:
        yield
    finally:
        weights.drafter = drafter


def contexts(engine: RolloutEngine, completions: Sequence[Completion], count: int) -> list[list[int]]:
    """Beginnings of `count` of these completions after which a distorted drafter is most wrong, worst first."""
    found = []
    for completion in completions:
        tokens = (completion.prompt_token_ids + completion.token_ids)[:LONGEST_CONTEXT]
        wrong = _disagreement(engine, np.array(tokens)).cumsum(0)
        window = wrong[TOKENS:] - wrong[:-TOKENS]  # over the TOKENS rows after row i
        start = max(0, len(completion.prompt_token_ids) - 2)
        if len(window) > start:
            place = start + int(window[start:].argmax())
            found.append((float(window[place]), tokens[: place + 2]))
        else:
            found.append((0.0, tokens))
    found.sort(key=lambda pair: -pair[0])
    return [tokens for _, tokens in found[:count]]


@torch.inference_mode()
def _disagreement(engine: RolloutEngine, tokens: np.ndarray) -> Tensor:
    """Total variation between the target and itself distorted, after each token: float32 [T]."""
    logits = engine.backend.score(engine.backend.weights.target, tokens)
    other = logits + _bias(engine)[: logits.shape[1]]
    return (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1).cpu() / 2


def distribution(
    engine: RolloutEngine,
    context: list[int],
    params: SamplingParams,
    samples: int,
    *,
    coupled: bool,
    policy: SpeculationPolicy | None = None,
) -> Distribution:
    """Draw `samples` short completions of `context`, drafted for as `policy` says, and test every token of them.

    By default each pass drafts `DRAFT_LENGTH` tokens.
    """
    with mode(engine, policy or Fixed(DRAFT_LENGTH), coupled=coupled):
        drawn = engine.generate(context, params, n=samples)
    outputs = np.array([completion.token_ids for completion in drawn])
    pvalues, freedom = [], 0
    for depth in range(TOKENS):
        beginnings = Counter(map(tuple, outputs[:, :depth].tolist()))
        for beginning, seen in beginnings.most_common(BEGINNINGS):
            if seen < LEAST_SAMPLES:
                break
            rows = (outputs[:, :depth] == np.array(beginning, dtype=outputs.dtype)).all(1)
            probs = _exact(engine, context, list(beginning), params)
            pvalue, degrees = chi_square(np.bincount(outputs[rows, depth], minlength=len(probs)), probs)
            if degrees:
                pvalues.append(pvalue)
                freedom += degrees
    residual = sum(completion.spec.accepted < completion.spec.drafted for completion in drawn)
    return Distribution(tuple(pvalues), freedom, samples, residual)


def _exact(
    engine: RolloutEngine, context: list[int], beginning: list[int], params: SamplingParams
) -> np.ndarray:
    """float64 [V]: the probability of every next token, from a plain pass."""
    backend = engine.backend
    logits = backend.score(backend.weights.target, np.array(context + beginning))[-1]
    processed, _ = reference.process(logits.float().cpu().numpy(), params, context, beginning, ())
    return reference.softmax(processed)
