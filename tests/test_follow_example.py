"""Training a drafter beside GRPO changes nothing of GRPO, and its example writes what it found."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rollout_spec.adaptive.checkpoint import Checkpoint, write_drafter
from rollout_spec.adaptive.module import EagleModule
from rollout_spec.adaptive.trainer import TrainConfig
from rollout_spec.drafters.eagle_spec import EagleSpec

SCRIPTS = Path(__file__).parents[1] / "examples" / "grpo"


@pytest.fixture
def follow():
    sys.path.insert(0, str(SCRIPTS))
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        import follow
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("follow", "train", "training_log"):  # names that other examples have, too
            sys.modules.pop(name, None)
    yield follow
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs requirements/light.txt")
def test_rewards_and_parameters_are_those_of_plain_grpo(follow, tmp_path, monkeypatch):
    sizes = {"prompts": 3, "group": 4, "seed": 2, "steps": 2}
    sizes |= {"longest_chain": follow.LONGEST_CHAIN, "max_tokens": follow.MAX_TOKENS}
    plain = follow.Grpo(follow.POLICY, speculation=False, **sizes)
    spec = EagleSpec.for_target(plain.engine.backend.spec, "eagle")
    saved = Checkpoint(spec, TrainConfig(), dict(EagleModule(spec).state_dict()), {}, 1, 0, {})
    drafter = write_drafter(tmp_path, saved)
    arguments = [
        "follow.py", "--drafter", str(drafter), "--kl", str(drafter), "--out", str(tmp_path / "found"), "--steps", "2",
        "--prompts", "3", "--group", "4", "--micro-batches", "2", "--judged", "3", "--every", "2",
        "--retrain-prompts", "20", "--retrain-steps", "40", "--seed", "2",
    ]  # fmt: skip
    runs = []

    class Kept(follow.FollowedGrpo):
        def __init__(self, policy, **options):
            super().__init__(policy, **options)
            runs.append(self)

    monkeypatch.setattr(follow, "FollowedGrpo", Kept)
    monkeypatch.setattr(sys, "argv", arguments)
    follow.main()
    for _ in range(2):
        plain.step()
    (run,) = runs
    assert run.log.rewards == plain.log.rewards
    assert run.parameters_sha256() == plain.parameters_sha256()
    assert len(run.spot.host.times.micro_batches) >= 4
    report = json.loads((tmp_path / "found.json").read_text())
    assert set(report["results"]["curves"]) == {"frozen", "frozen, trained for KL", "spot-trained"}
    assert (tmp_path / "found.png").stat().st_size > 1000
