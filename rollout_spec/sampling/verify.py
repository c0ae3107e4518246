"""The two verifiers, and the draws their drafters make.

`coupled`: every position's token is the target's own choice under noise fixed by the row's key, so what is
emitted does not depend on the drafter at all; a draft token is accepted iff it is that choice (Daliri et al.
2024). The choice is an exponential race in two levels, among V/16 groups and then among the 16 tokens of the
winner, which needs a sixteenth of the noise. `rejection`: accept draft x with probability min(1, p(x)/q(x)), else draw from
norm(max(p - q, 0)); a bonus token from p when all are accepted (Leviathan et al. 2023, Chen et al. 2023).

p and q are processed distributions; plain decoding is either verifier with one row and no drafts. Whatever a
drafter returns (NaN, infinities, token ids out of range), it cannot change what may be emitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rollout_spec.kernels.library import kernels
from rollout_spec.sampling.noise import Stream, exponential, uniform

_MEMBERS = 16  # tokens of a group in coupled sampling; token x is member x // (V/16) of group x % (V/16)
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


class Verdict(NamedTuple):
    """tokens int64 [B, S]: the first emitted[b] of row b are emitted, the rest is meaningless but in range.
    emitted and accepted, int64 [B]: emitted = accepted + 1."""

    tokens: Tensor
    emitted: Tensor
    accepted: Tensor


class Ragged(NamedTuple):
    """Which cells of a [B, S] grid are rows of a ragged pass.

    Attributes:
        cells: int64 [R], flat index of every row in the grid, rising.
        place: int64 [B, S], the row of every cell; 0 for cells that are none.
    """

    cells: Tensor
    place: Tensor

    def rows(self, grid: Tensor) -> Tensor:
        """The rows' entries of a grid [B, S]: [R, 1]."""
        return grid.flatten()[self.cells].unsqueeze(1)

    def grid(self, rows: Tensor) -> Tensor:
        """Rows [.., R, 1] put in the grid [.., B, S], with anything in cells that are no rows."""
        return rows.squeeze(-1)[..., self.place]


def verify_coupled(
    target_logits: Tensor,
    drafts: Tensor | None,
    draft_lengths: Tensor | None,
    keys: Tensor | None,
    ragged: Ragged | None = None,
) -> Verdict:
    """Emit the target's own choices up to the first that differs from the draft.

    Args:
        target_logits: float32 [B, S, V], processed; S = K + 1.
        drafts: int64 [B, K], or None when S = 1.
        draft_lengths: int64 [B] in [0, K], or None when all K count.
        keys: int64 [B, S] from `noise.row_keys`, or None when every row is greedy and needs no noise.
        ragged: Given if the logits are those of the rows only: float32 [R, 1, V].
    """
    if ragged is None:
        tokens = _choose(target_logits, keys)
    else:
        tokens = ragged.grid(_choose(target_logits, None if keys is None else ragged.rows(keys)))
    if drafts is None:
        accepted = torch.zeros_like(tokens[:, 0])
    else:
        accepted = _leading_run((tokens[:, : drafts.shape[1]] == drafts) & _is_drafted(drafts, draft_lengths))
    return Verdict(tokens, accepted + 1, accepted)


def draft_coupled(q_logits: Tensor, keys: Tensor | None) -> Tensor:
    """The drafter's guess at the target's choice: its own logits, the same noise.

    Args:
        q_logits: float32 [B, S, V], processed; S = 1 in a draft step.
        keys: int64 [B, S], those the target will use for these positions; None when every row is greedy.

    Returns:
        int64 [B, S].
    """
    return _choose(q_logits, keys)


