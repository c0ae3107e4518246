"""The drafter without weights: what followed the same words earlier, in this answer or another to the same prompt.

One table maps a hash of the last n tokens (n-gram) to the place where they last occurred: n-grams of the
prompt, of every answer to it that is being written, and of the answers kept from earlier. Places are checked
against the text before use, so a hash collision or a forgotten text costs a match, never a false one.

Confidence needs no verification: a fixed proposal is accepted exactly when the target emits the same token, so
every emitted token is an outcome, whether it was drafted or decoded plainly.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from zlib import crc32

import numpy as np

from rollout_spec.policy.records import Matches

SOURCES = ("own", "siblings", "epochs")
OWN, SIBLINGS, EPOCHS = range(3)

_PROMPT_WINDOW = 4096  # a longer prompt is indexed from here to its end
_PLACE_BITS = 24  # a place is text number << 24 | position; 0 is nowhere
_POSITION = (1 << _PLACE_BITS) - 1
_LIVE_BYTES = 40  # of a token in a list: the pointer and the number
_MEMORY = 2048.0  # outcomes a confidence remembers


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


@dataclass(eq=False, slots=True)
class _Text:
    """A prompt or an answer; an answer begins with the last tokens of its prompt.

    Attributes:
        number: Never given twice.
        salt: Of its group, so that groups do not share table entries.
        tokens: Token ids; an int32 array once nothing is appended any more.
        keys: Table entries of the n-grams it ends with, longest first.
        round: Weight updates seen when it was finished; None for a prompt and while it is being written.
        found, draft: What matches its end, as (text, place, bucket), and the tokens proposed.
    """

    number: int
    salt: int
    tokens: list[int] | array[int]
    keys: list[int] = field(default_factory=list)
    is_prompt: bool = False
    round: int | None = None
    found: tuple[_Text, int, int] | None = None
    draft: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Live:
    """An answer being written, and what its group is made of again if it was evicted meanwhile."""

    text: _Text
    key: Hashable
    prompt: array[int]


@dataclass(eq=False, slots=True)
class _Group:
    """What is kept for one prompt; the last in `answers` is the newest."""

    prompt: _Text
    answers: deque[_Text] = field(default_factory=deque)


class History:
    """Proposes the continuation of the latest occurrence of the longest known n-gram a sequence ends with.

    A sequence matches its own text, its prompt's, and the text of its group: by default all answers to the same
    prompt, live and finished. Pass another `group` to `begin` to match more (one constant) or less (one per
    sample). A proposal that reaches the end of a live text goes on with what that text matches; if it is the
    sequence's own text, the copy overlaps itself and a loop is proposed for as long as it is wanted.

    Not thread-safe; the engine's step lock covers it.

    Args:
        max_tokens: Tokens kept of prompts and finished answers; the least recently used prompts go first. A token
            costs 4 bytes of text and 16 to 32 of the table, which is allocated at the start.
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
        size = 1 << max(16, (2 * max_tokens - 1).bit_length())
        self._table = memoryview(bytearray(8 * size)).cast("q")
        self._mask = size - 1
        self._numbers = count(1)
        self._texts: dict[int, _Text] = {}
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._live: dict[int, _Live] = {}
        self._tokens = self._evicted = self._round = 0
        buckets = len(SOURCES) * len(self.orders)
        self._hits, self._trials = [1.0] * buckets, [2.0] * buckets  # Beta(1, 1)
        self._tried, self._right = [0] * buckets, [0] * buckets

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
        window = array("i", prompt[-_PROMPT_WINDOW:].tolist())
        shared = self._group(key, window).prompt
        text = self._new_text(shared.salt, list(window[-self.orders[0] :]))
        self._live[slot] = _Live(text, key, window)
        if output is not None:
            self._append(text, output.tolist())
        self._make_room()

    def extend(self, slots: np.ndarray, tokens: np.ndarray, emitted: np.ndarray) -> None:
        """Take what a step emitted: the first `emitted[b]` of `tokens[b]`; slots [B], tokens [B, S], emitted [B]."""
        for slot, row, kept in zip(slots.tolist(), tokens.tolist(), emitted.tolist()):
            text, row = self._live[slot].text, row[:kept]
            if text.found is not None:
                self._learn(text.found[2], text.draft, row)
            text.found, text.draft = None, []
            self._append(text, row)

    def finish(self, slot: int, keep: bool = True) -> None:
        """The sequence leaves `slot`; its answer is kept for others unless it was aborted or preempted."""
        live = self._live.pop(slot)
        text = live.text
        text.found, text.round, text.tokens = None, self._round, array("i", text.tokens)
        if not keep:
            del self._texts[text.number]
            return
        group = self._group(live.key, live.prompt)
        group.answers.append(text)
        self._tokens += len(text.tokens)
        if len(group.answers) > self.answers_per_prompt:
            self._forget(group.answers.popleft())
        self._make_room()

    # --- proposals -------------------------------------------------------------------------------------

    def match(self, slots: np.ndarray, limits: np.ndarray) -> Matches:
        """What can be proposed now for `slots` [B], at most `limits` [B] tokens each."""
        texts = [self._live[slot].text for slot in slots.tolist()]
        for text in texts:
            text.found = self._find(text)
        lengths, confidence = [], []
        for text, limit in zip(texts, limits.tolist()):
            text.draft = _draft(text, min(limit, self.longest))
            bucket = 0 if text.found is None else text.found[2]
            lengths.append(len(text.draft))
            confidence.append(self._hits[bucket] / self._trials[bucket] if text.draft else 0.0)
        return Matches(np.array(lengths, np.int64), np.array(confidence))

    def propose(self, slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The first `counts` [B] tokens that the latest `match` of `slots` [B] found: int64 [B, max(counts)].

        The rows are padded with 0; a count is at most that match's length.
        """
        drafts = [self._live[slot].text.draft[:kept] for slot, kept in zip(slots.tolist(), counts.tolist())]
        width = max(map(len, drafts), default=0)
        rows = [draft + [0] * (width - len(draft)) for draft in drafts]
        return np.array(rows, np.int64).reshape(len(drafts), width)

    def after_update(self) -> None:
        """The weights have changed: finished answers are an earlier epoch's, and confidence counts for half."""
        self._round += 1
        self._hits = [1 + (hits - 1) / 2 for hits in self._hits]
        self._trials = [2 + (trials - 2) / 2 for trials in self._trials]

    def stats(self) -> HistoryStats:
        """Counts since the start, and what is held now."""
        shape = len(SOURCES), len(self.orders)
        live = sum(len(live.text.tokens) for live in self._live.values())
        return HistoryStats(
            prompts=len(self._groups),
            answers=sum(len(group.answers) for group in self._groups.values()),
            tokens=self._tokens,
            evicted=self._evicted,
            nbytes=self._table.nbytes + 4 * self._tokens + _LIVE_BYTES * live,
            tried=np.array(self._tried).reshape(shape),
            right=np.array(self._right).reshape(shape),
        )

    # --- the table -------------------------------------------------------------------------------------

    def _new_text(self, salt: int, tokens: list[int]) -> _Text:
        number = next(self._numbers)
        text = _Text(number, salt, tokens)
        text.keys = self._keys(text)
        self._texts[number] = text
        return text

    def _keys(self, text: _Text) -> list[int]:
        tail, salt, mask = tuple(text.tokens[-self.orders[0] :]), text.salt, self._mask
        return [(hash(tail[-n:]) ^ salt) & mask for n in self.orders]

    def _append(self, text: _Text, tokens: Sequence[int]) -> None:
        assert isinstance(text.tokens, list)
        table, place, keys = self._table, text.number << _PLACE_BITS | len(text.tokens), text.keys
        for token in tokens:
            for key in keys:
                table[key] = place
            place += 1
            text.tokens.append(token)
            keys = self._keys(text)
        text.keys = keys

    def _find(self, text: _Text) -> tuple[_Text, int, int] | None:
        tokens = text.tokens
        for i, n in enumerate(self.orders):
            place = self._table[text.keys[i]]
            found = self._texts.get(place >> _PLACE_BITS)
            at = place & _POSITION
            if found is not None and at >= n and [*found.tokens[at - n : at]] == tokens[-n:]:
                return found, at, self._source(text, found) * len(self.orders) + i
        return None

    def _source(self, text: _Text, found: _Text) -> int:
        if found is text or found.is_prompt:
            return OWN
        return SIBLINGS if found.round is None or found.round == self._round else EPOCHS

    def _learn(self, bucket: int, draft: list[int], emitted: list[int]) -> None:
        right = 0
        for proposed, token in zip(draft, emitted):
            if proposed != token:
                break
            right += 1
        tried = min(right + 1, len(draft), len(emitted))
        self._tried[bucket] += tried
        self._right[bucket] += right
        self._hits[bucket] += right
        self._trials[bucket] += tried
        if self._trials[bucket] > _MEMORY:
            self._hits[bucket] /= 2
            self._trials[bucket] /= 2

    # --- what is kept ----------------------------------------------------------------------------------

    def _group(self, key: Hashable, prompt: array[int]) -> _Group:
        """The group, the most recently used one now; made, its prompt indexed, if it is not known."""
        group = self._groups.get(key)
        if group is None:
            text = self._new_text(_salt(key), [])
            self._append(text, prompt)
            text.tokens, text.is_prompt = prompt, True
            group = self._groups[key] = _Group(text)
            self._tokens += len(prompt)
        else:
            self._groups.move_to_end(key)
        return group

    def _make_room(self) -> None:
        while self._tokens > self.max_tokens:
            _, group = self._groups.popitem(last=False)
            self._evicted += 1
            for text in (group.prompt, *group.answers):
                self._forget(text)

    def _forget(self, text: _Text) -> None:
        del self._texts[text.number]
        self._tokens -= len(text.tokens)


def _draft(text: _Text, limit: int) -> list[int]:
    """Up to `limit` tokens from where `text` was found; every hop gives at least one."""
    draft: list[int] = []
    source = text.found
    while source is not None and len(draft) < limit:
        found, at, _ = source
        draft += found.tokens[at : at + limit - len(draft)]
        source = found.found
    return draft


def _salt(key: Hashable) -> int:
    """The same in every run of the program, unlike `hash`."""
    return crc32(key if isinstance(key, bytes) else repr(key).encode())
