"""The policy inside vLLM's schedulers, synchronous and asynchronous."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from small_engines import DRAFTER

from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm.arguments import SCHEDULER, llm_arguments
from rollout_spec.integrations.vllm.choose_policy import calibration_key, choose_policy
from rollout_spec.integrations.vllm.online_calibration import LATE_STEPS, STEPS, SelfCalibrating
from rollout_spec.integrations.vllm.options import KEY, options_of
from rollout_spec.integrations.vllm.refusals import refuse_data_parallel
from rollout_spec.integrations.vllm.weights import update_weights
from rollout_spec.policy import calibration
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import Fixed, Off
from rollout_spec.policy.cost_model import CostModel
from rollout_spec.policy.records import Reason
from tests.vllm.conftest import POLICY, SMALL, Engine, Engines, changed, prompts, run_apart

pytest.importorskip("vllm")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

AUTOMATIC = llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 4})


@pytest.fixture
def engine(engines: Engines) -> Engine:
    return engines(**AUTOMATIC)


def test_costs_are_measured_in_the_first_steps_and_kept(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    decisions = engine.scheduler.decisions
    decisions.policy = policy = choose_policy(engine.config, options_of(engine.config))
    assert isinstance(policy, SelfCalibrating) and policy.policy is None
    engine.generate(prompts(8), 64)
    assert decisions.reasons[Reason.EXPLORE] >= STEPS
    batches = {x.batch for x in policy.timings}
    assert 8 in batches and policy.policy is not None
    assert all(1e-5 < x.seconds < 1.0 for x in policy.timings)
    assert calibration.cached(calibration_key(engine.config)) is not None
    again = choose_policy(engine.config, options_of(engine.config))
    assert isinstance(again, SelfCalibrating) and again.timings == policy.timings
    decisions.reasons.clear()
    engine.generate(prompts(8), 64)
    assert sum(decisions.reasons.values()) > 10
    assert decisions.reasons[Reason.EXPLORE] < STEPS


def test_costs_are_kept_for_what_they_depend_on(engine: Engine) -> None:
    """An engine that differs in one of these starts with costs of its own."""
    self_drafted = engine.config
    other = changed(self_drafted, speculative_config__quantization=None)
    keys = [
        calibration_key(x)
        for x in (
            self_drafted,
            changed(self_drafted, model_config__quantization="fp8"),
            changed(self_drafted, cache_config__cache_dtype="fp8"),
            changed(self_drafted, attention_config__backend="FLASHINFER"),
            changed(self_drafted, additional_config={KEY: {"quantize_lm_head": False}}),
            other,
            changed(other, speculative_config__model="another/head"),
        )
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)
    assert calibration_key(changed(self_drafted, speculative_config__model="elsewhere")) == keys[0]


def test_requests_that_end_leave_nothing_behind(engine: Engine) -> None:
    decisions = engine.scheduler.decisions
    engine.generate(prompts(12), 10)
    assert not engine.scheduler._steps
    decisions.forget_others(())
    assert not decisions._slots


def test_an_update_is_heard_of_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resets the prefix cache twice, and each time counted what was learnt of the drafter for less."""
    heard: list[int] = []
    monkeypatch.setattr(engine.scheduler.decisions, "after_update", lambda: heard.append(1))
    engine.generate(prompts(1), 4)
    update_weights(engine.llm, load_file(f"{POLICY}/model.safetensors").items())
    assert heard == [1]
    engine.llm.reset_prefix_cache()
    assert heard == [1]
    engine.generate(prompts(1), 4)
    engine.llm.reset_prefix_cache()
    assert heard == [1, 1]


N_GRAM = """
import json, sys
from vllm import LLM, SamplingParams
from rollout_spec.policy.baselines import Off

given = json.load(sys.stdin)
llm = LLM(**given["options"])
decisions = llm.llm_engine.engine_core.engine_core.scheduler.decisions

def generate():
    outputs = llm.generate(
        [{"prompt_token_ids": x} for x in given["prompts"]],
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    drafted = next((x.value for x in llm.get_metrics() if x.name == "vllm:spec_decode_num_draft_tokens"), 0)
    return [list(x.outputs[0].token_ids) for x in outputs], drafted

on, drafted = generate()
lengths = dict(decisions.draft_lengths)
decisions.policy = Off()
off, still = generate()
result = [decisions.drafter, type(llm.llm_engine.engine_core.engine_core.scheduler).__name__, on, off]
print("RESULT" + json.dumps({"seen": result, "lengths": lengths, "drafted": [drafted, still]}))
"""


