"""Taking turns changes no token, and who waits is not timed."""

from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.benchmarks import turns
from rollout_spec.benchmarks.turns import Work, in_turns
from rollout_spec.policy.baselines import Fixed, Off, Stateless
from rollout_spec.policy.records import Plan, Reason

PROMPTS, IDS = ["12+34=", "7*8=", "123-45="], ["a", "b", "c"]
PARAMS = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
PAUSE, SLICE = 0.002, 0.02


@pytest.fixture(scope="module")
def engines():
    options = {"drafter": "int8", "draft_length": 3, "verifier": "coupled", "canary_min_acceptance": 0.0}
    return [
        RolloutEngine.from_pretrained(
            "examples/arithmetic/policy",
            dtype="float32",
            max_model_len=128,
            max_num_seqs=4,
            speculation=options,
        )
        for _ in range(2)
    ]


class Noted(Stateless):
    """Plain decoding that notes whose passes run, takes its time, and fails when it is told to."""

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.fails_at = name, log, fails_at

    def plan(self, state):
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise ArithmeticError(self.name)
        sleep(PAUSE)
        return Plan.plain(len(state.slots), Reason.OFF)


def generate(engine):
    return engine.generate(PROMPTS, PARAMS, request_ids=IDS)


def works(engines, *policies):
    return [
        Work(engine, policy, partial(generate, engine))
        for engine, policy in zip(engines, policies, strict=True)
    ]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def test_each_policy_decides_in_its_own_engine_and_no_token_changes(engines):
    (_, plain), (_, drafted) = in_turns(works(engines, Off(), Fixed(3)), slice_seconds=0.005)
    assert tokens(plain) == tokens(drafted) == tokens(generate(engines[0]))
    assert not any(completion.spec.drafted for completion in plain)
    assert all(completion.spec.drafted for completion in drafted)


def test_turns_alternate_and_only_the_own_ones_are_timed(engines):
    log = []
    start = perf_counter()
    done = in_turns(works(engines, Noted("one", log), Noted("two", log)), slice_seconds=SLICE)
    wall, (one, two) = perf_counter() - start, (seconds for seconds, _ in done)
    turns = [len(list(passes)) for _, passes in groupby(log)]
    assert log.count("one") == log.count("two") == 40
    assert len(turns) > 4 and max(turns) <= SLICE / PAUSE + 1
    assert min(one, two) >= 40 * PAUSE
    assert one + two <= wall


def test_a_failure_is_raised_and_the_others_finish(engines):
    log = []
    with pytest.raises(ArithmeticError, match="one"):
        in_turns(works(engines, Noted("one", log, fails_at=15), Noted("two", log)), slice_seconds=SLICE)
    assert log.count("two") == 40
    assert [policy.name for policy in (engine.backend.policy for engine in engines)] == ["one", "two"]


TASKS = Path("/proc/self/task")


class Counting(Fixed):
    """Drafts, and notes how many threads this process has."""

    def __init__(self, counts):
        super().__init__(3)
        self.counts = counts

    def plan(self, state):
        self.counts.append(sum(1 for _ in TASKS.iterdir()))
        return super().plan(state)


@pytest.mark.skipif(not TASKS.exists(), reason="nobody says how many threads there are")
def test_nobody_keeps_helpers_while_others_work(engines, monkeypatch):
    """Each engine's thread has a helper in its turn; together they would outnumber two processors."""

    def most_threads():
        counts = []
        in_turns(works(engines, Counting(counts), Counting(counts)), slice_seconds=0.005)
        return max(counts)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        let_go = most_threads()
        monkeypatch.setattr(turns, "_let_helpers_go", lambda: None)
        assert most_threads() > let_go
    finally:
        torch.set_num_threads(threads)


def test_works_need_engines_of_their_own(engines):
    with pytest.raises(ValueError, match="its own"):
        in_turns(works([engines[0]] * 2, Off(), Off()))
