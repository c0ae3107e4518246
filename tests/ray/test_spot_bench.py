"""`rollout-spec bench spot`: that its steps are what it says they are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def answered(problems: list[Any]) -> Any:
    from rollout_spec.adaptive.spot.serving import Share
    from rollout_spec.benchmarks.spot import served_policy
    from rollout_spec.contracts import SamplingParams

    prompts = tuple(problem.prompt for problem in problems)
    share = Share(prompts, tuple(map(str, range(len(prompts)))), SamplingParams(max_tokens=512))
    return served_policy("float32").generate(share, lambda: None)


def test_the_learner_sees_the_answers_as_they_were_sampled_and_leaves_the_policy_alone() -> None:
    from rollout_spec.benchmarks.spot import Learner
    from rollout_spec.example_policy import load_problems

    problems = load_problems().sample(6, 0, "test")
    answers = answered(problems)
    learner = Learner()
    with torch.no_grad():
        logprobs, sampled = learner.logprobs(answers)
    for row, answer in enumerate(answers):
        torch.testing.assert_close(
            logprobs[row][sampled[row]], torch.tensor(answer.logprobs), atol=1e-4, rtol=0
        )
    before = {name: tensor.clone() for name, tensor in learner.weights().items()}
    learner.learn([problems[:2], problems[2:]], [answers[:2], answers[2:]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights().items())
    moments = [state["exp_avg"].abs().max() for state in learner._optimizer.state.values()]
    assert len(moments) == len(before) and all(moment > 0 for moment in moments)


def test_every_kind_of_neighbour_follows_every_other_as_often() -> None:
    from rollout_spec.benchmarks.spot import _ORDERS, NEIGHBOURS

    assert all(sorted(order) == sorted(NEIGHBOURS) for order in _ORDERS)
    assert len({pair for order in _ORDERS for pair in itertools.pairwise(order)}) == 12
    assert {order[0] for order in _ORDERS} == set(NEIGHBOURS)


def test_steps_train_on_the_worker_that_idles(cluster: None) -> None:
    from rollout_spec.benchmarks.spot import NEIGHBOURS, Free

    results = Free(draws=2, seed=0, long=2).run()
    assert results["micro_batches"] > 0 and 0 < results["used_share"] <= 1
    assert results["coordinator"]["step"] > 0
    short, long = (results["workers"][f"worker-{place}"]["micro_batches"] for place in range(2))
    assert short > long
    for kind in NEIGHBOURS:
        assert 0 < results["rollout_seconds"][kind] < results["step_seconds"][kind]