def test_the_policy_runs_over_other_drafters(tmp_path: Path) -> None:
    """vLLM's n-gram proposer, unchanged; its K is decided here."""
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 2,
    }
    options = {
        "additional_config": {KEY: {"draft_length": 3}},
        "scheduler_cls": SCHEDULER,
        "speculative_config": speculative,
    }
    repeating = [[10, 20, 30, 40, 50] * 6 for _ in range(3)]
    result = run_apart(N_GRAM, {"options": SMALL | options, "prompts": repeating}, tmp_path)
    drafter, scheduler, on, off = result["seen"]
    assert (drafter, scheduler) == ("ngram", "PolicyScheduler") and on == off
    assert set(result["lengths"]) <= {"0", "1", "2", "3"} and result["lengths"]["3"] > 5
    assert result["drafted"][0] == result["drafted"][1] > 20


def test_one_sequence_at_a_time(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's table of K by batch size has one entry then; costs are measured and drafts verified all the same."""
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    engine = engines(**llm_arguments(POLICY, {"drafter": DRAFTER, "history": False}), max_num_seqs=1)
    drafted, _ = engine.counters()
    engine.generate(prompts(1), 120)
    policy = engine.scheduler.decisions.policy
    assert isinstance(policy, SelfCalibrating) and {x.batch for x in policy.timings} == {1}
    assert engine.counters()[0] > drafted


def test_plain_decoding_without_a_drafter(engines: Engines) -> None:
    engine = engines(additional_config={KEY: {}}, scheduler_cls=SCHEDULER)
    assert engine.scheduler.decisions.drafter is None
    assert len(engine.generate(prompts(2), 8)[1]) == 8
    assert not engine.scheduler.decisions.reasons


def test_what_cannot_be_honoured_is_refused(engines: Engines) -> None:
    engines.close()
    with pytest.raises(ValueError, match="give additional_config="):
        engines(scheduler_cls=SCHEDULER)
    with pytest.raises(ValueError, match=r"speculation\.margin='much'"):
        engines(additional_config={KEY: {"margin": "much"}}, scheduler_cls=SCHEDULER)
    ranks = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))
    with pytest.raises(
        InvalidRequest, match=r"data_parallel_size=2: every rank would decide .* one engine per rank"
    ):
        refuse_data_parallel(ranks)


class TestAsynchronous:
    """vLLM does not schedule asynchronously on a CPU, so the scheduler is driven by hand."""

    @pytest.fixture
    def scheduler(self, engines: Engines) -> Any:
        from rollout_spec.integrations.vllm.scheduler import PolicyScheduler

        engine = engines(
            **llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 4}),
            async_scheduling=False,
            enable_prefix_caching=False,
        )
        config = copy.copy(engine.config)
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = True
        made = PolicyScheduler(
            vllm_config=config,
            kv_cache_config=engine.scheduler.kv_cache_config,
            structured_output_manager=engine.scheduler.structured_output_manager,
            block_size=engine.scheduler.block_size,
            log_stats=True,
        )
        made.decisions.policy = Fixed(3)
        return made

    def request(self, name: str, length: int = 10, max_tokens: int = 12) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return Request(name, list(range(4, 4 + length)), params, None)

    def output(self, step: Any, tokens: dict[str, list[int]]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[tokens[name] for name in names],
        )

    def test_it_is_chosen(self, scheduler: Any) -> None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        from rollout_spec.integrations.vllm.scheduler import AsyncPolicyScheduler

        assert isinstance(scheduler, AsyncPolicyScheduler) and isinstance(scheduler, AsyncScheduler)

    def test_placeholders_follow_the_policy(self, scheduler: Any) -> None:
        """Two steps under way at a time; each verifies as many placeholders as the step before was told to draft."""
        for name in "ab":
            scheduler.add_request(self.request(name))
        first = scheduler.schedule()  # the prompts
        assert first.num_spec_tokens_to_schedule == 3
        scheduler.decisions.policy = Fixed(1)
        second = scheduler.schedule()
        assert {name: len(x) for name, x in second.scheduled_spec_decode_tokens.items()} == {"a": 3, "b": 3}
        assert second.num_spec_tokens_to_schedule == 1
        scheduler.update_from_output(first, self.output(first, {"a": [7], "b": [7]}))
        scheduler.decisions.policy = Off()
        third = scheduler.schedule()
        assert {name: len(x) for name, x in third.scheduled_spec_decode_tokens.items()} == {"a": 1, "b": 1}
        assert third.num_spec_tokens_to_schedule == 0
        scheduler.update_from_output(second, self.output(second, {"a": [1, 2, 3, 4], "b": [1]}))
        assert [scheduler.requests[x].num_output_tokens for x in "ab"] == [5, 2]
        fourth = scheduler.schedule()
        assert not fourth.scheduled_spec_decode_tokens
        scheduler.update_from_output(third, self.output(third, {"a": [5, 6], "b": [2]}))
        scheduler.update_from_output(fourth, self.output(fourth, {"a": [7], "b": [3]}))
        assert [list(scheduler.requests[x].output_token_ids) for x in "ab"] == [
            [7, 1, 2, 3, 4, 5, 6, 7],
            [7, 1, 2, 3],
        ]
        assert not scheduler._steps and scheduler.decisions.draft_lengths == {3: 1, 1: 1, 0: 2}

    def test_beside_a_sequence_near_the_end_nobody_drafts(self, scheduler: Any) -> None:
        """vLLM's V1 runner would draft zeros for the whole batch, which say nothing of a stock drafter."""
        scheduler._longest = 16
        for name, length in (("a", 10), ("b", 14)):
            scheduler.add_request(self.request(name, length))
        first = scheduler.schedule()
        assert first.num_spec_tokens_to_schedule == 3
        second = scheduler.schedule()  # "b" may have 18 tokens by its end
        assert second.num_spec_tokens_to_schedule == 0
        scheduler.update_from_output(first, self.output(first, {"a": [7], "b": [7]}))
        scheduler.update_from_output(second, self.output(second, {"a": [7], "b": [7]}))

    def test_late_drafts_are_timed_without_being_verified(self, scheduler: Any) -> None:
        """One step of a round drafts, and the next one verifies nothing; costs are known after it."""
        decisions = scheduler.decisions
        decisions.late = True
        decisions.policy = policy = SelfCalibrating(decisions.drafter, make, 4, late=True)
        names = "abcd"
        for name in names:
            scheduler.add_request(self.request(name, max_tokens=400))
        under_way, drafted, verified = [scheduler.schedule()], [], []
        for _ in range(LATE_STEPS + 8):
            under_way.append(scheduler.schedule())
            step = under_way.pop(0)
            lengths = {len(step.scheduled_spec_decode_tokens.get(name, ())) for name in names}
            assert len(lengths) == 1
            verified += lengths
            drafted.append(step.num_spec_tokens_to_schedule)
            scheduler.update_from_output(
                step, self.output(step, {x: [7] * (1 + verified[-1]) for x in names})
            )
        first = drafted.index(4)
        assert drafted[first : first + 5] == [4, 0, 4, 4, 4]
        assert verified[first + 1 : first + 6] == [0, 0, 4, 4, 4]
        assert [x.kind for x in policy.timings] == ["target", "target", decisions.drafter]
        assert all(
            scheduler.requests[name].num_output_tokens == sum(verified) + len(verified) for name in names
        )


