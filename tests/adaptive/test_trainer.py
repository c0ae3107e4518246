"""Training learns, is deterministic, resumes bitwise, and leaves the target alone."""

import copy
from dataclasses import replace

import pytest
import torch

from rollout_spec.adaptive import acceptance
from rollout_spec.adaptive.checkpoint import Checkpointer, read_checkpoint
from rollout_spec.adaptive.losses import Objective
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig, TrainingError
from rollout_spec.contracts import InvalidRequest

from .training_toys import KINDS, make_episodes, make_module, make_target

CONFIG = TrainConfig(learning_rate=5e-3, warmup_steps=5, unroll=2, autocast=False)


def make_trainer(kind="eagle", config=CONFIG, target=None):
    module, tensors = make_module(target or make_target(), kind)
    return DrafterTrainer(module, tensors, config)


def target_tensors(target):
    weights = target.weights
    found = [weights.embed, weights.final_norm, weights.lm_head.dense()]
    for layer in weights.layers:
        found += [layer.input_norm, layer.post_norm, layer.qk_norm]
        found += [linear.dense() for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_updates_change_no_bit_of_the_target(kind):
    target = make_target()
    before = [tensor.clone() for tensor in target_tensors(target)]
    trainer = make_trainer(kind, replace(CONFIG, unroll=1), target)
    episodes = make_episodes(trainer.module.spec, (5, 7))
    lent = [trainer.target.embed.clone(), trainer.target.lm_head.clone(), trainer.target.final_norm.clone()]
    start = copy.deepcopy(trainer.module.state_dict())
    for _ in range(1000):
        trainer.step(episodes)
    assert all(torch.equal(a, b) for a, b in zip(before, target_tensors(target)))
    now = [trainer.target.embed, trainer.target.lm_head, trainer.target.final_norm]
    assert all(torch.equal(a, b) for a, b in zip(lent, now)) and not any(x.requires_grad for x in now)
    changed = [
        name for name, tensor in trainer.module.state_dict().items() if not torch.equal(tensor, start[name])
    ]
    assert set(changed) == set(trainer.module.spec.parameter_shapes())


@pytest.mark.parametrize("objective", [Objective(), Objective(0.0, 0.1, 1.0), Objective(1.0, 0.1)])
def test_the_loss_falls_and_acceptance_rises(objective):
    trainer = make_trainer("eagle", replace(CONFIG, objective=objective))
    episodes = make_episodes(trainer.module.spec)
    first, before = trainer.step(episodes), trainer.acceptance(episodes)
    for _ in range(150):
        last = trainer.step(episodes)
    assert last.loss < 0.8 * first.loss
    assert trainer.acceptance(episodes).tau > before.tau
    assert last.step == 150 and trainer.steps_done == 151


def test_rejected_positions_count_for_more():
    trainer = make_trainer()
    (episode,) = make_episodes(trainer.module.spec, (14,))
    nothing = replace(episode, rejected=torch.zeros(0, dtype=torch.int64))
    a, b = (make_trainer().step([e]).loss for e in (episode, nothing))
    assert a != b
    off = replace(CONFIG, replay=0.0)
    a, b = (make_trainer(config=off).step([e]).loss for e in (episode, nothing))
    assert a == b


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_training_is_deterministic_and_resumes_bitwise(tmp_path, average):
    config = replace(CONFIG, average=average)
    straight, resumed = make_trainer("reduced", config), make_trainer("reduced", config)
    episodes = make_episodes(straight.module.spec)
    order, again = EpisodeBatches(episodes, 16, seed=1), EpisodeBatches(episodes, 16, seed=1)
    for _ in range(8):
        straight.step(next(order))
    for _ in range(4):
        resumed.step(next(again))
    saver = Checkpointer(tmp_path)
    folder = saver.save(resumed, version=3, extra=again.state_dict()).result()
    resumed.step(next(again))  # what was lost
    checkpoint = read_checkpoint(folder)
    assert checkpoint.version == 3
    resumed = checkpoint.trainer(straight.target)
    batches = EpisodeBatches(episodes, 16)
    batches.load_state_dict(checkpoint.extra)
    for _ in range(4):
        resumed.step(next(batches))
    assert resumed.steps_done == straight.steps_done == 8
    ours, theirs = straight.state_dict(), resumed.state_dict()
    assert bool(ours["average"]) == bool(average)
    for part in ("module", "average"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in ours[part].items():
            assert torch.equal(tensor, theirs[part][name]), name
    for index, tensors in ours["optimizer"].items():
        assert all(torch.equal(tensor, theirs["optimizer"][index][name]) for name, tensor in tensors.items())


def test_the_average_lags_behind_the_weights():
    trainer = make_trainer(config=replace(CONFIG, average=0.75))
    episodes = make_episodes(trainer.module.spec)
    expected = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    for _ in range(3):
        trainer.step(episodes)
        for name, p in trainer.module.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach()
    found = trainer.averaged()
    assert found.keys() == trainer.module.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert not torch.equal(found["fc.weight"], trainer.module.fc.weight)


def test_training_without_end_keeps_an_average():
    assert TrainConfig().average_share == 0.99 and TrainConfig(total_steps=100).average_share == 0.0
    assert (
        TrainConfig(total_steps=100, average=0.9).average_share == 0.9
        and TrainConfig(average=0.0).average_share == 0.0
    )


def test_without_an_average_the_weights_stand_for_it():
    trainer = make_trainer(config=replace(CONFIG, average=0.0))
    trainer.step(make_episodes(trainer.module.spec))
    assert torch.equal(trainer.averaged()["fc.weight"], trainer.module.fc.weight)


def test_another_training_takes_the_average_over():
    ours, theirs = (make_trainer(config=replace(CONFIG, average=0.9)) for _ in range(2))
    for _ in range(3):
        ours.step(make_episodes(ours.module.spec))
    theirs.take(ours.tensors())
    assert all(torch.equal(tensor, theirs.averaged()[name]) for name, tensor in ours.averaged().items())


def test_moments_that_were_never_stepped_lie_with_their_parameters():
    module, tensors = make_module(make_target(), "eagle")
    trainer = DrafterTrainer(module.to("meta"), tensors, CONFIG)
    assert {tensor.device.type for tensor in trainer.tensors().values()} == {"meta"}


def test_acceptance_is_measured_where_the_drafter_is(monkeypatch):
    class Packed(Exception):
        pass

    def steps(module, target, batch, count):
        raise Packed({tensor.device.type for tensor in vars(batch).values()})

    monkeypatch.setattr(acceptance, "_steps", steps)
    module, tensors = make_module(make_target(), "eagle")
    with pytest.raises(Packed, match="meta"):
        acceptance.measure(module.to("meta"), tensors, make_episodes(module.spec))


def test_resuming_with_another_configuration_is_refused():
    trainer = make_trainer()
    other = make_trainer(config=replace(CONFIG, learning_rate=1e-4))
    with pytest.raises(InvalidRequest, match="learning_rate"):
        other.load_state_dict(trainer.state_dict())


def test_a_gradient_that_is_not_finite_updates_nothing():
    trainer = make_trainer()
    (episode,) = make_episodes(trainer.module.spec, (9,))
    broken = replace(episode, features=episode.features * torch.inf)
    start = copy.deepcopy(trainer.module.state_dict())
    with pytest.raises(TrainingError, match="step 0"):
        trainer.step([broken])
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.module.state_dict().items())
    trainer.step([episode])


def test_the_rate_warms_up_and_falls():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, total_steps=14, final_rate=0.1)
    assert [config.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert config.rate(9) == pytest.approx(0.55) and config.rate(14) == config.rate(99) == pytest.approx(0.1)
    assert TrainConfig(learning_rate=1.0).rate(10_000) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0},
        {"unroll": 0},
        {"warmup_steps": -1},
        {"total_steps": 30},
        {"replay": -1},
        {"average": 1.0},
    ],
)
def test_options_without_sense_are_refused(options):
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        TrainConfig(**options)


