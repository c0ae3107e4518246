"""Weights for workers in processes of their own go through a file, where there is room for it; no vLLM runs here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout_spec.contracts import WeightError
from rollout_spec.integrations.vllm import weights
from rollout_spec.integrations.vllm.weights import WeightUpdate, read_shared_file, shared_file

TENSORS = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3).T)]
BYTES = 48


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for shared memory, with `free` bytes, and for the temporary folder."""
    found = SimpleNamespace(memory=tmp_path / "memory", disk=tmp_path / "disk", free=1 << 30)
    for folder in (found.memory, found.disk):
        folder.mkdir()
    monkeypatch.setattr(weights, "_SHARED_MEMORY", found.memory)
    monkeypatch.setattr(tempfile, "tempdir", str(found.disk))
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda folder: SimpleNamespace(free=found.free))
    return found


@pytest.mark.parametrize(("free", "where"), [(1 << 30, "memory"), (BYTES, "disk")])
def test_shared_memory_is_used_where_it_has_room(folders: SimpleNamespace, free: int, where: str) -> None:
    folders.free = free
    with shared_file(TENSORS) as path:
        assert Path(path).parent == getattr(folders, where) and Path(path).stat().st_mode & 0o077 == 0
        read = dict(read_shared_file(path))
    assert not Path(path).exists()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS)


def test_nobody_else_may_read_it_however_it_is_written(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "save_file", lambda tensors, path: Path(path).write_bytes(b"weights"))
    with shared_file(TENSORS) as path:
        assert Path(path).stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_written_is_named(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    named = rf"{folders.memory}/rollout-spec-.*48 bytes.*No space left.*TMPDIR.*chunk_bytes"
    with pytest.raises(WeightError, match=named), shared_file(TENSORS):
        pass
    assert not list(folders.memory.iterdir())


def test_without_room_the_old_weights_stay_in_force(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file is written before anything is taken apart."""
    engine = SimpleNamespace(
        collective_rpc=lambda name, **given: calls.append(name) or [{"version": 0}],
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
        sleep=lambda **given: calls.append("sleep"),
    )
    calls: list[str] = []

    def full(tensors: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    update = WeightUpdate(engine)  # type: ignore[arg-type]
    with pytest.raises(WeightError) as error:
        update.send(TENSORS)
    assert type(error.value) is WeightError and not update.begun and calls == ["rollout_spec_state"]
