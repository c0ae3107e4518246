"""The drafter's trainer under the spot protocol, in one process: it learns, publishes, follows the policy, and yields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rollout_spec import SamplingParams
from rollout_spec.adaptive.checkpoint import Checkpointer
from rollout_spec.adaptive.last_layer import start_as_last_layer
from rollout_spec.adaptive.module import EagleModule
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.spot.checkpoint import begin_from
from rollout_spec.adaptive.spot.coordinator import SpotOptions
from rollout_spec.adaptive.spot.local import LocalSpot
from rollout_spec.adaptive.spot.serving import ServedEngine
from rollout_spec.adaptive.spot.trainee import DrafterTrainee, usual_config
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig
from rollout_spec.contracts import InvalidRequest

from ..serving_toys import make_engine, make_model, make_spec, prompts

CONFIG = TrainConfig(learning_rate=5e-3, warmup_steps=3, unroll=2, row_tokens=64, autocast=False)
PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True)


def make(kind: str = "eagle", **options: Any) -> tuple[ServedEngine, DrafterTrainee]:
    engine = make_engine(make_model(), speculation={"verifier": "coupled"})
    served = ServedEngine(engine, make_spec(engine, kind))
    return served, DrafterTrainee.begin(served, CONFIG, **{"batch_tokens": 64, "held_out": 3} | options)


def begin(served: ServedEngine, *args: Any, **options: Any) -> DrafterTrainee:
    """A trainee in the place of whoever was there."""
    served.engine.backend.on_finished = None
    return DrafterTrainee.begin(served, *args, **options)


def roll_out(served: ServedEngine, name: str = "a") -> list[list[int]]:
    texts = prompts(8)
    done = served.engine.generate(texts, PARAMS, request_ids=[f"{name}-{i}" for i in range(len(texts))])
    return [c.token_ids for c in done]


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_idle_time_makes_a_better_drafter_and_changes_no_token(kind: str) -> None:
    served, trainee = make(kind)
    plain = roll_out(served)
    assert len(trainee.taught) and len(trainee.judged)
    spot = LocalSpot(served, trainee, SpotOptions(micro_batches=4, publish_every=2))
    first = trainee.evaluate(trainee.candidate())[0]
    spot.train(lambda: spot.coordinator.step >= 24)
    version = served.engine.stats().adaptive
    assert version is not None and version == spot.coordinator.version >= 1
    assert trainee.evaluate(trainee.candidate())[0] > first
    served.engine.update_weights(make_model().named_parameters(), 1)  # ids may come again
    served.engine.update_weights(make_model().named_parameters(), 2)
    assert len(plain) == len(roll_out(served)) == 16
    assert served.engine.stats().spec.accepted > 0
    alone = make_engine(make_model(), version=2, speculation={"verifier": "coupled", "adaptive": False})
    expected = alone.generate(prompts(8), PARAMS, request_ids=[f"b-{i}" for i in range(8)])
    assert roll_out(served, "b") == [c.token_ids for c in expected]


def test_what_is_published_is_the_average_if_one_is_kept() -> None:
    served, _ = make()
    trainee = begin(served, replace(CONFIG, average=0.9), batch_tokens=64, held_out=3)
    roll_out(served)
    for _ in range(5):
        trainee.micro_step()
    candidate, trained = trainee.candidate(), trainee.trainer.module.state_dict()
    average = trainee.trainer.averaged()
    assert candidate.keys() == trained.keys()
    assert all(torch.equal(tensor, average[name]) for name, tensor in candidate.items())
    assert not torch.equal(candidate["fc.weight"], trained["fc.weight"])


def test_a_state_taken_over_goes_on_bitwise() -> None:
    served, one = make()
    roll_out(served)
    for _ in range(3):
        one.micro_step()
    state = one.state()
    episodes = one.taught.episodes()[:4]
    _, other = make()
    other.load(state)
    assert other.trainer.steps_done == 3
    assert one.trainer.step(episodes) == other.trainer.step(episodes)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), other.state().values()))
    assert not torch.equal(next(iter(state.values())), next(iter(one.state().values())))  # a copy


def test_only_the_drafters_own_tensors_are_sent() -> None:
    served, trainee = make("eagle3")
    weights = set(trainee.candidate())
    assert weights == set(served.spec.parameter_shapes())  # type: ignore[union-attr]
    assert {name.split("/")[0] for name in trainee.state()} == {"weights", "moments", "average"}


@pytest.mark.parametrize(("sent", "kept"), [("state", "tensors"), ("candidate", "averaged")])
def test_what_is_sent_is_on_the_host(sent: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trainee = make()
    monkeypatch.setattr(trainee.trainer, kept, lambda: {"w": torch.zeros(1, device="meta")})
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # it is tried
        getattr(trainee, sent)()


def test_held_out_requests_are_never_trained_on() -> None:
    served, trainee = make()
    roll_out(served)

    def requests(buffer: Any) -> set[str]:
        return {episode.request_id.rsplit("/", 1)[0] for episode in buffer.episodes()}

    assert requests(trainee.taught) and requests(trainee.judged)
    assert not requests(trainee.taught) & requests(trainee.judged)


def test_new_weights_are_followed_and_old_episodes_go() -> None:
    served, trainee = make()
    roll_out(served)
    before = trainee.trainer.target
    for version in (1, 2):
        served.engine.update_weights(make_model(version).named_parameters(), version)
        roll_out(served, f"v{version}")
    trainee.micro_step()
    assert trainee.trainer.target is not before
    assert torch.equal(trainee.trainer.target.embed, served.engine.backend.weights.target.weights.embed)
    assert trainee.taught.stats().versions == (1, 2)


def test_a_check_ends_when_the_worker_is_needed_and_judges_few_tokens() -> None:
    served, trainee = make(judged_tokens=64)
    roll_out(served)
    asked: list[int] = []

    def needed() -> bool:
        asked.append(1)
        return len(asked) > 1

    _, all_tokens = trainee.evaluate(trainee.candidate())
    _, some = trainee.evaluate(trainee.candidate(), needed)
    assert 0 < some <= all_tokens <= 64
    assert trainee.evaluate(trainee.candidate(), lambda: True) == (0.0, 0)


def test_without_samples_there_is_nothing_to_do() -> None:
    _, trainee = make()
    assert trainee.micro_step() is None and trainee.evaluate(trainee.candidate()) == (0.0, 0)


def test_a_drafter_trained_before_is_in_force_from_the_start(tmp_path: Path) -> None:
    served, trainee = make()
    roll_out(served)
    assert served.spec is not None
    before = EagleModule(served.spec, seed=9)
    begin_from(tmp_path, before.state_dict())
    spot = LocalSpot(served, trainee, folder=tmp_path)
    assert spot.coordinator.version == 1 and served.engine.stats().adaptive == 1


@pytest.mark.parametrize(
    ("options", "named"), [({"held_out": 1}, "held_out"), ({"budget_bytes": 0}, "budget_bytes")]
)
def test_mistakes_are_errors(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        make(**options)


def test_a_served_engine_without_a_spec_cannot_be_trained_for() -> None:
    engine = make_engine(make_model())
    with pytest.raises(InvalidRequest, match="spec"):
        begin(ServedEngine(engine))


def test_an_episode_says_which_policy_it_is_of() -> None:
    served, trainee = make()
    roll_out(served)
    kept: list[Episode] = trainee.taught.episodes()
    assert {episode.version for episode in kept} == {0}


def test_requests_named_alike_are_not_all_held_out_or_all_taught() -> None:
    _, trainee = make(held_out=2)
    tokens, features = torch.arange(4), torch.zeros(3, trainee.trainer.module.spec.feature_size)
    for row in range(64):
        trainee.add(Episode(f"0-0-{row}/0", tokens, features, 1, 0))
    assert 16 < len(trainee.judged) < 48 and len(trainee.taught) + len(trainee.judged) == 64


def save(root: Path, trainer: DrafterTrainer) -> str:
    saver = Checkpointer(root)
    folder = str(saver.save(trainer).result())
    saver.close()
    return folder


@pytest.mark.parametrize("options", [{"draft_vocab_size": 32}, {"feature_layers": [2, 3]}])
def test_from_a_checkpoint_drafters_of_its_shape_are_published(
    options: dict[str, Any], tmp_path: Path
) -> None:
    served, trainee = make("eagle3")
    spec = make_spec(served.engine, "eagle3", **options)
    tokens = torch.arange(spec.draft_vocab_size) if spec.own_head else None
    folder = save(tmp_path, DrafterTrainer(EagleModule(spec, tokens), trainee.trainer.target, CONFIG))
    served = ServedEngine(make_engine(make_model()), make_spec(served.engine, "eagle3"))
    begun = begin(served, CONFIG, folder)
    assert served.spec == begun.trainer.module.spec == spec
    served.publish(begun.candidate(), 1)
    assert served.engine.stats().adaptive == 1


def test_a_kind_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    served, trainee = make("eagle3")
    folder = save(tmp_path, trainee.trainer)
    with pytest.raises(InvalidRequest, match=r"kind='eagle': .* holds a drafter of kind 'eagle3'"):
        begin(ServedEngine(served.engine, make_spec(served.engine)), CONFIG, folder)
    assert begin(ServedEngine(served.engine), CONFIG, folder).trainer.module.spec == served.spec


def test_from_a_checkpoint_it_goes_on_as_that_was_trained(tmp_path: Path) -> None:
    served, trainee = make()
    roll_out(served)
    trained = DrafterTrainer(
        trainee.trainer.module, trainee.trainer.target, replace(CONFIG, total_steps=9, relative_rate=True)
    )
    folder = save(tmp_path, trained)
    config = begin(served, checkpoint=folder).trainer.config
    assert config == trained.config.without_end() and config.relative_rate and config.total_steps is None
    assert usual_config().start == "layer" and usual_config(kind="eagle3") == TrainConfig()


def from_nothing() -> tuple[ServedEngine, DrafterTrainee]:
    """An eagle drafter trained as is usual."""
    served, _ = make()
    return served, begin(served, batch_tokens=64)


def test_a_new_drafter_starts_as_the_targets_last_layer() -> None:
    served, trainee = from_nothing()
    module = trainee.trainer.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    while sum(len(episode.tokens) - 1 for episode in trainee.taught.episodes()) < 2 * module.spec.hidden_size:
        assert trainee.micro_step() is None, "too little to fit the start to"
        served.engine.generate(prompts(1), PARAMS)
    assert trainee.micro_step() is not None
    wanted = EagleModule(module.spec)
    start_as_last_layer(
        wanted, served.engine.backend.weights.target, [e.tokens for e in trainee.taught.episodes()]
    )
    down = "layers.0.mlp.down_proj.weight"  # does not depend on what was sampled, but for its scale
    for found in (module.state_dict(), trainee.candidate()):
        alike = F.cosine_similarity(found[down].flatten(), wanted.state_dict()[down].flatten(), dim=0)
        assert alike > 0.99 and not torch.equal(found[down], before[down])
    after = module.state_dict()[down].clone()
    trainee.micro_step()
    assert F.cosine_similarity(module.state_dict()[down].flatten(), after.flatten(), dim=0) > 0.999, (
        "but once"
    )


def test_a_budget_that_could_never_hold_what_the_start_takes_is_refused() -> None:
    served, _ = make()
    with pytest.raises(
        InvalidRequest, match="budget_bytes=9000: a start as the target's last layer takes 32768"
    ):
        begin(served, budget_bytes=9000)


def test_a_state_that_others_have_trained_is_gone_on_from() -> None:
    served, trainee = from_nothing()
    for name in "abcdef":
        roll_out(served, name)
    state = trainee.state()
    trainee.load(state)
    trainee.micro_step()
    name = "weights/layers.0.mlp.down_proj.weight"
    assert F.cosine_similarity(trainee.state()[name].flatten(), state[name].flatten(), dim=0) > 0.99