def test_unrolling_rises_to_its_length_and_stays():
    config = TrainConfig(unroll=4, first_unroll=1, total_steps=100, warmup_steps=5)
    lengths = [config.unrolled(step) for step in range(120)]
    assert lengths[0] == 1 and lengths == sorted(lengths) and lengths[75:] == [4] * 45
    assert [lengths.count(n) for n in (1, 2, 3)] == [25, 25, 25]
    assert (
        TrainConfig(unroll=3).unrolled(0)
        == TrainConfig(unroll=3, first_unroll=3, total_steps=90).unrolled(0)
        == 3
    )
    trainer = make_trainer(config=replace(CONFIG, first_unroll=1, total_steps=8, warmup_steps=2))
    episodes = make_episodes(trainer.module.spec)
    assert [len(trainer.step(episodes).alpha) for _ in range(8)] == [1] * 6 + [2] * 2


@pytest.mark.parametrize(
    "options",
    [{"first_unroll": 0, "total_steps": 90}, {"first_unroll": 6, "total_steps": 90}, {"first_unroll": 1}],
)
def test_a_first_unrolling_that_cannot_rise_is_refused(options):
    with pytest.raises(InvalidRequest, match="first_unroll"):
        TrainConfig(**options)


def test_relative_rates_follow_the_scale_of_a_matrix():
    trainer = make_trainer(config=replace(CONFIG, relative_rate=True, learning_rate=1e-3, warmup_steps=0))
    module = trainer.module
    small, norm = "layers.0.mlp.down_proj.weight", "layers.0.post_attention_layernorm.weight"
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        module.get_parameter(small).mul_(0.01)
        before[small].mul_(0.01)
    trainer.step(make_episodes(module.spec))
    for name, parameter in module.named_parameters():
        moved = (parameter - before[name]).abs().max().item()  # the first step of Adam is the rate itself
        rms = before[name].square().mean().sqrt().item()
        wanted = 1e-3 if name == norm else 1e-3 * rms * module.spec.hidden_size**0.5
        assert moved == pytest.approx(wanted, rel=0.01), name


def test_training_without_end_goes_on_from_where_one_with_an_end_led():
    ended = replace(
        CONFIG, total_steps=90, first_unroll=1, objective=Objective(), last_objective=Objective(tv=2.0)
    )
    config = ended.without_end()
    assert config.learning_rate == pytest.approx(CONFIG.learning_rate / 3)
    assert [config.unrolled(step) for step in (0, 500)] == [2, 2]
    assert config.loss(0) == config.loss(500) == Objective(tv=2.0)
    assert config.rate(400) == config.rate(4000) == config.learning_rate and config.average_share == 0.99
