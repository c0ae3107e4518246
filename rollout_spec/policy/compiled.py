"""The policy's inner loops, compiled: it decides before every pass, and a pass on a GPU takes a few milliseconds.

Numba compiles each at its first use, for a second, and keeps the code on disk. They are in one file because what is kept is
made anew when its own file changes, not when another does that it calls. Arrays are per sequence [B] unless a shape is
given; L stands for the draft lengths considered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numba import njit

P_NORM = 1.5  # see `cost_model`
MOST = 0.999  # nothing is certain
_LEAST = 1e-12  # nor impossible
_POINTS = 24  # of an integral about a limit

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Compile a function of numbers and arrays. What divides by zero in it is infinite or NaN, as in NumPy."""
    try:
        return cast(_Function, njit(cache=True, error_model="numpy")(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written: every process compiles anew.
        return cast(_Function, njit(error_model="numpy")(function))


# What one kind of pass costs now, float64 [10 + 20]: `PassCost.terms`, then corrections of what they say, by bit length of
# the rows. One array: compiled code takes tuples of numbers in one by one, which takes longer than to reckon with them.
Prices: TypeAlias = np.ndarray
_TERMS, _BITS = 10, 20


def uncorrected(terms: Sequence[float]) -> Prices:
    """Of `PassCost.terms`, nothing corrected."""
    return np.concatenate((terms, np.ones(_BITS)))


def corrections(prices: Prices) -> np.ndarray:
    """Those of prices, a view, float64 [20]."""
    return prices[_TERMS:]


def pass_seconds(terms: Any, batch: Any, rows: Any, kv_tokens: Any) -> Any:
    """`PassCost.seconds` of `PassCost.terms`, numbers or arrays; `cost_model` explains it."""
    launch, sequence, weights, row = terms[0], terms[1], terms[2], terms[3]
    kv_token, kv_row, kv_walk = terms[4], terms[5], terms[6]
    experts, share, collectives = terms[7], terms[8], terms[9]
    read = weights + experts * (1.0 - (1.0 - share) ** rows)
    context = kv_tokens / batch
    stream = kv_tokens * kv_token + context * rows * kv_row
    walk = context * kv_walk * (rows > batch)
    linears = (read**P_NORM + (row * rows) ** P_NORM) ** (1 / P_NORM)
    attention = (stream**P_NORM + walk**P_NORM) ** (1 / P_NORM)
    return launch + collectives + sequence * batch + linears + attention


_pass_seconds = compiled(pass_seconds)


@compiled
def seconds(prices: Prices, batch: int, rows: int, kv_tokens: int) -> float:
    """Duration of a pass, corrected; compiled code does not check indices, so more rows count as the most there are."""
    bits = 0
    while rows >> bits and bits < _BITS - 1:
        bits += 1
    corrected: float = _pass_seconds(prices, batch, rows, kv_tokens) * prices[_TERMS + bits]
    return corrected


@compiled
def catching_up(drafter: Prices, batch: int, rows: int) -> float:
    """Seconds that a drafter's first step takes longer because it reads `rows` tokens of history too."""
    more: float = _pass_seconds(drafter, batch, batch + rows, 0)
    alone: float = _pass_seconds(drafter, batch, batch, 0)
    return more - alone


@compiled
def row_seconds(target: Prices, batch: int, fewer: int, more: int, context: int) -> float:
    """What one more row of a verify pass costs between two numbers of rows; at least 0, whatever measured passes say."""
    saved = seconds(target, batch, more, context) - seconds(target, batch, fewer, context)
    return max(saved / (more - fewer), 0.0)


@compiled
def survey(
    slots: np.ndarray,
    slots_before: np.ndarray,
    allowed: np.ndarray,
    lengths: np.ndarray,
    matched: np.ndarray | None,
    longest: int,
) -> tuple[np.ndarray, np.ndarray, bool, int, bool, bool]:
    """What a policy asks of a `StepState` first, in one go.

    Returns:
        Draft tokens for which there is room, int64, at most `longest`; of these, what history has, int64; whether there
        is room anywhere; context tokens of all sequences together; whether history has any; whether the
        sequences are those of before.
    """
    room, found = np.empty(len(slots), np.int64), np.zeros(len(slots), np.int64)
    fits, context = False, 0
    proposed, same = False, len(slots) == len(slots_before)
    for i in range(len(slots)):
        room[i] = min(allowed[i] - 1, longest)
        fits |= room[i] > 0
        context += lengths[i]
        if matched is not None:
            found[i] = min(matched[i], room[i])
            proposed |= found[i] > 0
        same = same and slots[i] == slots_before[i]
    return room, found, fits, context, proposed, same


@compiled
def survival(
    request: np.ndarray, slots: np.ndarray, rejection: np.ndarray, expected: float, prior: float
) -> np.ndarray:
    """P(draft tokens 1..j of a sequence are all accepted), float64 [B, L], falling in j.

    It is the drafter's hazard at every position, times how much worse it does for a sequence.

    Args:
        request: Tokens tried and accepted by slot, float64 [slots, 2]; of slots beyond, none.
        slots: Of the sequences, int64.
        rejection: P(token j is rejected | those before it were not) of the drafter, float64 [L].
        expected: Its mean.
        prior: Tokens after which a sequence's own record weighs as much as the drafter's.
    """
    alive = np.empty((len(slots), len(rejection)))
    times, reached = np.empty(len(slots)), np.ones(len(slots))
    for i, slot in enumerate(slots):
        known = slot < len(request)
        tried, accepted = (request[slot, 0], request[slot, 1]) if known else (0.0, 0.0)
        times[i] = (tried - accepted + prior * expected) / (tried + prior) / expected
    for j in range(len(rejection)):
        for i in range(len(slots)):  # inside, so that no product waits for the one before
            reached[i] *= max(min(1.0 - times[i] * rejection[j], MOST), 0.0)
            alive[i, j] = reached[i]
    return alive


@compiled
def powers(confidence: np.ndarray, limit: np.ndarray, longest: int) -> np.ndarray:
    """The same where each token is accepted with one probability, float64 [B, `longest`]; 0 behind `limit` tokens, int64."""
    alive = np.zeros((len(confidence), longest))
    for i in range(len(confidence)):
        reached = 1.0
        for j in range(limit[i]):
            reached *= min(confidence[i], MOST)
            alive[i, j] = reached
    return alive


@compiled
def put_behind(alive: np.ndarray, confidence: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Put `before` tokens of that confidence ahead of those of `alive` [B, L], in place; tokens expected of them, float64."""
    certain = np.zeros(len(before))
    for i in range(len(before)):
        reached = 1.0
        for _ in range(before[i]):
            reached *= min(confidence[i], MOST)
            certain[i] += reached
        alive[i] *= reached
    return certain


@compiled
def deepest(
    alive: np.ndarray,
    before: np.ndarray,
    certain: np.ndarray,
    room: np.ndarray,
    weights: np.ndarray,
    target: Prices,
    drafter: Prices | None,
    context: int,
    ahead: float,
    plain_seconds: float,
    gain_now: float,
    ragged: bool,
) -> tuple[np.ndarray, int, float, float]:
    """The draft lengths of the largest gain, at least one token somewhere.

    A token is on offer if it is worth what it costs by itself, at the gain of what runs now (Dinkelbach's iteration for
    a ratio, one round per pass); of these, the depth is taken that makes the gain largest.

    Args:
        alive: P(tokens 1..j accepted), float64 [B, L], falling in j; set to 0 for what is not on offer.
        before: Tokens drafted ahead of these, int64.
        certain: Tokens expected of those, float64.
        room: Most tokens of each sequence, those included, int64.
        weights: What a token of it is worth, float64.
        target: Of verify passes.
        drafter: Of a draft step, or None where drafting is free.
        context: Context tokens of all sequences together.
        ahead: Seconds spent before the first draft step.
        plain_seconds: Of a plain pass.
        gain_now: Speed over plain decoding of what runs.
        ragged: Whether K may differ between sequences.

    Returns:
        Draft lengths, those `before` included, int64; the depth to stop at; its gain; the seconds of that pass.
    """
    batch, longest = alive.shape
    history, limit, worth = before.sum(), room - before, 1.0
    for i in range(batch):
        worth += weights[i] * certain[i]
    if drafter is not None and history:
        ahead += catching_up(drafter, batch, history)
    price = -1.0  # of one more token of one sequence, in what a token of weight 1 is worth
    if ragged and batch > 1:
        row = row_seconds(target, batch, 2 * batch, 4 * batch, context)
        if drafter is not None:
            half = max(batch // 2, 1)
            fewer = seconds(drafter, half, half, context * half // batch)
            row += (seconds(drafter, batch, batch, context) - fewer) / max(batch - half, 1)
        # Never below 0, though measured passes may say so: what is not on offer must not look worth it.
        price = max(row, 0.0) * gain_now / plain_seconds
        if not np.any((limit > 0) & (alive[:, 0] * weights > price)):
            price = -1.0  # if no first token is worth it, those behind are not either

    offered = np.zeros(batch, np.int64)
    values, active = np.zeros(longest), np.zeros(longest, np.int64)
    for i in range(batch):
        count = 0
        while count < limit[i] and alive[i, count] * weights[i] > price:
            values[count] += weights[i] * alive[i, count]
            active[count] += 1
            count += 1
        offered[i] = count
        alive[i, count:] = 0.0

    depth, gain, duration = 0, 0.0, math.inf
    rows, step, stepped = batch + history, 0.0, 0  # `step`: seconds of one of `stepped` sequences
    for j in range(longest):
        count = active[j]
        if count == 0:
            break
        worth += values[j]
        rows += count
        if drafter is not None and count != stepped:
            step, stepped = seconds(drafter, count, count, context * count // batch), count
        ahead += step
        taken = ahead + seconds(target, batch, rows, context)
        if worth * plain_seconds / taken > gain:
            depth, gain, duration = j + 1, worth * plain_seconds / taken, taken
        elif j > depth:
            break
    return before + np.minimum(offered, depth), depth, gain, duration


@compiled
def further(
    lengths: np.ndarray,
    before: np.ndarray,
    room: np.ndarray,
    alive: np.ndarray,
    confidence: np.ndarray | None,
    factor: int,
    target: Prices,
    context: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Draft lengths whose part behind history has grown by a factor, as far as there is room.

    Args:
        lengths: Draft tokens, int64.
        before: Of these, history's, int64.
        room: Most draft tokens, int64.
        alive: P(tokens 1..j behind history accepted), float64 [B, L], see `deepest`.
        confidence: In each of history's, float64.
        factor: At least 1.
        target: Of verify passes.
        context: Context tokens of all sequences together.

    Returns:
        Those draft lengths, int64; their part behind history, int64; P(all of history's are accepted), float64; P(the
        first behind them is | they are), float64, 0 where none is drafted; what a row costs up to `lengths`, and beyond.
    """
    reached, first, own = np.ones(len(lengths)), np.zeros(len(lengths)), lengths - before
    for i in range(len(own)):
        if confidence is not None:
            for _ in range(before[i]):
                reached[i] *= min(confidence[i], MOST)
        if own[i] > 0:
            own[i] = min(factor * own[i], room[i] - before[i])
            first[i] = alive[i, 0] / reached[i]
    longer, batch = before + own, len(lengths)
    least, planned, most = batch + before.sum(), batch + lengths.sum(), batch + longer.sum()
    near = row_seconds(target, batch, least, max(planned, least + 1), context)
    far = row_seconds(target, batch, planned, max(most, planned + 1), context)
    return longer, own, reached, first, near, far


@compiled
def _up_to(rising: np.ndarray, value: float, known: int) -> int:
    """How many are at most `value`, as at least `known` are."""
    low, high = known, len(rising)
    while low < high:
        middle = (low + high) >> 1
        if rising[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _outlasting(
    finished: np.ndarray,
    output: int,
    tokens: np.ndarray,
    reach: float,
    shortest: float,
    unseen: float,
    alive: np.ndarray,
) -> None:
    """`outlasting` of one sequence that nothing limits, into `alive` [X]; 0 from `reach` tokens on."""
    passed = _up_to(finished, output, 0)
    share, scale = 1.0 / (len(finished) - passed + unseen), max(output, shortest)
    alive[:] = 0.0
    for j in range(len(tokens)):
        if tokens[j] >= reach:
            break
        passed = _up_to(finished, output + tokens[j], passed)
        alive[j] = (len(finished) - passed + unseen * scale / (scale + tokens[j])) * share


@compiled
def _within(allowed: int, width: float, tokens: float) -> float:
    """P(a limit is beyond so many tokens) if it lies evenly within `width` of `allowed`."""
    return min(max((allowed + width - tokens) * 0.5 / width, 0.0), 1.0)


@compiled
def outlasting(
    finished: np.ndarray,
    outputs: np.ndarray,
    allowed: np.ndarray,
    tokens: np.ndarray,
    blur: float,
    shortest: float,
    unseen: float,
) -> np.ndarray:
    """P(more than x tokens are still to come) for x in `tokens` [X], float64 [B, X]; see `RemainingLength`.

    Args:
        finished: Lengths seen, rising, float64.
        outputs: Tokens so far, int64.
        allowed: Tokens that may still come, int64.
        tokens: Rising, float64 [X].
        blur: It falls to 0 within this part of `allowed` about it.
        shortest: Least scale of the prior, in tokens.
        unseen: Weight of the prior, in lengths.
    """
    alive = np.empty((len(outputs), len(tokens)))
    for i in range(len(outputs)):
        width = blur * allowed[i]
        _outlasting(finished, outputs[i], tokens, allowed[i] + width, shortest, unseen, alive[i])
        for j in range(len(tokens)):
            alive[i, j] *= _within(allowed[i], width, tokens[j])
    return alive


@compiled
def ending_last(alive: np.ndarray) -> np.ndarray:
    """P(a sequence ends last of all), float64 [B], sums to 1: that the others are done when it ends.

    `alive` [B, X]: P(it runs on past each of X points), falling.
    """
    batch, points = alive.shape
    last, done = np.full(batch, _LEAST), np.empty(batch)
    for x in range(points - 1):
        if not alive[:, x].any():
            break
        all_done = 1.0
        for i in range(batch):
            done[i] = max(1.0 - 0.5 * (alive[i, x] + alive[i, x + 1]), _LEAST)
            all_done *= done[i]
        if all_done < _LEAST**3:
            continue  # not even all others are done here
        for i in range(batch):
            last[i] += (alive[i, x] - alive[i, x + 1]) * all_done / done[i]
    return last / last.sum()


@compiled
def delayed(
    finished: np.ndarray,
    outputs: np.ndarray,
    allowed: np.ndarray,
    grid: np.ndarray,
    sharp: float,
    blurred: float,
    shortest: float,
    unseen: float,
) -> float:
    """By how many tokens the last of all ends later if limits lie within `blurred` tokens of `allowed`, not `sharp`.

    E max(R) is the integral of 1 - P(R_1 <= x) ... P(R_B <= x); the trapezoidal rule over `grid` and, about the furthest limit,
    over points as close as `blurred` asks. The wider of the two is `blurred`. Else see `outlasting`.
    """
    top = allowed.max()
    edge = max(top - blurred, 0.0)
    tokens = np.concatenate((grid[: np.searchsorted(grid, edge)], np.linspace(edge, top + blurred, _POINTS)))
    alive, done, done_later = np.empty(len(tokens)), np.ones(len(tokens)), np.ones(len(tokens))
    for i in range(len(outputs)):
        narrow, wide = min(allowed[i], sharp), min(allowed[i], blurred)
        _outlasting(finished, outputs[i], tokens, allowed[i] + wide, shortest, unseen, alive)
        for x in range(len(tokens)):
            done[x] *= 1.0 - alive[x] * _within(allowed[i], narrow, tokens[x])
            done_later[x] *= 1.0 - alive[x] * _within(allowed[i], wide, tokens[x])
    waiting = done - done_later
    later = 0.0
    for x in range(1, len(tokens)):
        later += 0.5 * (waiting[x - 1] + waiting[x]) * (tokens[x] - tokens[x - 1])
    return later


@compiled
def spread(alive: np.ndarray, depth: int, certain: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the tokens of a sequence, over sequences and passes; the target's own included.

    Args:
        alive: P(tokens 1..j accepted), float64 [B, L], falling in j; 0 for those not drafted.
        depth: How many of each are drafted at most.
        certain: Tokens expected ahead of these; they add nothing to the variance, float64 [B].
    """
    mean = square = 0.0
    for i in range(len(alive)):
        for j in range(depth):
            mean += alive[i, j]
            square += (2 * j + 1) * alive[i, j]
    mean /= len(alive)
    return 1.0 + certain.mean() + mean, max(square / len(alive) - mean * mean, 0.0)


@compiled
def gain_alone(
    acceptance: float, longest: int, target: Prices, plain: float, drafter: Prices, context: int
) -> float:
    """Largest gain of a single sequence whose draft tokens are all accepted with one probability; at least 1."""
    best, tau, alive = 1.0, 1.0, 1.0
    step = seconds(drafter, 1, 1, context)
    for depth in range(1, longest + 1):
        alive *= acceptance
        tau += alive
        best = max(best, tau * plain / (depth * step + seconds(target, 1, depth + 1, context)))
    return best