def lead_coupled(q_logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """`draft_coupled`, and how narrowly the drafter chose.

    Returns:
        Drafts int64 [B, S], and by how much each led in the score that decides (`coupled_scores`), float32 [B, S], nats.
    """
    drafts, leads = zip(*(_led_race(*block) for block in _blocks(q_logits, keys)))
    return torch.cat(drafts).view(keys.shape), torch.cat(leads).view(keys.shape)


def lead_rejection(q_logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """`draft_rejection`, and how sure the drafter was: the log odds of what it drew, at least 0, float32 [B, S]."""
    drafts = draft_rejection(q_logits, keys)
    log_q = q_logits.gather(-1, drafts[..., None]).squeeze(-1) - q_logits.logsumexp(-1)
    return drafts, (log_q - (-log_q.expm1()).log()).clamp_min(0)


def _choose(logits: Tensor, keys: Tensor | None) -> Tensor:
    return logits.argmax(-1) if keys is None else _by_rows(_race, logits, keys)


def _race(logits: Tensor, keys: Tensor) -> Tensor:
    """The coupled choice per row: logits float32 [R, V], keys int64 [R]; returns int64 [R].

    argmax p / E with E ~ Exp(1) is argmax(log p + gumbel) without rounding at the logits' scale.
    """
    p, noise = _race_inputs(logits, keys)
    own = kernels() if p.is_cpu else None
    return own.race(p, noise)[0] if own is not None else _race_winner(*_race_terms(p, noise))[0]


def _led_race(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the lead of its winner [R]: over the next group, or over the next member of its own."""
    p, noise = _race_inputs(logits, keys)
    own = kernels() if p.is_cpu else None
    if own is not None:
        chosen, ratio = own.race(p, noise)
        return chosen, ratio.log_()
    terms, groups, members = _race_terms(p, noise)
    chosen, inside = _race_winner(terms, groups, members)
    best, second = groups.topk(2, -1).values, inside.topk(2, -1).values
    return chosen, torch.minimum(best[:, 0] / best[:, 1], second[:, 0] / second[:, 1]).log()


def _race_winner(p: Tensor, groups: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The winner int64 [R], and the scores [R, 16] in the race inside its group."""
    group = groups.argmax(-1, keepdim=True)
    inside = p.gather(2, group[:, None].expand(-1, _MEMBERS, 1)).squeeze(2)
    member = inside.div_(members).argmax(-1, keepdim=True)
    return (member * groups.shape[1] + group).squeeze(-1), inside


def _race_inputs(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """p [R, V], and noise [R, >= V/16 + 16]: the groups' first, the members' last."""
    needed = logits.shape[-1] // _MEMBERS + _MEMBERS
    return logits.softmax(-1), exponential(keys, -(-needed // 64) * 64, Stream.TARGET)


def _race_terms(p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p [R, 16, V/16] by member and group, the groups' race P/E [R, V/16], and the members' E [R, 16].

    The sum over members is a fixed tree of elementwise additions: a row does not depend on the others.
    """
    p = p.unflatten(-1, (_MEMBERS, -1))
    mass = p
    while mass.shape[1] > 1:
        mass = mass[:, ::2] + mass[:, 1::2]
    return p, mass.squeeze(1).div_(noise[:, : p.shape[2]]), noise[:, -_MEMBERS:]


def coupled_scores(target_logits: Tensor, keys: Tensor) -> Tensor:
    """Scores whose largest is the coupled choice, to see how narrowly it was made.

    A token's score is that of its group, log P + gumbel, minus what the token lacks to the best of the group.

    Args:
        target_logits: float32 [R, V], processed.
        keys: int64 [R].

    Returns:
        float32 [R, V], natural log.
    """
    p, groups, members = _race_terms(*_race_inputs(target_logits, keys))
    inside = (p / members.unsqueeze(-1)).log_()
    lacking = (inside.amax(1, keepdim=True) - inside).nan_to_num_(nan=math.inf, posinf=math.inf)
    return (groups.log().unsqueeze(1) - lacking).flatten(1)


def _by_rows(draw: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
    """draw(x [R, V], noise [R]) over a few rows of x [B, S, V] and noise [B, S] at a time.

    Scratch memory then stays in cache on CPU and bounded on CUDA.
    """
    return torch.cat([draw(*block) for block in _blocks(x, noise)]).view(noise.shape)


def _blocks(x: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, _BLOCK_ELEMENTS[x.device.type] // x.shape[-1])
    return zip(rows.split(step), noise.reshape(-1).split(step))


def verify_rejection(
    target_logits: Tensor,
    drafts: Tensor | None,
    draft_lengths: Tensor | None,
    q_logits: Tensor | None,
    keys: Tensor,
    ragged: Ragged | None = None,
    q_place: Tensor | None = None,
) -> Verdict:
    """Accept drafts by min(1, p/q); draw the next token from the residual, or from p after the last draft.

    A draft counts as not proposed, and those after it, where q is not a distribution (NaN or infinite
    logsumexp), where q gives the draft no probability, or where its id is out of range: the row is then drawn
    from p.

    Args:
        target_logits: float32 [B, S, V], processed; S = K + 1.
        drafts: int64 [B, K], or None when S = 1.
        draft_lengths: int64 [B] in [0, K], or None when all K count; row draft_lengths[b] is the bonus row of b.
        q_logits: float32 [B, K, V], the processed logits the drafts were drawn from; None when each draft was
            the proposal's only choice.
        keys: int64 [B, S].
        ragged: Given if `target_logits` are those of the rows only: float32 [R, 1, V].
        q_place: Given if `q_logits` are float32 [Q, V]: for every draft its row there, int64 [B, K], or -1 where
            the draft was the proposal's only choice.
    """
    p_rows = target_logits.flatten(0, 1)
    if drafts is None or drafts.shape[1] == 0:
        tokens = _draw(p_rows[:, None], uniform(keys[:, :1], Stream.RESIDUAL))
        accepted = torch.zeros_like(tokens[:, 0])
        return Verdict(tokens, accepted + 1, accepted)
    (batch, k), vocab_size = drafts.shape, target_logits.shape[-1]
    place = _consecutive(batch, k + 1, drafts) if ragged is None else ragged.place
    if q_logits is not None and q_place is None:
        q_logits, q_place = q_logits.flatten(0, 1), _consecutive(batch, k, drafts)
    proposed = _is_drafted(drafts, draft_lengths) & (drafts >= 0) & (drafts < vocab_size)
    index = drafts.clamp(0, vocab_size - 1)
    log_ratio = _log_prob(p_rows, place[:, :k], index)
    if q_logits is not None:
        assert q_place is not None
        log_q = torch.where(q_place < 0, 0.0, _log_prob(q_logits, q_place.clamp_min(0), index))
        proposed = proposed & log_q.isfinite()
        log_ratio = log_ratio - log_q
    lengths = _leading_run(proposed)
    accept = uniform(keys[:, :k], Stream.ACCEPT).log() < log_ratio
    accepted = torch.minimum(_leading_run(accept), lengths)

    p = p_rows[_at(place, accepted)].softmax(-1)
    last = accepted.clamp_max(k - 1)
    q = torch.zeros_like(p).scatter_(-1, _at(index, last).unsqueeze(1), 1.0)
    if q_logits is not None:
        assert q_place is not None
        row = _at(q_place, last)
        q = torch.where(row.unsqueeze(1) < 0, q, q_logits[row.clamp_min(0)].softmax(-1))
    residual = (p - q).clamp_min_(0.0)
    use_residual = (accepted < lengths)[:, None] & (residual.sum(-1, keepdim=True) > 0)
    weights = torch.where(use_residual, residual, p)
    key = _at(keys, accepted).unsqueeze(1)
    following = draw_from(weights, uniform(key, Stream.RESIDUAL).squeeze(1)).unsqueeze(1)

    tokens = torch.cat([index, following], 1)
    tokens.scatter_(1, accepted.unsqueeze(1), following)
    return Verdict(tokens, accepted + 1, accepted)


def draft_rejection(q_logits: Tensor, keys: Tensor) -> Tensor:
    """Draw drafts from q, with noise of their own.

    Args:
        q_logits: float32 [B, S, V], processed; S = 1 in a draft step.
        keys: int64 [B, S], of the positions being drafted.

    Returns:
        int64 [B, S]; 0 where q is not a distribution.
    """
    return _draw(q_logits, uniform(keys, Stream.DRAFT))


def _is_drafted(drafts: Tensor, draft_lengths: Tensor | None) -> Tensor:
    if draft_lengths is None:
        return torch.ones_like(drafts, dtype=torch.bool)
    return torch.arange(drafts.shape[1], device=drafts.device) < draft_lengths.unsqueeze(1)


def _leading_run(flags: Tensor) -> Tensor:
    """Number of leading true entries per row: bool [B, K] to int64 [B]."""
    return flags.to(torch.int64).cumprod(1).sum(1)


def _consecutive(batch: int, width: int, like: Tensor) -> Tensor:
    return torch.arange(batch * width, device=like.device).view(batch, width)


def _log_prob(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens [B, K] in the given rows [B, K] of logits [R, V]."""
    return logits[rows, tokens] - logits.logsumexp(-1)[rows]


def _at(x: Tensor, column: Tensor) -> Tensor:
    """x[b, column[b]] for x [B, S]: [B]."""
    return x.gather(1, column.unsqueeze(1)).squeeze(1)


def draw_from(weights: Tensor, u: Tensor) -> Tensor:
    """Token i of a row with probability weights[i] / sum, int64 [R], by inverting the distribution function in float64.

    Args:
        weights: float32 [R, V], at least 0.
        u: float64 [R], uniform in [0, 1).

    A token of weight zero is never returned: where rounding would pick one (a parallel scan need not be monotone), the
    heaviest is.
    """
    return _by_rows(_invert, weights, u)


def _draw(logits: Tensor, u: Tensor) -> Tensor:
    return _by_rows(lambda rows, u_rows: _invert(rows.softmax(-1), u_rows), logits, u)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    cdf = weights.cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, u.unsqueeze(-1) * cdf[:, -1:], right=True).clamp_max_(
        weights.shape[-1] - 1
    )
    picked = weights.gather(-1, token) > 0
    if picked.is_cpu and picked.all():
        return token.squeeze(-1)
    return torch.where(picked, token, weights.argmax(-1, keepdim=True)).squeeze(-1)
