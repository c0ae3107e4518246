"""What a pass adds to its samples besides tokens and logprobs: versions, top logprobs, and ends at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rollout_spec.sampling.pipeline import top_logprobs
from rollout_spec.torch_backend.slots import Slots

_TOKENS_PER_CHARACTER = 4  # a byte-level vocabulary spells one character with up to four tokens


def record_versions(slots: Slots, rows: np.ndarray, appended: np.ndarray, version: int) -> None:
    """Note under which policy version the last `appended [B]` tokens of `rows [B]` were sampled."""
    for row in np.nonzero(slots.version[rows] != version)[0].tolist():
        slot = rows[row]
        start = int(slots.length[slot] - appended[row] - slots.prompt_length[slot])
        slots.sample(slot).version_starts.append((start, version))
        slots.version[slot] = version


def record_top_logprobs(
    slots: Slots, rows: np.ndarray, appended: np.ndarray, raw: Tensor, vocab_size: int
) -> None:
    """Keep the most probable tokens of new positions for the samples that asked; `raw` logits `[B, S, V]`."""
    wanting = np.nonzero(slots.top_logprobs[rows])[0].tolist()
    most = max(slots.sample(rows[row]).params.logprobs or 0 for row in wanting)
    values, ids = top_logprobs(raw[wanting], min(most, vocab_size))
    for row, row_values, row_ids in zip(wanting, values.tolist(), ids.tolist(), strict=True):
        sample = slots.sample(rows[row])
        for step in range(appended[row]):
            pairs = zip(row_ids[step][: sample.params.logprobs], row_values[step], strict=False)
            sample.top_logprobs.append(dict(pairs))


def cut_at_stop_strings(
    slots: Slots,
    rows: np.ndarray,
    appended: np.ndarray,
    ended: np.ndarray,
    decode_text: Callable[[list[int]], str],
) -> int:
    """End samples whose new text holds a stop string, marking `ended [B]`; returns the tokens cut off behind it."""
    removed = 0
    for row in np.nonzero(slots.stop_strings[rows])[0].tolist():
        slot = int(rows[row])
        sample = slots.sample(slot)
        output = slots.tokens[slot, slots.prompt_length[slot] : slots.length[slot]]
        new = min(int(appended[row]), len(output) - sample.params.min_tokens)
        match = tokens_up_to_stop(output, new, sample.params.stop, decode_text)
        if match is not None:
            count, sample.stop_reason = match
            del sample.top_logprobs[count:]
            removed += len(output) - count
            slots.truncate(slot, int(slots.prompt_length[slot]) + count)
            ended[row] = True
    return removed


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
