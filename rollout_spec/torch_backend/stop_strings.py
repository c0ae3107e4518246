"""Where a stop string was completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_TOKENS_PER_CHARACTER = 4  # a byte-level vocabulary spells one character with up to four tokens


def tokens_up_to_stop(
    output: np.ndarray, new: int, stops: Sequence[str], decode: Callable[[list[int]], str]
) -> tuple[int, str] | None:
    """Length of `output` up to the token that completed a stop string, and the string; None if none did.

    Args:
        output: All output tokens `[T]`; only its last `new` tokens have not been checked yet.
        new: How many tokens to check.
        stops: The strings; of several completed by one token the first listed counts.
        decode: Token ids to text.
    """
    window = _TOKENS_PER_CHARACTER * max(map(len, stops)) + 8
    for end in range(len(output) - new + 1, len(output) + 1):
        start = max(0, end - window)
        text = decode(output[start:end].tolist())
        for stop in stops:
            if stop in text and text.count(stop) > decode(output[start : end - 1].tolist()).count(stop):
                return end, stop
    return None
