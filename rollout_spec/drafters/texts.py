"""The tokens that history remembers: many growing texts in one array."""

from __future__ import annotations

import numpy as np

_FIRST_TOKENS, _FIRST_TEXTS = 1 << 16, 1 << 10


class Texts:
    """Prompts and answers in one array of tokens, by number; number 0 is an empty text, and numbers are given again.

    Before each text stand `reach` negative numbers of its own, so that what overlaps its start equals nothing.

    Attributes:
        tokens: int32, all texts; one is moved to get more room, all are to close gaps.
        numbers: int64 [texts, 6], the following ones of each text, in the order that `lookup` knows.
        start, length, room: In `tokens`; room 0: the number is free.
        salt: Of its group, so that groups share neither matches nor table entries.
        source: What it is to other texts, an index of `SOURCES`.
        slot: Where it is being written, or -1.
    """

    def __init__(self, reach: int) -> None:
        self._reach, self._end = reach, 0
        self._free: list[int] = []
        self.numbers = np.zeros((1, 6), np.int64)
        self._set_numbers(np.zeros((_FIRST_TEXTS, 6), np.int64))
        self.slot[0], self.tokens = -1, np.zeros(0, np.int32)
        self._close_gaps(0)

    def add(self, tokens: np.ndarray, room: int, salt: int, source: int, slot: int = -1) -> int:
        """A new text that begins with `tokens`; returns its number."""
        if not self._free:
            self._set_numbers(np.pad(self.numbers, ((0, len(self.numbers)), (0, 0))))
        text = self._free.pop()
        self.numbers[text] = 0, 0, 0, salt, source, slot
        self.move(text, room)
        self.tokens[self.start[text] :][: len(tokens)] = tokens
        self.length[text] = len(tokens)
        return text

    def remove(self, text: int) -> None:
        """Its number is free."""
        self.numbers[text] = 0, 0, 0, 0, 0, -1
        self._free.append(text)

    def move(self, text: int, room: int) -> None:
        """Move a text to where it has so much room."""
        if self._end + self._reach + room > len(self.tokens):
            self._close_gaps(self._reach + room)
        start, old, length = self._end + self._reach, self.start[text], self.length[text]
        self.tokens[self._end : start] = -text
        self.tokens[start : start + length] = self.tokens[old : old + length]
        self.start[text], self.room[text], self._end = start, room, start + room

    def _close_gaps(self, wanted: int) -> None:
        """Move all texts to a new array, of which they and what is wanted take at most half."""
        old, texts = self.tokens, np.flatnonzero(self.room)
        ends = np.cumsum(self._reach + self.room[texts])
        self._end = int(ends[-1]) if len(ends) else 0
        size = max(_FIRST_TOKENS, 2 * (self._end + wanted))
        self.tokens = np.zeros(size, np.int32)
        starts = ends - self.room[texts]
        for first, end, moved in np.stack(
            (starts - self._reach, ends, starts - self.start[texts]), 1
        ).tolist():
            self.tokens[first:end] = old[first - moved : end - moved]
        self.start[texts] = starts

    def _set_numbers(self, numbers: np.ndarray) -> None:
        self._free.extend(range(len(numbers) - 1, len(self.numbers) - 1, -1))
        self.numbers = numbers
        self.start, self.length, self.room, self.salt, self.source, self.slot = numbers.T
