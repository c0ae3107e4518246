"""The drafter without weights: what followed the same words earlier, in this answer or another to the same prompt.

One table maps a hash of the last n tokens (n-gram) to the place where they last occurred: n-grams of the
prompt, of every answer to it that is being written, and of the answers kept from earlier. Places are checked
against the text before use, so a hash collision or a forgotten text costs a match, never a false one.

Lookups are compiled (`lookup`) and plain passes are read together, because those gain nothing and pay for it.

Confidence needs no verification: a fixed proposal is accepted exactly when the target emits the same token, so
every emitted token is an outcome, whether it was drafted or decoded plainly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from rollout_spec.drafters.lookup import (
    COUNT,
    EPOCHS,
    OWN,
    SIBLINGS,
    TEXT,
    goes_on,
    hashes,
    judge,
    look_up,
    write,
)
from rollout_spec.drafters.texts import Texts
from rollout_spec.policy.records import Matches

SOURCES = ("own", "siblings", "epochs")

_PROMPT_WINDOW = 4096  # a longer prompt is indexed from here to its end
_MOST_UNREAD = 64  # plain passes put off before they are read
_FIRST_SLOTS, _FIRST_ROOM = 16, 64
_MEMORY = 2048.0  # outcomes a confidence remembers
_PRIOR = np.array([[1.0], [2.0]])  # right and tried of Beta(1, 1)


@dataclass(frozen=True)
class HistoryStats:
    """What history holds and how often it was right.

    Attributes:
        prompts, answers, tokens: Kept for later, without the answers being written.
        evicted: Prompts forgotten for lack of room.
        nbytes: Host memory of the table and all text.
        tried, right: Tokens proposed up to and including the first wrong one, and the right ones among them;
            int64 [3, n-gram lengths], by source (`SOURCES`) and length, longest first.
    """

    prompts: int
    answers: int
    tokens: int
    evicted: int
    nbytes: int
    tried: np.ndarray
    right: np.ndarray


class History:
    """Proposes the continuation of the latest occurrence of the longest known n-gram a sequence ends with.

    A sequence matches its own text, its prompt's, and the text of its group: by default all answers to the same
    prompt, live and finished. Pass another `group` to `begin` to match more (one constant) or less (one per
    sample). A proposal that reaches the end of a live text goes on with what that text matches; if it is the
    sequence's own text, the copy overlaps itself and a loop is proposed for as long as it is wanted.

    Not thread-safe; the engine's step lock covers it.

    Args:
        max_tokens: Tokens kept of prompts and finished answers; the least recently used prompts go first. A token
            costs up to 8 bytes of text and 16 to 32 of the table, which is allocated at the start; a text costs up
            to 160 on top. Of an answer being written a token costs up to 16. Text takes twice as much for the
            moment in which it is moved to a larger array.
        answers_per_prompt: Latest answers kept of each prompt.
        orders: Lengths of the n-grams looked up.
        longest: Most tokens proposed at once.
    """

    def __init__(
        self,
        max_tokens: int = 4_000_000,
        answers_per_prompt: int = 16,
        orders: Sequence[int] = (2, 4, 8),
        longest: int = 64,
    ) -> None:
        self.max_tokens, self.answers_per_prompt, self.longest = max_tokens, answers_per_prompt, longest
        self.orders = tuple(sorted(set(orders), reverse=True))
        assert self.orders and self.orders[-1] > 0 and max_tokens > 0 and answers_per_prompt > 0
        bits = max(16, (2 * max_tokens - 1).bit_length())
        self._table = np.full(1 << bits, 0, np.int64)  # unlike zeros, touched now, not in a pass
        self._shift, self._mask = 64 - bits, (1 << bits) - 1
        self._orders = np.array(self.orders)
        random = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, (len(self.orders), self.orders[0]))
        self._weights = random | 1
        self._texts = Texts(self.orders[0])
        # By key: the prompt and the answers kept, the newest last.
        self._groups: OrderedDict[Hashable, list[int]] = OrderedDict()
        # By slot: key and prompt, of which the group is made again if it was evicted meanwhile.
        self._live: dict[int, tuple[Hashable, np.ndarray]] = {}
        self._unindexed: list[tuple[int, np.ndarray]] = []  # texts and their tokens: prompts that are new
        # Passes not read, and their tokens [B, `_MOST_UNREAD`] of `_unread_slots` [B]; copied, because arrays kept from every
        # pass take the holes that the allocator has for the next one's logits.
        self._unread, self._unread_tokens = 0, np.zeros((0, _MOST_UNREAD), np.int64)
        self._unread_slots = np.zeros(0, np.int64)
        self._tokens = self._evicted = 0
        # By slot, see `lookup`: what is kept of it, and the tokens of its latest match.
        self._state, self._drafts = np.zeros((0, 4), np.int64), np.zeros((0, longest), np.int32)
        self._more_slots(_FIRST_SLOTS)
        # [2, buckets]: right and tried tokens, by source and length: all of them, and those remembered.
        self._outcomes = np.zeros((2, len(SOURCES) * len(self.orders)))
        self._recent = self._outcomes + _PRIOR
        nobody = np.zeros(0, np.int64)
        self.extend(nobody, nobody[:, None], nobody)  # loops are compiled now, not in a pass
        self.match(nobody, nobody)

    # --- sequences -------------------------------------------------------------------------------------

    def begin(
        self, slot: int, prompt: np.ndarray, output: np.ndarray | None = None, group: Hashable = None
    ) -> None:
        """A sequence takes `slot`.

        Args:
            slot: Free so far.
            prompt: Token ids int64 [P], at least one.
            output: Tokens it has already, if it goes on after an interruption.
            group: Which texts it may match; None: those with the same prompt.
        """
        assert slot not in self._live and len(prompt)
        key = blake2b(prompt.tobytes(), digest_size=16).digest() if group is None else group
        window = prompt[-_PROMPT_WINDOW:].astype(np.int32)
        shared = self._group(key, window)[0]
        salt = self._texts.salt[shared]
        if slot >= len(self._state):
            self._more_slots(max(slot + 1, 2 * len(self._state)))
        text = self._texts.add(window[-self.orders[0] :], _FIRST_ROOM + self.orders[0], salt, SIBLINGS, slot)
        self._live[slot], self._state[slot] = (key, window), (text, 0, 0, 0)
        if output is not None and len(output):
            self._read()
            self._append(np.array([text]), output[None], np.array([len(output)]))
        self._make_room()

    def extend(self, slots: np.ndarray, tokens: np.ndarray, emitted: np.ndarray) -> None:
        """Take what a step emitted: the first `emitted[b]` of `tokens[b]`; slots [B], tokens [B, S], emitted [B]."""
        if not goes_on(slots, self._unread_slots, emitted) or self._unread == _MOST_UNREAD:
            self._read()
            if (emitted != 1).any():
                self._take(slots, tokens, emitted)
                return
            self._unread_slots = slots.copy()
            if len(self._unread_tokens) != len(slots):
                self._unread_tokens = np.zeros((len(slots), _MOST_UNREAD), np.int64)
        self._unread_tokens[:, self._unread] = tokens[:, 0]
        self._unread += 1

    def finish(self, slot: int, keep: bool = True) -> None:
        """The sequence leaves `slot`; its answer is kept for others unless it was aborted or preempted."""
        self._read()
        texts, text = self._texts, int(self._state[slot, TEXT])
        key, prompt = self._live.pop(slot)
        self._state[slot], texts.slot[text], texts.room[text] = 0, -1, texts.length[text]
        self._tokens += int(texts.length[text])
        if not keep:
            self._forget(text)
            return
        group = self._group(key, prompt)
        group.append(text)
        if len(group) > 1 + self.answers_per_prompt:
            self._forget(group.pop(1))
        self._make_room()

    # --- proposals -------------------------------------------------------------------------------------

    def match(self, slots: np.ndarray, limits: np.ndarray) -> Matches:
        """What can be proposed now for `slots` [B], at most `limits` [B] tokens each."""
        self._read()
        texts, state = self._texts, self._state
        own = state[slots, TEXT]
        entries = self._entries(texts.start[own] + texts.length[own], texts.salt[own])
        known = texts.tokens, texts.numbers, self._table, entries, self._orders, self._recent
        return Matches(*look_up(slots, limits, *known, state, self._drafts))

    def propose(self, slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The first `counts` [B] tokens that the latest `match` of `slots` [B] found: int64 [B, max(counts)].

        The rows are padded with 0, also where a count exceeds that match's length.
        """
        width = int(counts.max(initial=0))
        counts = np.minimum(counts, self._state[slots, COUNT])
        drafts = self._drafts[slots, :width].astype(np.int64)
        return np.where(np.arange(width) < counts[:, None], drafts, 0)

    def after_update(self) -> None:
        """The weights have changed: finished answers are an earlier epoch's, and confidence counts for half."""
        self._read()
        texts = self._texts
        texts.source[(texts.source == SIBLINGS) & (texts.slot < 0)] = EPOCHS
        self._recent = (self._recent + _PRIOR) / 2

    def stats(self) -> HistoryStats:
        """Counts since the start, and what is held now."""
        self._read()
        right, tried = self._outcomes.astype(np.int64).reshape(2, len(SOURCES), len(self.orders))
        arrays: list[np.ndarray] = [self._table, self._state, self._drafts]
        arrays += [self._texts.tokens, self._texts.numbers, *(prompt for _, prompt in self._live.values())]
        return HistoryStats(
            prompts=len(self._groups),
            answers=sum(len(group) - 1 for group in self._groups.values()),
            tokens=self._tokens,
            evicted=self._evicted,
            nbytes=sum(array.nbytes for array in arrays),
            tried=tried,
            right=right,
        )

    # --- the table -------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Take the prompts that are new, in one go: sequences begin together."""
        if self._unindexed:
            texts, prompts = zip(*self._unindexed, strict=True)
            counts = np.array([len(prompt) for prompt in prompts])
            tokens = np.zeros((len(prompts), counts.max()), np.int64)
            for row, prompt in zip(tokens, prompts, strict=True):
                row[: len(prompt)] = prompt
            self._unindexed = []
            self._append(np.array(texts), tokens, counts)

    def _read(self) -> None:
        """Take what plain passes emitted since the last look, in one go: with nothing to propose it need not be now."""
        self._index()
        if self._unread:
            tokens, slots = self._unread_tokens[:, : self._unread], self._unread_slots
            self._unread, self._unread_slots = 0, slots[:0]
            self._take(slots, tokens, np.full(len(slots), tokens.shape[1]), in_turn=True)

    def _take(
        self, slots: np.ndarray, tokens: np.ndarray, emitted: np.ndarray, in_turn: bool = False
    ) -> None:
        text = self._state[slots, TEXT]  # unknown slots raise here; compiled loops do not check
        tokens = np.ascontiguousarray(tokens)
        judge(slots, tokens, emitted, self._state, self._drafts, self._outcomes, self._recent, _MEMORY)
        self._append(text, tokens, emitted, in_turn)

    def _append(
        self, text: np.ndarray, tokens: np.ndarray, counts: np.ndarray, in_turn: bool = False
    ) -> None:
        """Write the first `counts[b]` of `tokens[b]` behind `text[b]`: each is what follows the n-grams before it.

        `in_turn`: the columns came one after the other, not a row at a time; it decides which occurrence is the latest.
        """
        texts = self._texts
        total = texts.length[text] + counts
        for i in np.flatnonzero(total > texts.room[text]).tolist():
            texts.move(int(text[i]), 2 * int(total[i]))
        index, place, salt = write(texts.tokens, texts.numbers, text, tokens, counts, in_turn)
        # Of equal n-grams the last one stays: the latest token of the last sequence.
        self._table[self._entries(index, salt)] = place[:, None]

    def _entries(self, index: np.ndarray, salt: np.ndarray) -> np.ndarray:
        """Table entries [N, orders] of the n-grams that end before `index` [N] of all tokens, in groups `salt` [N]."""
        found = hashes(self._texts.tokens, index, salt, self._orders, self._weights)
        return found >> self._shift & self._mask

    # --- what is kept ----------------------------------------------------------------------------------

    def _more_slots(self, slots: int) -> None:
        more = ((0, slots - len(self._state)), (0, 0))
        self._state, self._drafts = np.pad(self._state, more), np.pad(self._drafts, more)

    def _group(self, key: Hashable, prompt: np.ndarray) -> list[int]:
        """The group, the most recently used one now; made, its prompt to be indexed, if it is not known."""
        if key not in self._groups:
            text = self._texts.add(prompt[:0], len(prompt), _salt(key), OWN)
            self._unindexed.append((text, prompt))
            self._groups[key] = [text]
            self._tokens += len(prompt)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _make_room(self) -> None:
        while self._tokens > self.max_tokens:
            self._index()
            _, group = self._groups.popitem(last=False)
            self._evicted += 1
            for text in group:
                self._forget(text)

    def _forget(self, text: int) -> None:
        self._tokens -= int(self._texts.length[text])
        self._texts.remove(text)


def _salt(key: Hashable) -> int:
    """The same in every run of the program, unlike `hash`."""
    data = key if isinstance(key, bytes) else repr(key).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)
