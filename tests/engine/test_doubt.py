"""Drafting that is stopped on the way: no token changes, and what is learnt from it is what happened."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.policy.automatic import AutomaticPolicy
from rollout_spec.policy.baselines import ByTheDigits, Fixed, Off
from rollout_spec.policy.cost_model import CostModel, PassCost
from rollout_spec.proofs.distribution import distorted, distribution

PARAMS = SamplingParams(max_tokens=40, n=4, ignore_eos=True)
IDS = list("abcd")


class Stopped(Fixed):
    """K for everybody, under a `Stop` of some kind; notes what was planned and what came of it."""

    def __init__(self, draft_length, make_stop=ByTheDigits):
        super().__init__(draft_length)
        self.make_stop, self.passes = make_stop, []

    def plan(self, state):
        plan = super().plan(state)
        assert state.stoppable
        return replace(plan, stop=self.make_stop(plan.draft_lengths)) if plan.speculates else plan

    def observe(self, state, plan, outcome):
        self.passes.append((plan, outcome))


class TakesBackTheNarrow(ByTheDigits):
    """What `Stop` forbids: whether a draft counts hangs on how sure the drafter was of that draft itself."""

    def more(self, leads):
        count = len(leads)
        self._going[:count] &= leads * 1000 % 4 > 1
        self.lengths[:count] += self._going[:count]
        return bool((self._going & (self.lengths < self._limits)).any())


class KeepsOne(ByTheDigits):
    """Drafts to the end, whatever the drafter says, and has the first token verified only."""

    def more(self, leads):
        self.lengths[:] = np.minimum(self._limits, 1)
        return True


class Watched(AutomaticPolicy):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.passes = []

    def observe(self, state, plan, outcome):
        self.passes.append((plan, outcome))
        super().observe(state, plan, outcome)


def costs(name):
    """Of a machine on which drafting always pays."""
    return CostModel(
        {"target": PassCost(1e-3, 0.0, 2e-2, 1e-5, 0.0), name: PassCost(1e-4, 0.0, 2e-3, 1e-5, 0.0)}
    )


def outputs(engine, policy, prompts):
    engine.backend.policy = policy
    found = engine.generate(prompts, PARAMS, request_ids=IDS[: len(prompts)])
    return [(completion.token_ids, completion.logprobs) for completion in found]


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine(speculation={"canary": False, "verifier": "coupled", "draft_length": 6})


def test_stopped_drafts_change_no_token(engine, prompts):
    policy = Stopped(6)
    assert outputs(engine, policy, prompts[:4]) == outputs(engine, Off(), prompts[:4])
    speculated = [(plan, outcome) for plan, outcome in policy.passes if outcome.drafted is not None]
    assert any(outcome.drafted.max() < 6 for _, outcome in speculated)  # ended early for all
    assert any((outcome.drafted > plan.draft_lengths).any() for plan, outcome in speculated)  # taken back
    for plan, outcome in speculated:
        assert (outcome.accepted <= plan.draft_lengths).all()
        assert (plan.draft_lengths <= outcome.drafted).all()
        assert outcome.leads.shape == (len(outcome.drafted), outcome.drafted.max())
        known = np.arange(outcome.leads.shape[1]) < outcome.drafted[:, None]
        assert (np.isfinite(outcome.leads) == known).all()


def test_sure_drafts_are_accepted_more_often(engine, prompts):
    policy = Stopped(4, lambda limits: None)  # nobody asks, so nobody is told
    outputs(engine, policy, prompts[:4])
    assert all(outcome.leads is None and outcome.drafted is None for _, outcome in policy.passes)
    policy = Stopped(4)
    with distorted(engine):
        outputs(engine, policy, prompts[:4])
    first = [
        (outcome.leads[:, 0], outcome.accepted > 0)
        for _, outcome in policy.passes
        if outcome.leads is not None and outcome.drafted.all()
    ]
    leads, right = (np.concatenate(part) for part in zip(*first, strict=True))
    narrow = leads < np.median(leads)
    assert right[~narrow].mean() > right[narrow].mean()


def test_the_automatic_policy_stops_where_it_doubts(engine, prompts):
    name = engine.backend.weights.drafter.name
    policy = Watched(costs(name), probe_share=0.0)
    assert outputs(engine, policy, prompts[:4]) == outputs(engine, Off(), prompts[:4])
    stopped = [outcome for _, outcome in policy.passes if outcome.leads is not None]
    assert stopped
    torn, sure = policy.leads[name].acceptance(policy.acceptance[name].mean)[[0, -1]]
    assert torn < sure


@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "rejection"])
def test_the_distribution_is_kept(engine, prompts, coupled):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with distorted(engine):
        found = distribution(engine, prompts[0], params, 4000, coupled=coupled, policy=Stopped(3))
    assert found.pvalue > 1e-4
    assert found.freedom > 30 and found.residual > 300


def test_a_stop_that_picks_among_drafts_is_caught(engine, prompts):
    """The test above can fail."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with distorted(engine):
        found = distribution(
            engine, prompts[0], params, 4000, coupled=False, policy=Stopped(3, TakesBackTheNarrow)
        )
    assert found.pvalue < 1e-6


def test_a_drafter_that_cannot_be_stopped_is_not(make_engine, prompts, monkeypatch):
    """On a device with captured loops the state says so, and the automatic policy plans no stop."""
    engine = make_engine(speculation={"canary": False, "draft_length": 4})
    state = engine.backend._state
    monkeypatch.setattr(engine.backend, "_state", lambda rows: replace(state(rows), stoppable=False))
    name = engine.backend.weights.drafter.name
    policy = Watched(costs(name), probe_share=0.0)
    outputs(engine, policy, prompts[:2])
    assert any(plan.speculates for plan, _ in policy.passes)
    assert all(plan.stop is None and outcome.leads is None for plan, outcome in policy.passes)


def test_junk_that_was_taken_back_is_not_left_in_the_cache(make_engine, engine, prompts):
    """Verification overwrites what it verifies; behind a mask, a NaN would be read in the next pass."""
    broken = make_engine(speculation={"canary": False, "verifier": "coupled", "draft_length": 6})
    for slot, linear in broken.backend.weights.drafter.linears.items():
        if slot.endswith("qkv"):
            linear.matmul = lambda x, matmul=linear.matmul: torch.full_like(matmul(x), torch.nan)
    cache, clean = broken.backend.cache, []

    class Checked(Stopped):
        def observe(self, state, plan, outcome):
            super().observe(state, plan, outcome)
            clean.append(bool(torch.isfinite(cache.keys).all() and torch.isfinite(cache.values).all()))

    policy = Checked(6, KeepsOne)
    assert outputs(broken, policy, prompts[:4]) == outputs(engine, Off(), prompts[:4])
    assert any((outcome.drafted == 6).any() for _, outcome in policy.passes if outcome.drafted is not None)
    assert all(clean)
