"""What a pass costs: a roofline with host terms, fitted to measured passes.

    t(B, rows, kv) = launch + per_sequence * B + collectives
                   + (read^p + (per_row * rows)^p)^(1/p)             p = 1.5
                   + (stream^p + (per_context * kv / B)^p)^(1/p)     per_context: only if rows > B

    read   = weights + experts * (1 - (1 - expert_share)^rows)
    stream = kv * (per_kv_token + per_kv_row * rows / B)

Each p-norm is the larger of two times that overlap, rounded where they are alike. On the A100 sweep in
`tests/policy/data` the roofline has no sharp ridge: of p = 1, 1.5, 2, 3 and 4, 1.5 predicts unseen passes best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from typing import Any, overload

import numpy as np

from rollout_spec.policy.compiled import pass_seconds
from rollout_spec.policy.records import PassTiming

TARGET = "target"
OVERALL = "overall"  # the key of `held_out_error` for all kinds together

_INLIER = 0.05  # relative error from which on a timing pulls only linearly
_RELUCTANCE = 0.03  # pull towards fewer terms; decides only where the timings do not
_NEGLIGIBLE = 1e-3  # a fitted term that is never a larger part of a pass is left out

# What `fit` determines; of two terms that explain the same, the one of lower rank is kept.
_RANK = {
    "weights": 1.0,
    "launch": 1.2,
    "per_row": 1.5,
    "per_kv_token": 1.5,
    "per_sequence": 2.0,
    "per_kv_row": 2.0,
    "per_context": 2.0,
    "experts": 2.0,
}
_OF_CONTEXT = ("per_kv_token", "per_kv_row", "per_context")


@dataclass(frozen=True)
class PassCost:
    """Cost terms of one kind of pass, all at least 0, in seconds but for the share.

    Attributes:
        launch: Host and launch time of a pass, whatever it computes.
        per_sequence: Host time of each sequence.
        weights: Reading once the weights that every pass reads.
        per_row: Arithmetic of one token row.
        per_kv_token: Reading the keys and values of one context token.
        per_kv_row: Attention arithmetic of one row with one context token.
        per_context: Time per token of the (mean) context below which a pass with several rows per sequence does not
            get: attention kernels for such passes do not split a context over the device, so that at B = 1 one core
            walks all of it.
        experts: Reading once all the routed experts of a mixture.
        expert_share: Routed experts per row over all of them; the rows of a pass touch `1 - (1 - share)^rows` of
            them if they choose independently.
        collectives: Latency of tensor-parallel collectives. `fit` cannot tell it from `launch` and leaves it 0.
    """

    launch: float
    per_sequence: float
    weights: float
    per_row: float
    per_kv_token: float
    per_kv_row: float = 0.0
    per_context: float = 0.0
    experts: float = 0.0
    expert_share: float = 0.0
    collectives: float = 0.0

    @cached_property
    def terms(self) -> tuple[float, ...]:
        """In the order of the attributes."""
        return tuple(map(float, astuple(self)))

    @overload
    def seconds(self, batch: float, rows: float, kv_tokens: float) -> float: ...
    @overload
    def seconds(self, batch: Any, rows: Any, kv_tokens: Any) -> Any: ...
    def seconds(self, batch: Any, rows: Any, kv_tokens: Any) -> Any:
        """Duration of a pass over `rows` token rows of `batch` sequences with `kv_tokens` context tokens in all.

        Numbers, or arrays that broadcast; batch at least 1, rows at least batch. It never falls when rows, context or
        sequences are added (a sequence brings its rows and its context along).
        """
        return pass_seconds(self.terms, batch, rows, kv_tokens)


@dataclass(frozen=True)
class CostModel:
    """Costs of the target's passes and of one step of each drafter, by name."""

    passes: Mapping[str, PassCost]

    @overload
    def target(self, batch: float, rows: float, kv_tokens: float) -> float: ...
    @overload
    def target(self, batch: Any, rows: Any, kv_tokens: Any) -> Any: ...
    def target(self, batch: Any, rows: Any, kv_tokens: Any) -> Any:
        """A plain pass has rows = batch; a verify pass rows = batch + sum of K. Numbers or arrays."""
        return self.passes[TARGET].seconds(batch, rows, kv_tokens)

    @overload
    def draft(self, drafter: str, batch: float, kv_tokens: float) -> float: ...
    @overload
    def draft(self, drafter: str, batch: Any, kv_tokens: Any) -> Any: ...
    def draft(self, drafter: str, batch: Any, kv_tokens: Any) -> Any:
        """One step of `drafter`, one token of each of `batch` sequences. Numbers or arrays."""
        return self.passes[drafter].seconds(batch, batch, kv_tokens)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """As JSON can hold it, without loss."""
        return {"passes": {kind: asdict(cost) for kind, cost in self.passes.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The inverse of `to_dict`.

        Raises:
            ValueError: Unknown, missing, negative or non-finite terms.
        """
        if set(data) != {"passes"}:
            raise ValueError(f"a cost model holds 'passes' alone, not {sorted(data)}; measure again")
        return cls({kind: _checked(kind, terms) for kind, terms in data["passes"].items()})


@dataclass(frozen=True)
class HeldOut:
    """Relative error |predicted / measured - 1| on configurations a fit has not seen.

    Attributes:
        median, p90: Quantiles over configurations.
        configurations: How many distinct (batch, rows, kv_tokens) there were.
    """

    median: float
    p90: float
    configurations: int


def fit(timings: Sequence[PassTiming], expert_share: float = 0.0, kv_share: float | None = None) -> CostModel:
    """The cost model of the measured passes: one `PassCost` per kind, by least squares on log(predicted / measured).

    Repeats of a configuration count as one, by their median, and outliers pull only linearly. Terms cannot be
    negative; of terms that the timings cannot tell apart the simplest explanation is kept and the others are 0, as
    is a term that nothing measured speaks for. So a fit to few timings stays flat where it knows nothing.

    Args:
        timings: Passes of any kinds. To know a term, vary what it multiplies: batch, rows per sequence, context.
        expert_share: Routed experts per row over all of them, from the model's configuration; 0 for dense models.
        kv_share: Bytes of the keys and values of a context token over those of the target's weights, for timings
            in which the context did not vary by itself: reading a token then takes this share of what a pass of the
            target takes without rows or context, in passes of every kind, and no other term counts it. (Few timings do not
            tell reading weights from other constant time, of which it is most.) None: the timings tell.

    Raises:
        ValueError: There are no timings, or one of them is impossible; with `kv_share`, none is of the target.
    """
    points = _configurations(timings)
    if kv_share is None:
        return CostModel({kind: _fit_pass(x, expert_share) for kind, x in points.items()})
    if TARGET not in points:
        raise ValueError(
            f"kv_share={kv_share}: there is no timing of the target's weights to take a share of"
        )
    target = _fit_pass(points[TARGET], expert_share, kv_share)
    known = target.per_kv_token
    others = {kind: _fit_pass(x, expert_share, 0.0, known) for kind, x in points.items() if kind != TARGET}
    return CostModel({TARGET: target} | others)


def held_out_error(
    timings: Sequence[PassTiming], folds: int = 5, seed: int = 0, expert_share: float = 0.0
) -> dict[str, HeldOut]:
    """How well `fit` predicts configurations it has not seen, by kind and `overall`, by cross-validation.

    Configurations are dealt to the folds, with all their repeats.

    Raises:
        ValueError: As `fit`; fewer than two folds, or a kind with fewer than two configurations.
    """
    if folds < 2:
        raise ValueError(f"folds={folds}: cross-validation needs at least 2")
    errors = {}
    for kind, points in _configurations(timings).items():
        if len(points) < 2:
            raise ValueError(f"{kind!r} was timed in one configuration only: time it in at least 2")
        fold = np.random.default_rng(seed).permutation(len(points)) % folds
        predicted = np.empty(len(points))
        for held in range(min(folds, len(points))):
            cost = _fit_pass(points[fold != held], expert_share)
            predicted[fold == held] = cost.seconds(*points[fold == held, :3].T)
        errors[kind] = np.abs(predicted / points[:, 3] - 1)
    errors[OVERALL] = np.concatenate(list(errors.values()))
    return {
        kind: HeldOut(float(np.median(e)), float(np.quantile(e, 0.9)), len(e)) for kind, e in errors.items()
    }


def _configurations(timings: Sequence[PassTiming]) -> dict[str, np.ndarray]:
    """By kind: float64 [N, 4], the distinct (batch, rows, kv_tokens) and the median of their seconds."""
    if not timings:
        raise ValueError("no timings to fit a cost model to: time at least one pass of every kind")
    repeats: dict[str, dict[tuple[int, int, int], list[float]]] = {}
    for x in timings:
        if not (math.isfinite(x.seconds) and x.seconds > 0):
            raise ValueError(
                f"{x}: a pass takes a finite time above 0 s; leave this timing out, or time it again"
            )
        if not 1 <= x.batch <= x.rows or x.kv_tokens < 0:
            raise ValueError(
                f"{x}: batch is at least 1, rows at least batch, kv_tokens at least 0; correct it"
            )
        repeats.setdefault(x.kind, {}).setdefault((x.batch, x.rows, x.kv_tokens), []).append(x.seconds)
    return {
        kind: np.array([(*where, np.median(seconds)) for where, seconds in found.items()], np.float64)
        for kind, found in repeats.items()
    }


def _fit_pass(
    points: np.ndarray, expert_share: float, kv_share: float | None = None, per_kv_token: float = 0.0
) -> PassCost:
    """The cost of one kind of pass from its configurations [N, 4].

    With `kv_share` a context token costs this share of the constant time, and `per_kv_token`, nothing more.
    """
    from scipy.optimize import least_squares

    where, seconds = points[:, :3].T, points[:, 3]
    nothing = PassCost(0.0, 0.0, 0.0, 0.0, 0.0, expert_share=expert_share)
    # What one second of a term adds to each pass, [N] each; terms that never count are left out.
    unit = {term: replace(nothing, **{term: 1.0}).seconds(*where) for term in _RANK}
    fixed = () if kv_share is None else _OF_CONTEXT
    terms = [term for term in _RANK if unit[term].any() and term not in fixed]
    scale = np.array([np.median(seconds) / unit[term].max() for term in terms])
    rank = np.array([_RANK[term] for term in terms])

    def cost(share: np.ndarray) -> PassCost:
        found = replace(nothing, **dict(zip(terms, (share * scale).tolist(), strict=True)))
        if kv_share is None:
            return found
        return replace(found, per_kv_token=per_kv_token + kv_share * (found.launch + found.weights))

    def residuals(share: np.ndarray) -> np.ndarray:
        errors = np.log(cost(share).seconds(*where) / seconds)
        return np.append(errors, _RELUCTANCE * (rank @ share))

    start = np.full(len(terms), 1 / len(terms))
    found = least_squares(
        residuals, start, bounds=(0, np.inf), loss="soft_l1", f_scale=_INLIER, ftol=1e-6, xtol=1e-6
    )
    largest = np.array([(unit[term] / seconds).max() for term in terms]) * found.x * scale
    return cost(np.where(largest < _NEGLIGIBLE, 0.0, found.x))


def _checked(kind: str, terms: Mapping[str, float]) -> PassCost:
    known = {field.name for field in fields(PassCost)}
    if set(terms) != known:
        wrong = sorted(set(terms) ^ known)
        raise ValueError(f"cost of {kind!r}: unknown or missing terms {wrong}; the terms are {sorted(known)}")
    bad = {term: x for term, x in terms.items() if not (math.isfinite(x) and x >= 0)}
    if bad:
        raise ValueError(f"cost of {kind!r}: terms are finite and at least 0, not {bad}; measure again")
    return PassCost(**terms)
