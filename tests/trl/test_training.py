"""TRL as released, trained with our generation and with its own: the same where sampling is greedy, else as good."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from arithmetic_training import GROUP, make_trainer, train

from rollout_spec.contracts import InvalidRequest, RolloutSpecError

pytestmark = [pytest.mark.trl, pytest.mark.timeout(300)]

OPTIONS = {"dtype": "float32", "speculation": {"drafter": "int8", "draft_length": 4}}
# Greedy samples of a group are the same, so that rewards teach nothing; the entropy bonus moves the policy.
GREEDY: dict[str, Any] = {
    "generation_kwargs": {"do_sample": False},
    "entropy_coef": 1.0,
    "learning_rate": 3e-4,
}


def make_rollout(**options: Any) -> Any:
    from rollout_spec.integrations.trl.rollout import EngineRollout

    return EngineRollout(OPTIONS, **options)


def test_greedy_training_is_the_same_as_with_trls_own_generation(tmp_path: Path) -> None:
    ours = train(tmp_path, make_rollout(), max_steps=5, **GREEDY)
    theirs = train(tmp_path, max_steps=5, **GREEDY)
    assert ours.completions == theirs.completions and ours.scores == theirs.scores
    assert [entry["reward"] for entry in ours.log] == [entry["reward"] for entry in theirs.log]
    assert 0.1 < statistics.mean(sum(ours.scores, [])) < 1  # noqa: RUF017


def test_an_engine_left_at_old_weights_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout_spec import RolloutEngine

    theirs = train(tmp_path, max_steps=5, **GREEDY)
    update = RolloutEngine.update_weights

    def old_weights(self: Any, weights: Any, version: int) -> Any:
        return update(self, [(name, kept[name]) for name, _ in weights], version)

    monkeypatch.setattr(RolloutEngine, "update_weights", old_weights)
    run = make_trainer(tmp_path, make_rollout(), max_steps=5, **GREEDY)
    kept = {name: tensor.detach().clone() for name, tensor in run.trainer.model.named_parameters()}
    run.trainer.train()
    assert run.completions[0] == theirs.completions[0] and run.completions != theirs.completions


def test_sampled_training_reaches_the_same_level(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "prompts": 12, "max_completion_length": 96}
    runs = [train(tmp_path, f, **settings) for f in (make_rollout(), None)]
    ours, theirs = ([statistics.mean(batch) for batch in run.scores] for run in runs)
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 0.08
    assert runs[0].completions[0] != runs[1].completions[0]  # samples, of other noise
    log = runs[0].log[-1]
    assert log["rollout/spec_accepted"] > 0 and log["rollout/spec_verify_steps"] > 0


def test_logprobs_are_those_of_the_trainers_weights_at_every_step(tmp_path: Path) -> None:
    """Under a temperature and after updates, with the trainer's step as version.

    The reference is the trainer's weights in fp64: two forwards in fp32 can be further apart than what is asked here.
    """
    import torch

    rollout, differences, versions = make_rollout(), [], []

    def checked(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        versions.append(rollout.engine.stats().version)
        exact = type(trainer.model)(trainer.model.config)
        exact.load_state_dict(trainer.model.state_dict())
        exact.double().eval()
        for prompt, answer, logprobs in zip(
            *(output[key] for key in ("prompt_ids", "completion_ids", "logprobs"))
        ):
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
            assert logits.dtype == torch.float64
            own = logits.softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            differences.append((own - torch.tensor(logprobs).double().exp()).abs().max().item())
        assert len(prompts) == len(output["prompt_ids"])
        assert all(
            output["prompt_ids"][row] == output["prompt_ids"][row - row % GROUP]
            for row in range(len(prompts))
        )
        return output

    train(tmp_path, checked, max_steps=3, prompts=4, temperature=0.8)
    assert versions == [0, 1, 2] and max(differences) < 1e-5


def test_another_run_starts_from_its_own_weights(tmp_path: Path) -> None:
    rollout = make_rollout()
    first = train(tmp_path, rollout, max_steps=2, **GREEDY)
    second = train(tmp_path, rollout, max_steps=2, **GREEDY)
    assert second.completions == first.completions


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs.num_beams"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end"),
    ],
)
def test_what_is_not_served_is_an_error_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    run = make_trainer(tmp_path, make_rollout(), max_steps=1)
    for name, value in settings.items():
        setattr(run.trainer.args, name, value)  # some combinations TRL refuses by itself
    with pytest.raises(InvalidRequest, match=named):
        run.trainer.train()
    assert run.trainer.state.global_step == 0 and run.completions == []


def test_tools_and_vllm_are_refused(tmp_path: Path) -> None:
    from rollout_spec.integrations.trl.options import check_trainer

    trainer = make_trainer(tmp_path).trainer
    check_trainer(trainer)
    trainer.tools = [print]
    with pytest.raises(InvalidRequest, match="tools"):
        check_trainer(trainer)
    trainer.tools, trainer.args.use_vllm = [], True
    with pytest.raises(InvalidRequest, match="use_vllm"):
        check_trainer(trainer)
    trainer.args.use_vllm, trainer.environment_factories = False, {None: SimpleNamespace}
    with pytest.raises(InvalidRequest, match="environment_factory"):
        check_trainer(trainer)


def test_an_unmerged_adapter_is_refused(tmp_path: Path) -> None:
    from rollout_spec.integrations.trl.options import check_trainer

    trainer = make_trainer(tmp_path).trainer
    trainer.model.peft_config = {}
    with pytest.raises(RolloutSpecError, match="peft_config"):
        check_trainer(trainer)
