"""The GRPO example trains, and trains the same with speculation on and off."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trainings():
    """Two trainings of three steps: with speculation, from a fixed draft length, and without."""
    scripts = ROOT / "examples" / "grpo"
    sys.path.insert(0, str(scripts))
    try:
        import compare
        import train
    finally:
        sys.path.remove(str(scripts))
        for name in ("train", "compare", "training_log"):  # names that other examples have, too
            sys.modules.pop(name, None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    made = {
        on: train.Grpo(
            ROOT / "examples" / "arithmetic" / "policy",
            speculation=on,
            steps=3,
            prompts=4,
            group=4,
            minibatches=2,
            lr=1e-2,
            draft_length=4,
        )
        for on in (True, False)
    }
    before = made[True].parameters_sha256()
    for _ in range(3):
        for run in made.values():
            run.step()
    yield compare, made, before
    torch.use_deterministic_algorithms(deterministic)


def test_speculation_leaves_the_training_as_it_is(trainings):
    compare, made, before = trainings
    checks = compare.same(made[True], made[False])
    assert [check.name for check in checks if not check.passed] == []
    assert made[True].log.spec.accepted > 0 and made[False].log.spec.drafted == 0
    assert made[True].parameters_sha256() != before
    assert 0 < sum(made[True].log.rewards) < 3


def test_a_parameter_off_by_one_bit_is_noticed(trainings):
    compare, made, _ = trainings
    weight = made[False].model.model.norm.weight.detach()
    kept = weight[0].item()
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    failed = [check.name for check in compare.same(made[True], made[False]) if not check.passed]
    weight[0] = kept
    assert failed == ["same parameters"]


def test_engine_and_trainer_agree_about_logprobs(trainings):
    _, made, _ = trainings
    differences = made[
        True
    ].log.logprob_difference  # 0 where all answers to the first prompts were equally good
    assert 0 < max(differences) < 1e-3, differences
