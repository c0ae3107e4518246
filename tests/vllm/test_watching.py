"""A drafter that is not allowed to draft, or raises, on vLLM's V1 runner: what the runner gets; no vLLM runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout_spec.integrations.vllm.compat_worker import watch_drafting

BATCH = 3


class Drafter:
    """As vLLM's own: it runs its model at K = 0 too, and keeps the probabilities of its drafts."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.breaks = False
        self._last_draft_probs: Any = None

    def propose(self, num_speculative_tokens: int, **given: Any) -> torch.Tensor:
        self.calls.append(num_speculative_tokens)
        if self.breaks:
            raise ZeroDivisionError("on purpose")
        self._last_draft_probs = torch.ones(BATCH, num_speculative_tokens, 5)
        return torch.ones(BATCH, num_speculative_tokens, dtype=torch.int64)


class Runner:
    """What vLLM's runner does around its drafter."""

    def __init__(self, asynchronous: bool, ranks: int = 1) -> None:
        self.drafter, self.use_async_scheduling = Drafter(), asynchronous
        self.device, self.input_batch = torch.device("cpu"), SimpleNamespace(num_reqs=BATCH)
        self.speculative_config = SimpleNamespace(method="draft_model")
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=ranks))
        self.copied = 0

    def propose_draft_token_ids(self, scheduler_output: Any) -> Any:
        self._draft_probs = self._draft_prob_req_ids = None
        self.copied += 1  # counts of sampled tokens, which the next step waits for
        drafts = self.drafter.propose(num_speculative_tokens=scheduler_output.num_spec_tokens_to_schedule)
        if self.drafter._last_draft_probs is not None:
            self._draft_probs, self._draft_prob_req_ids = self.drafter._last_draft_probs, ["a", "b", "c"]
        return drafts


class Watched:
    def __init__(self, asynchronous: bool, ranks: int = 1) -> None:
        self.runner, self.allowed = Runner(asynchronous, ranks), True
        self.failures: list[Exception] = []
        watch_drafting(self.runner, lambda: self.allowed, self.failed, lambda figures: None)
        watch_drafting(self.runner, lambda: False, self.failed, lambda figures: None)  # once is enough

    def failed(self, error: Exception) -> None:
        self.failures.append(error)
        self.allowed = False

    def step(self, count: int) -> Any:
        return self.runner.propose_draft_token_ids(SimpleNamespace(num_spec_tokens_to_schedule=count))

    def nothing(self, drafts: Any, count: int) -> bool:
        """Whether these are no drafts, in the form that the next step needs."""
        if not self.runner.use_async_scheduling:
            return [len(x) for x in drafts] == [0] * BATCH
        reserved = torch.zeros(BATCH, count, dtype=torch.int64)
        return (
            self.runner._draft_probs is None and drafts.dtype == torch.int64 and torch.equal(drafts, reserved)
        )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_drafter_that_may_not_draft_is_kept_up_to_date(asynchronous: bool) -> None:
    """Asynchronous scheduling has reserved a place for every draft: an empty tensor there ends the engine."""
    watched = Watched(asynchronous)
    assert watched.step(4).tolist() == [[1] * 4] * BATCH
    watched.allowed = False
    assert watched.nothing(watched.step(4), 4)
    assert watched.runner.drafter.calls == [4, 0] and not watched.failures


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_drafter_that_raised_is_not_run_again(asynchronous: bool) -> None:
    """Not at K = 0 either, where vLLM's own would run their models and raise once more."""
    watched = Watched(asynchronous)
    watched.runner.drafter.breaks = True
    for count in (4, 4, 0):
        assert watched.nothing(watched.step(count), count)
    assert watched.runner.drafter.calls == [4] and watched.runner.copied == 3
    assert [type(error) for error in watched.failures] == [ZeroDivisionError]
    watched.runner.drafter.breaks, watched.allowed = False, True  # new weights
    assert watched.step(2).tolist() == [[1] * 2] * BATCH


def test_a_drafter_that_raises_at_k_0() -> None:
    watched = Watched(True)
    watched.runner.drafter.breaks = True
    assert watched.nothing(watched.step(0), 0) and len(watched.failures) == 1


def test_ranks_stop_together() -> None:
    """One that went on alone would wait for the others for ever."""
    watched = Watched(True, ranks=2)
    watched.runner.drafter.breaks = True
    with pytest.raises(ZeroDivisionError):
        watched.step(4)
