"""Which engine gets which requests, and when: pure functions of lengths and loads, without Ray.

The unit is a group: all requests that share a prompt. Its samples belong on one engine, where they share the prompt's
cache entries and draft from each other's text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout_spec.contracts import Completion, RolloutSpecError, SamplingParams

UNKNOWN = 256.0
"""Output tokens expected of a sample before any length has been seen."""
LOSSES = 3
"""A group that has lost this many engines is not tried again: it may be what ends them."""


class PoolError(RolloutSpecError, RuntimeError):
    """The pool is closed, a group keeps losing engines, or nothing finished in time; the message says which."""


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, its parameters, the id that fixes its noise, and its row in the caller's list."""

    row: int
    prompt: tuple[int, ...]
    params: SamplingParams
    request_id: str


@dataclass(frozen=True)
class Group:
    """Requests of one prompt, which travel together.

    Attributes:
        requests: At least one.
        samples: How many completions they ask for.
        tokens: Output tokens expected of all of them: the load they put on an engine.
        longest: Output tokens expected of the longest of them: how long the group will take.
        losses: Engines that were lost while they sampled it.
    """

    requests: tuple[Request, ...]
    samples: int
    tokens: float
    longest: float
    losses: int = 0

    @property
    def order(self) -> tuple[float, int]:
        """Sort key: the groups that take longest come first, for they decide when a rollout ends."""
        return -self.longest, self.requests[0].row


class Lengths:
    """Output lengths seen, in tokens: mean and longest of each prompt's last group.

    Args:
        capacity: Prompts remembered, by their hashes; beyond it the one seen longest ago is forgotten.
    """

    def __init__(self, capacity: int = 1 << 17) -> None:
        self._capacity = capacity
        self._seen: OrderedDict[int, tuple[float, int]] = OrderedDict()  # seen longest ago first
        self._mean, self._longest = 0.0, 0  # sums over them

    def saw(self, prompt: tuple[int, ...], completions: Sequence[Completion]) -> None:
        lengths = [len(completion.token_ids) for completion in completions]
        key = hash(prompt)
        self._forget(self._seen.pop(key, (0.0, 0)))
        self._seen[key] = mean, longest = sum(lengths) / len(lengths), max(lengths)
        self._mean, self._longest = self._mean + mean, self._longest + longest
        if len(self._seen) > self._capacity:
            self._forget(self._seen.popitem(last=False)[1])

    def expected(self, prompt: tuple[int, ...]) -> tuple[float, float]:
        """Mean and longest for this prompt; for one not known, the average prompt's."""
        if not self._seen:
            return UNKNOWN, UNKNOWN
        count = len(self._seen)
        return self._seen.get(hash(prompt), (self._mean / count, self._longest / count))

    def _forget(self, lengths: tuple[float, int]) -> None:
        self._mean, self._longest = self._mean - lengths[0], self._longest - lengths[1]


def group_siblings(requests: Sequence[Request], lengths: Lengths) -> list[Group]:
    """Requests by prompt, the groups expected to take longest first."""
    by_prompt: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        by_prompt.setdefault(request.prompt, []).append(request)
    groups = []
    for prompt, siblings in by_prompt.items():
        mean, longest = lengths.expected(prompt)
        limits = [(r.params.n, r.params.max_tokens or float("inf")) for r in siblings]
        tokens = sum(n * min(mean, limit) for n, limit in limits)
        longest = min(longest, max(limit for _, limit in limits))
        groups.append(Group(tuple(siblings), sum(n for n, _ in limits), tokens, longest))
    return sorted(groups, key=lambda group: group.order)


def place(
    queue: Sequence[Group], in_flight: Mapping[int, Sequence[Group]], capacity: int
) -> list[tuple[int, Group]]:
    """Engines for the first groups of the queue: each goes to the one with the fewest outstanding tokens.

    Args:
        queue: Waiting groups, in order.
        in_flight: What each engine has been given and not answered.
        capacity: Most samples an engine decodes together. What would exceed it waits, so that it can go to whichever
            engine has room first; an idle engine takes a group of any size.
    """
    tokens = {engine: sum(group.tokens for group in groups) for engine, groups in in_flight.items()}
    samples = {engine: sum(group.samples for group in groups) for engine, groups in in_flight.items()}
    placed = []
    for group in queue:
        room = [e for e in samples if not samples[e] or samples[e] + group.samples <= capacity]
        if not room:
            break
        engine = min(room, key=lambda e: (tokens[e], e))
        tokens[engine] += group.tokens
        samples[engine] += group.samples
        placed.append((engine, group))
    return placed