@pytest.mark.parametrize(("late", "seconds"), [(True, 3.0), (False, 1.0)])
def test_time_between_two_steps_is_drafting_only_where_drafts_are_late(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, late: bool, seconds: float
) -> None:
    """A step ends at 1, drafts are made until 3, and the step that verifies them ends at 4."""
    from vllm.v1.request import RequestStatus

    from rollout_spec.integrations.vllm import decisions as decisions_module
    from rollout_spec.integrations.vllm import scheduler as module

    scheduler = engines(**AUTOMATIC).scheduler
    decisions, clock, seen = scheduler.decisions, SimpleNamespace(now=0.0), []
    for timed in (module, decisions_module):
        monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(decisions, "late", late)
    monkeypatch.setattr(decisions, "policy", Fixed(3))
    observe = decisions.observe
    monkeypatch.setattr(decisions, "observe", lambda *x: (seen.append(x[3]), observe(*x)))
    by_hand = TestAsynchronous()
    scheduler.add_request(by_hand.request("a"))
    scheduler.update_from_output(step := scheduler.schedule(), by_hand.output(step, {"a": [7]}))
    for began, ended in ((0.0, 1.0), (3.0, 4.0)):
        scheduler.requests["a"].spec_token_ids = [7, 7, 7]
        clock.now = began
        step = scheduler.schedule()
        clock.now = ended
        scheduler.update_from_output(step, by_hand.output(step, {"a": [7]}))
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert seen[-1] == pytest.approx(seconds)


def make(costs: CostModel) -> AutomaticPolicy:
    return AutomaticPolicy(costs, longest=4, ragged=False)


def test_new_requests_are_not_padded(engines: Engines) -> None:
    """vLLM pads a request that comes with one token to compute by placeholders for the largest K, drafts or not."""
    engine = engines(**AUTOMATIC)
    engine.scheduler.decisions.policy = Off()
    before = engine.counters()
    prompt = prompts(1, 65)[0]
    expected = engine.generate([prompt], 20)
    both = engine.run([prompts(2, 30)[1], prompt], [40, 20])
    assert both[1].num_cached_tokens == 64
    assert list(both[1].outputs[0].token_ids) == expected[0]
    assert engine.counters() == before


def test_vllm_still_pads() -> None:
    """When this fails, `PolicyScheduler` need not set `dynamic_sd_lookup` any more."""
    import inspect

    from vllm.v1.core.sched.scheduler import Scheduler

    assert "self.dynamic_sd_lookup is None" in inspect.getsource(Scheduler.schedule)
