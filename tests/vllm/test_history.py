"""What history has for vLLM's requests; no vLLM runs here."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rollout_spec.integrations.vllm.history import RequestHistory


def request(name: str, prompt: list[int], output: Sequence[int] = (), salt: str | None = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        prompt_token_ids=prompt,
        cache_salt=salt,
        output_token_ids=list(output),
        num_output_tokens=len(output),
    )


def emit(one: Any, *tokens: int) -> None:
    one.output_token_ids += tokens
    one.num_output_tokens += len(tokens)


def drafts(history: RequestHistory, *requests: Any, most: int = 4) -> list[list[int]]:
    limits = np.full(len(requests), most)
    found = history.matches(requests, limits)
    return history.drafts(requests, found.lengths)


LOOP = [1, 2, 3, 4, 5] * 3


class TestRequests:
    def test_own_text_goes_on_as_before(self) -> None:
        history, one = RequestHistory(1000), request("a", LOOP)
        assert drafts(history, one) == [[1, 2, 3, 4]]
        emit(one, 1, 2, 9)
        assert drafts(history, one) == [[]]
        emit(one, 3, 4)
        assert drafts(history, one, request("b", [7, 8])) == [[5], []]  # there the prompt ends

    def test_answers_to_the_same_prompt_are_drafts_for_the_next(self) -> None:
        history, prompt = RequestHistory(1000), [11, 12, 13]
        first = request("a", prompt, [21, 22, 23, 24])
        history.finish(first, keep=True)  # nobody ever asked about it
        assert drafts(history, request("b", prompt, [21, 22])) == [[23, 24]]
        assert drafts(history, request("c", [11, 12, 14], [21, 22])) == [[]]

    def test_an_aborted_answer_is_forgotten(self) -> None:
        history, prompt = RequestHistory(1000), [11, 12, 13]
        for name, asked in (("a", True), ("b", False)):
            one = request(name, prompt, [21, 22, 23, 24])
            if asked:
                drafts(history, one)
            history.finish(one, keep=False)
        assert drafts(history, request("c", prompt, [21, 22])) == [[]]

    def test_a_salt_keeps_text_apart(self) -> None:
        """Whoever separates users by `cache_salt` in vLLM's prefix cache separates them here."""
        history, prompt = RequestHistory(1000), [11, 12, 13]
        history.finish(request("a", prompt, [21, 22, 23, 24], "x"), keep=True)
        others = [request("b", prompt, [21, 22]), request("c", prompt, [21, 22], "y")]
        assert drafts(history, *others, request("d", prompt, [21, 22], "x")) == [[], [], [23, 24]]

    def test_slots_are_used_again(self) -> None:
        history = RequestHistory(1000)
        for name in "abc":
            one = request(name, LOOP)
            drafts(history, one)
            history.finish(one, keep=True)
        assert not history._slots and not history._read and history._free == [0]

    def test_what_is_under_way_is_spent_by_then(self) -> None:
        """Of a match of six tokens a step that emits up to four leaves two, if all four are as expected."""
        history, prompt = RequestHistory(1000), [11, 12, 13]
        history.finish(request("a", prompt, list(range(21, 29))), keep=True)
        one, allowed = request("b", prompt, [21, 22]), np.array([5])
        now = history.matches([one], np.array([9]))
        assert now.lengths.tolist() == [6]
        for under_way, left in ((1, 5), (4, 2), (6, 0), (9, 0)):
            found = history.expected([one], np.array([under_way]), allowed)
            assert found.lengths.tolist() == [left]
            # as likely to reach the first token as to have all under way right, and it
            chance = now.confidence[0] ** (under_way + left) if left else 0.0
            assert found.confidence[0] ** max(left, 1) == pytest.approx(chance)
        assert history.expected([one], np.array([1]), np.array([0])).lengths.tolist() == [0]
