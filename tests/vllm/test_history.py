"""Drafts from text seen before in vLLM: what the scheduler makes of them, and that they change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from always_history import AlwaysHistory

from rollout_spec.integrations.vllm.history import RequestHistory


def request(name: str, prompt: list[int], output: list[int] = [], salt: str | None = None) -> Any:  # noqa: B006
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


# --- in an engine ------------------------------------------------------------------------------------------------

pytest.importorskip("vllm")

from small_engines import DRAFTER, POLICY, counts, generate, scheduler, start, stop_all  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from rollout_spec.integrations.vllm.arguments import llm_arguments  # noqa: E402
from rollout_spec.integrations.vllm.choose_policy import why_no_history  # noqa: E402
from rollout_spec.integrations.vllm.options import options_of  # noqa: E402

REPEATING = [[10 + i, 20, 30, 40, 50] * 6 for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def engine() -> Any:
    llm = start(
        **_without_model(llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 6})), max_num_seqs=4
    )
    yield llm
    stop_all()


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return generate(start(), REPEATING, GREEDY)


def _without_model(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "model"}


@pytest.mark.integration
@pytest.mark.timeout(300)
class TestEngine:
    def test_greedy_tokens_are_those_of_plain_decoding(self, engine: Any, plain: list[list[int]]) -> None:
        """Six requests in four places, so that some join while others draft."""
        decisions = scheduler(engine).decisions
        decisions.policy = policy = AlwaysHistory(6)
        before, forwards = counts(engine), _forwards(engine)
        for _ in range(2):  # the second time from the answers of the first
            assert generate(engine, REPEATING, GREEDY) == plain
        drafted, accepted = (counts(engine)[name] - before[name] for name in ("drafted", "accepted"))
        assert accepted > 0.5 * drafted > 100 and _forwards(engine) == forwards
        assert policy.found > 0.5 * policy.foreseen > 50
        assert decisions.drafters["history"] > 10 and set(decisions.drafters) == {"history"}

    def test_wrong_drafts_change_nothing(
        self, engine: Any, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = RequestHistory.drafts

        def wrong(self: Any, *args: Any) -> list[list[int]]:
            return [[token + 1 for token in tokens] for tokens in found(self, *args)]

        monkeypatch.setattr(RequestHistory, "drafts", wrong)
        scheduler(engine).decisions.policy = AlwaysHistory(6)
        before = counts(engine)
        assert generate(engine, REPEATING, GREEDY) == plain
        drafted, accepted = (counts(engine)[name] - before[name] for name in ("drafted", "accepted"))
        assert drafted > 100 and accepted < 0.1 * drafted

    def test_requests_that_cannot_be_judged_get_none(self, engine: Any) -> None:
        scheduler(engine).decisions.policy = AlwaysHistory(6)
        before = counts(engine)
        params = SamplingParams(temperature=1.0, min_p=0.1, max_tokens=20, ignore_eos=True, detokenize=False)
        assert all(len(x) == 20 for x in generate(engine, REPEATING, params))
        assert counts(engine) == before

    def test_nothing_is_left_behind(self, engine: Any) -> None:
        scheduler(engine).decisions.policy = AlwaysHistory(6)
        generate(engine, REPEATING, GREEDY)
        history = scheduler(engine)._history
        assert not history._slots and history._history.stats().answers > 0
        assert engine.reset_prefix_cache()
        stats = history._history.stats()
        assert stats.answers > 0 and stats.tried.sum() > 0

    def test_the_automatic_policy_takes_what_is_free(
        self, engine: Any, tmp_path: Any, monkeypatch: Any
    ) -> None:
        from rollout_spec.integrations.vllm.choose_policy import choose_policy

        monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
        config, decisions = engine.llm_engine.vllm_config, scheduler(engine).decisions
        decisions.policy = choose_policy(config, options_of(config))
        decisions.drafters.clear()
        for _ in range(6):
            generate(engine, REPEATING[:1], SamplingParams(temperature=0, max_tokens=120, ignore_eos=True))
        assert decisions.drafters["history"] > decisions.drafters[DRAFTER]

    def test_why_there_is_none(self, engine: Any) -> None:
        config = engine.llm_engine.vllm_config
        assert why_no_history(config, options_of(config)) is None

        def changed(part: str | None = None, **values: Any) -> Any:
            given = SimpleNamespace(
                speculative_config=config.speculative_config,
                scheduler_config=SimpleNamespace(async_scheduling=False),
                model_config=SimpleNamespace(enable_prompt_embeds=False),
                use_v2_model_runner=False,
            )
            vars(getattr(given, part) if part else given).update(values)
            return given

        def why(given: Any, **options: Any) -> str | None:
            fields = {"history": True, "draft_length": None} | options
            return why_no_history(given, SimpleNamespace(**fields))  # type: ignore[arg-type]

        assert why(changed()) is None
        assert "is off" in str(why(changed(), history=False))
        assert "draft_length is fixed" in str(why(changed(), draft_length=3))
        assert "self-drafter" in str(why(changed(speculative_config=None)))
        assert "asynchronous" in str(why(changed("scheduler_config", async_scheduling=True)))
        assert "prompt_embeds" in str(why(changed("model_config", enable_prompt_embeds=True)))
        assert "VLLM_USE_V2_MODEL_RUNNER=0" in str(why(changed(use_v2_model_runner=True)))


def _forwards(llm: Any) -> int:
    from small_engines import runner

    return int(runner(llm).drafter.forwards)
