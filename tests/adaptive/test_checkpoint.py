"""Checkpoints hold the drafter's tensors only, appear whole or not at all, and say what is wrong with them."""

import json

import pytest
import torch
from safetensors import safe_open

from rollout_spec.adaptive import checkpoint
from rollout_spec.adaptive.checkpoint import OPTIMIZER, RECORD, WEIGHTS, Checkpointer, CheckpointError
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig

from .training_toys import make_episodes, make_module, make_target


@pytest.fixture
def trainer():
    trainer = DrafterTrainer(*make_module(make_target(), "reduced"), TrainConfig(unroll=1))
    trainer.step(make_episodes(trainer.module.spec))
    return trainer


def test_only_what_is_trained_is_saved(trainer, tmp_path):
    folder = Checkpointer(tmp_path).save(trainer).result()
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(trainer.module.spec.parameter_shapes()) | {"d2t"}
    module = checkpoint.read_checkpoint(folder).module()
    for name, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_training_goes_on_while_it_is_written(trainer, tmp_path, monkeypatch):
    import threading

    gate, write = threading.Event(), checkpoint._write_through
    monkeypatch.setattr(checkpoint, "_write_through", lambda *a: (gate.wait(30), write(*a)))
    before = trainer.module.fc.weight.detach().clone()
    saver = Checkpointer(tmp_path)
    saved = saver.save(trainer)
    trainer.step(make_episodes(trainer.module.spec))
    assert not saved.done() and checkpoint.checkpoints(tmp_path) == []
    gate.set()
    saver.close()
    assert torch.equal(checkpoint.read_checkpoint(saved.result()).weights["fc.weight"], before)
    assert not torch.equal(trainer.module.fc.weight, before)


def test_a_crash_while_writing_leaves_no_checkpoint(trainer, tmp_path, monkeypatch):
    write = checkpoint._write_through

    def fails(file, data):
        if file.name == RECORD:
            raise OSError("disk full")
        write(file, data)

    monkeypatch.setattr(checkpoint, "_write_through", fails)
    with pytest.raises(OSError, match="disk full"):
        Checkpointer(tmp_path).save(trainer).result()
    assert checkpoint.checkpoints(tmp_path) == []
    monkeypatch.undo()
    assert checkpoint.read_checkpoint(Checkpointer(tmp_path).save(trainer).result()).steps_done == 1


def test_the_newest_are_kept(trainer, tmp_path):
    saver = Checkpointer(tmp_path, keep=2)
    for steps in (1, 2, 3, 3):
        trainer.steps_done = steps
        saver.save(trainer).result()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_beside_those_of_a_longer_run(trainer, tmp_path, keep):
    saver = Checkpointer(tmp_path, keep=keep)
    for steps in (800, 900, 1, 2):
        trainer.steps_done = steps
        assert (saver.save(trainer).result() / RECORD).exists()
    kept = ["step-00000002", "step-00000900"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == kept[:keep]


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, RECORD])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_named(trainer, tmp_path, name, damage):
    file = Checkpointer(tmp_path).save(trainer).result() / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif name == RECORD:
        file.write_text(json.dumps(json.loads(data) | {"format": 2}))
    else:
        data[-3] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read_checkpoint(file.parent)
