"""Drafts from text seen before, for vLLM's requests.

They need no forward, so the scheduler makes them, when the step that verifies them is scheduled: by then it has all the
tokens of the step before. Whether the drafter drafts for that step was decided one step earlier, without those tokens,
from what matched then and will still match if they are the expected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rollout_spec.drafters.history import History
from rollout_spec.policy.records import Matches


class RequestHistory:
    """`History` of `vllm.v1.request.Request`s. It reads their tokens when it is asked, and costs nothing else.

    Args:
        max_tokens: Tokens kept of prompts and finished answers.
    """

    def __init__(self, max_tokens: int) -> None:
        self._history = History(max_tokens)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._read: dict[str, int] = {}  # output tokens read so far

    def expected(self, requests: Sequence[Any], under_way: np.ndarray, allowed: np.ndarray) -> Matches:
        """What is expected to match when the step under way is over.

        Args:
            requests: N of them.
            under_way: Most tokens that the step under way appends to each, int64 [N].
            allowed: Draft tokens still allowed after it, int64 [N]; 0 for a request that cannot have any.
        """
        matches = self.matches(requests, under_way + allowed)
        lengths = np.maximum(matches.lengths - under_way, 0)
        # A proposal of n tokens is right up to token j only if the tokens under way follow it too: c^(u + j). As a
        # rate per token, which is how a policy reckons, that is c^(1 + u / n) for the whole of it.
        exponent = 1.0 + under_way / np.maximum(lengths, 1)
        return Matches(lengths, np.where(lengths > 0, matches.confidence**exponent, 0.0))

    def matches(self, requests: Sequence[Any], limits: np.ndarray) -> Matches:
        """What matches now, at most `limits` int64 [N] tokens for each of N requests."""
        self._follow(requests)
        return self._history.match(self._slots_of(requests), limits)

    def drafts(self, requests: Sequence[Any], counts: np.ndarray) -> list[list[int]]:
        """The first `counts` int64 [N] tokens that the latest `matches` of N requests found."""
        tokens = self._history.propose(self._slots_of(requests), counts)
        return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]

    def finish(self, request: Any, keep: bool) -> None:
        """The request is over; its answer is kept for others, unless it was aborted."""
        if keep:
            self._follow([request])
        elif request.request_id not in self._slots:
            return
        slot = self._slots.pop(request.request_id)
        del self._read[request.request_id]
        self._free.append(slot)
        self._history.finish(slot, keep)

    def after_update(self) -> None:
        """The weights have changed."""
        self._history.after_update()

    def _slots_of(self, requests: Sequence[Any]) -> np.ndarray:
        return np.array([self._slots[x.request_id] for x in requests], np.int64)

    def _follow(self, requests: Sequence[Any]) -> None:
        """Read the prompts of new requests, and what the others have emitted since the last time."""
        new: list[tuple[int, list[int]]] = []
        for request in requests:
            name, outputs = request.request_id, request.num_output_tokens
            if name not in self._slots:
                self._slots[name] = slot = self._free.pop() if self._free else len(self._slots)
                prompt, salt = np.array(request.prompt_token_ids, np.int64), request.cache_salt
                group = None if salt is None else (salt, prompt.tobytes())  # as in vLLM's prefix cache
                self._history.begin(slot, prompt, group=group)
                self._read[name] = 0
            if outputs > self._read[name]:
                new.append((self._slots[name], list(request.output_token_ids[self._read[name] :])))
                self._read[name] = outputs
        if new:
            counts = np.array([len(tokens) for _, tokens in new], np.int64)
            tokens = np.zeros((len(new), counts.max()), np.int64)
            tokens[np.arange(tokens.shape[1]) < counts[:, None]] = np.concatenate([x for _, x in new])
            self._history.extend(np.array([slot for slot, _ in new], np.int64), tokens, counts)
