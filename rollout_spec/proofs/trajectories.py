"""Trajectories with and without speculation, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.engine import RolloutEngine
from rollout_spec.proofs.reforward import recompute


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same requests.

    Attributes:
        sequences: Pairs compared.
        tokens: Tokens compared, up to and with the first that differs in each pair.
        margins: Per pair that parts, by how much the better of the two next tokens beats the other when their
            common beginning is scored in a plain pass; infinite where one run goes on and the other ends.
    """

    sequences: int
    tokens: int
    margins: tuple[float, ...]

    @property
    def diverging(self) -> int:
        """Pairs that part."""
        return len(self.margins)


def compare(
    engine: RolloutEngine,
    plain: Sequence[Completion],
    other: Sequence[Completion],
    params: Sequence[SamplingParams],
) -> Comparison:
    """Where each pair parts, and by what margin. Both runs are of the version in force."""
    tokens, margins = 0, []
    for a, b, p in zip(plain, other, params, strict=True):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.token_ids, b.token_ids)))
        if a.token_ids == b.token_ids:
            tokens += same
            continue
        tokens += same + 1
        if same in (len(a.token_ids), len(b.token_ids)):
            margins.append(math.inf)
        else:
            scores = recompute(engine, a, p)
            ours, theirs = (scores.margin(same, completion.token_ids[same]) for completion in (a, b))
            margins.append(abs(ours - theirs) if math.isfinite(ours + theirs) else math.inf)
    return Comparison(len(plain), tokens, tuple(margins))
