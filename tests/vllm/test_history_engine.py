"""Drafts from text seen before in vLLM: the scheduler makes them, and they change nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from always_history import AlwaysHistory

from rollout_spec.integrations.vllm.history import RequestHistory

pytest.importorskip("vllm")

from safetensors.torch import load_file
from small_engines import DRAFTER, POLICY, counts, generate, runner, scheduler, start, stop_all
from vllm import SamplingParams

from rollout_spec.integrations.vllm.arguments import llm_arguments
from rollout_spec.integrations.vllm.choose_policy import kv_share, why_no_history
from rollout_spec.integrations.vllm.decisions import Live
from rollout_spec.integrations.vllm.options import options_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

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

    def test_who_is_planned_for(self, engine: Any) -> None:
        """Not requests that cannot be judged, and none with a grammar, which history does not know."""

        def request(grammar: Any = None, **params: Any) -> Any:
            return SimpleNamespace(
                sampling_params=SamplingParams(**params), structured_output_request=grammar
            )

        requests = [request(), request(min_p=0.1), request(logit_bias={1: 1.0}), request(grammar=object())]
        live = [Live("a", 20, 10, 7)] * len(requests)
        assert scheduler(engine)._allowed(requests, live).tolist() == [6, 0, 0, 0]

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

    def test_what_a_context_token_weighs(self, engine: Any) -> None:
        """Its keys and values over the weights of a pass, as this engine holds them; both in one dtype."""
        config = engine.llm_engine.vllm_config
        groups = scheduler(engine).kv_cache_config.kv_cache_groups
        kept = [x.kv_cache_spec for x in groups for _ in x.layer_names]
        kv = sum(spec.page_size_bytes / spec.block_size for spec in kept)
        # vLLM packs its weights; those of the checkpoint are as many, an embedding that is the head's counts once
        weights = load_file(Path(POLICY) / "model.safetensors")
        tied = config.model_config.hf_text_config.tie_word_embeddings
        read = 4 * sum(x.numel() for n, x in weights.items() if x.dim() == 2 and ("embed" not in n or tied))
        assert kv_share(config) == pytest.approx(kv / read, rel=0.02)
        unknown = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(to_dict=dict)))
        assert kv_share(unknown) is None

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
    return int(runner(llm).drafter.forwards)
