"""What a drafter is trained for, each formula once, per position.

p is the target's distribution and q the drafter's. Where the drafter's vocabulary leaves tokens out, q is 0 on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.drafters.eagle_spec import Kind


def log_distribution(logits: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p float32 [N, V] and its part [N, V_d] on the drafter's `tokens` int64 [V_d] (None: all)."""
    log_p = logits.float().log_softmax(-1)
    return log_p, log_p if tokens is None else log_p[:, tokens]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the drafter's vocabulary, [N], of log p and log q [N, V_d].

    Its gradient is that of the soft cross-entropy -sum p log q, from which it differs by the target's entropy; over a
    reduced vocabulary it is least where q is p, rescaled to sum to 1.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 - sum min(p, q), [N]: the probability that rejection sampling refuses the draft (Leviathan et al. 2023)."""
    return 1.0 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def feature_regression(states: Tensor, features: Tensor) -> Tensor:
    """Smooth L1 distance of states to features, both [N, H], averaged over H: [N] (EAGLE, arXiv 2401.15077)."""
    return F.smooth_l1_loss(states, features.to(states.dtype), reduction="none").mean(-1)


def coupled_acceptance(log_p: Tensor, log_q: Tensor, chosen: Tensor) -> Tensor:
    """Probability that q, under the Gumbel noise that made p choose `chosen` int64 [N], chooses it as well; [N].

    With shared noise both choose x with probability 1 / sum_y max(p_y / p_x, q_y / q_x) (Daliri et al. 2024); this is
    that divided by p_x. log p and log q are [N, V]; -inf where a token cannot be drawn.
    """
    at = chosen[:, None]
    ratios = torch.maximum(log_p - log_p.gather(1, at), log_q - log_q.gather(1, at))
    both = -ratios.logsumexp(-1)
    return (both - log_p.gather(1, at)[:, 0]).exp().nan_to_num(0.0).clamp(max=1.0)


@dataclass(frozen=True)
class Objective:
    """Weights of the losses; the sum is averaged over positions.

    EAGLE's own is `Objective(feature=1.0, kl=0.1)`. `tv` is one minus the acceptance itself; from scratch it learns
    slowly alone, since its gradient vanishes where p and q hardly overlap.
    """

    feature: float = 0.0
    kl: float = 1.0
    tv: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise invalid(f"objective.{name}", value, "use a number >= 0")
        if not self.feature + self.kl + self.tv > 0:
            raise invalid("objective", vars(self), "at least one weight must be positive")

    def check(self, kind: Kind) -> None:
        """Refuse a feature loss where the drafter's states are not meant to be features."""
        if self.feature and kind == "eagle3":
            raise invalid(
                "objective.feature", self.feature, "kind 'eagle3' predicts no features; use kl or tv"
            )

    def __call__(self, log_p: Tensor, log_q: Tensor, states: Tensor, features: Tensor) -> Tensor:
        """[N]: of log p, log q [N, V_d], the states [N, H] and the features [N, H] that they should be."""
        terms = [
            weight * loss(*arguments)
            for weight, loss, arguments in (
                (self.feature, feature_regression, (states, features)),
                (self.kl, kl, (log_p, log_q)),
                (self.tv, tv, (log_p, log_q)),
            )
            if weight
        ]
        return torch.stack(terms).sum(0)


EAGLE_TV = Objective(feature=10.0, kl=0.1, tv=1.0)
"""Acceptance itself, while states stay such that the drafter can read them in place of features, without many steps of unrolling."""
