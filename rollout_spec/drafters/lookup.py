"""History's inner loops, compiled: it is asked before a pass and told after it, and a pass may take a few milliseconds.

`texts.Texts` describes `tokens` and `numbers`. Arrays are per sequence [B] unless a shape is given; N stands for tokens, O for
the lengths of n-grams looked up.
"""

from __future__ import annotations

import numpy as np

from rollout_spec.policy.compiled import compiled

# All that loops are compiled with is in this file: kept code is made anew when its own file changes, not another.
START, LENGTH, ROOM, SALT, SOURCE, SLOT = range(6)  # columns of `Texts.numbers`
OWN, SIBLINGS, EPOCHS = range(3)  # whose text it is
_PLACE_BITS = 24  # a place is text << 24 | position; 0 is nowhere
_POSITION = (1 << _PLACE_BITS) - 1

# What is kept of a slot, columns of int64 [slots, 4]: its text (0: free), and the latest match: tokens found, of them
# proposed, and which kind of match it was.
TEXT, FOUND, COUNT, BUCKET = range(4)


@compiled
def write(
    tokens: np.ndarray,
    numbers: np.ndarray,
    text: np.ndarray,
    new: np.ndarray,
    counts: np.ndarray,
    in_turn: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put tokens behind texts that have room for them.

    Args:
        tokens, numbers: Of all texts.
        text: Which ones, distinct.
        new: What to put there, int64 [B, S].
        counts: How many of them, the first.
        in_turn: Whether the columns of `new` came one after the other, not its rows.

    Returns:
        Of each token in the order in which they came, where it is in `tokens`, its place and the salt of its text, int64
        [N].
    """
    batch, width, total = len(text), new.shape[1], counts.sum()
    index, place, salt = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    n = 0
    for i in range(batch * width):
        row, step = (i % batch, i // batch) if in_turn else (i // width, i % width)
        if step < counts[row]:
            number = text[row]
            at = numbers[number, LENGTH] + step
            index[n] = numbers[number, START] + at
            place[n], salt[n] = number << _PLACE_BITS | at, numbers[number, SALT]
            tokens[index[n]] = new[row, step]
            n += 1
    for row in range(batch):
        numbers[text[row], LENGTH] += counts[row]
    return index, place, salt


@compiled
def hashes(
    tokens: np.ndarray, index: np.ndarray, salt: np.ndarray, orders: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Of the n-grams that end before `index` [N] in groups `salt` [N], int64 [N, O].

    Args:
        orders: int64 [O].
        weights: Of the tokens from the last one back, int64 [O, >= orders.max()].
    """
    found = np.empty((len(index), len(orders)), np.int64)
    for i in range(len(index)):
        for k in range(len(orders)):
            total = salt[i]
            for back in range(orders[k]):
                total += tokens[index[i] - 1 - back] * weights[k, back]
            found[i, k] = total
    return found


@compiled
def look_up(
    slots: np.ndarray,
    limits: np.ndarray,
    tokens: np.ndarray,
    numbers: np.ndarray,
    table: np.ndarray,
    entries: np.ndarray,
    orders: np.ndarray,
    recent: np.ndarray,
    state: np.ndarray,
    drafts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the longest known n-gram that each sequence ends with, and put what follows it into `state` and `drafts`.

    Args:
        slots: Of the sequences.
        limits: Most tokens proposed.
        table: Places of n-grams.
        entries: Where in it to look, int64 [B, O].
        orders: Falling, int64 [O].
        recent: Right and tried tokens by kind of match, float64 [2, kinds].
        state: By slot, see above.
        drafts: By slot, int32 [slots, L].

    Returns:
        Tokens proposed, int64, and the share of such that was right lately, float64; both 0 where nothing is known.
    """
    batch, longest = len(slots), drafts.shape[1]
    following = np.full(len(state), -1)  # by slot: the one whose live text its draft reaches the end of
    for i in range(batch):
        slot = slots[i]
        own = state[slot, TEXT]
        end = numbers[own, START] + numbers[own, LENGTH]
        state[slot, FOUND] = state[slot, BUCKET] = 0
        for k in range(len(orders)):
            place = table[entries[i, k]]
            text, at = place >> _PLACE_BITS, place & _POSITION
            left = numbers[text, LENGTH] - at  # a number given again may be of a shorter text
            if left <= 0 or numbers[text, SALT] != numbers[own, SALT]:
                continue
            start, same = numbers[text, START] + at, True
            for back in range(1, orders[k] + 1):
                same &= tokens[start - back] == tokens[end - back]
            if same:
                found = min(left, longest)
                drafts[slot, :found] = tokens[start : start + found]
                if found < longest:
                    following[slot] = numbers[text, SLOT]
                kind = OWN if text == own else numbers[text, SOURCE]
                state[slot, FOUND], state[slot, BUCKET] = found, kind * len(orders) + k
                break

    pieces = state[:, FOUND].copy()
    lengths, confidence = np.zeros(batch, np.int64), np.zeros(batch)
    for i in range(batch):
        slot = slots[i]
        found, behind = pieces[slot], following[slot]
        while behind >= 0 and pieces[behind] and found < longest:
            more = min(pieces[behind], longest - found)
            drafts[slot, found : found + more] = drafts[behind, :more]
            found, behind = found + more, following[behind]
        state[slot, FOUND] = found
        state[slot, COUNT] = lengths[i] = min(found, limits[i])
        if lengths[i]:
            confidence[i] = recent[0, state[slot, BUCKET]] / recent[1, state[slot, BUCKET]]
    return lengths, confidence


@compiled
def judge(
    slots: np.ndarray,
    emitted: np.ndarray,
    counts: np.ndarray,
    state: np.ndarray,
    drafts: np.ndarray,
    outcomes: np.ndarray,
    recent: np.ndarray,
    memory: float,
) -> None:
    """Count what the latest drafts were worth, up to their first wrong token; they are used up.

    Args:
        slots: Of the sequences.
        emitted: What came instead, [B, S].
        counts: Tokens of it.
        state, drafts: See `look_up`.
        outcomes, recent: Right and tried tokens by kind of match, float64 [2, kinds], added to; the second forget half of a
            kind as soon as it has more than `memory`.
    """
    for i in range(len(slots)):
        slot = slots[i]
        judged, kind, right = min(state[slot, COUNT], counts[i]), state[slot, BUCKET], 0
        while right < judged and drafts[slot, right] == emitted[i, right]:
            right += 1
        for record in (outcomes, recent):
            record[0, kind] += right
            record[1, kind] += min(right + 1, judged)
        if recent[1, kind] > memory:
            recent[:, kind] /= 2
        state[slot, FOUND] = state[slot, COUNT] = 0


@compiled
def goes_on(slots: np.ndarray, before: np.ndarray, emitted: np.ndarray) -> bool:
    """Whether each of the sequences `before` has emitted one token."""
    same = len(slots) == len(before)
    for i in range(len(slots)):
        same = same and slots[i] == before[i] and emitted[i] == 1
    return same
