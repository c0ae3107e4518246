"""What outlives a coordinator: its checkpoints, and the epochs given out, in one folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from rollout_spec.adaptive.spot.messages import Checkpoint
from rollout_spec.adaptive.spot.protocol import Tensors

_FILE = "spot.safetensors"


def claim_epoch(folder: Path) -> int:
    """An epoch larger than all claimed in this folder before, never given out twice."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = 1 + max((int(path.suffix[1:]) for path in folder.glob("epoch.*")), default=0)
    while not _created(folder / f"epoch.{epoch}"):
        epoch += 1
    return epoch


def _created(path: Path) -> bool:
    """Create a file; False if it exists."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint, all of it or nothing. Only trainable tensors and moments are in it."""
    tensors = {
        f"{kind}/{name}": tensor.contiguous()
        for kind, part in (("state", checkpoint.state), ("published", checkpoint.tensors))
        for name, tensor in (part or {}).items()
    }
    facts = {"epoch": checkpoint.epoch, "step": checkpoint.step, "version": checkpoint.version}
    scratch = folder / f"{_FILE}.{checkpoint.epoch}"
    save_file(tensors, scratch, {"spot": json.dumps(facts)})
    scratch.replace(folder / _FILE)


def begin_from(folder: Path, drafter: Tensors) -> None:
    """Have a coordinator in this folder begin with a drafter that was trained before, as version 1."""
    write_checkpoint(folder, Checkpoint(claim_epoch(folder), 0, None, 1, drafter))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The folder's checkpoint; an empty one where there is none."""
    if not (folder / _FILE).exists():
        return Checkpoint()
    parts: dict[str, dict[str, object]] = {"state": {}, "published": {}}
    with safe_open(folder / _FILE, "pt") as file:
        facts = json.loads(file.metadata()["spot"])
        for name in file.keys():  # noqa: SIM118  # not a dict
            kind, _, own = name.partition("/")
            parts[kind][own] = file.get_tensor(name)
    state: Tensors | None = parts["state"] or None  # type: ignore[assignment]
    return Checkpoint(facts["epoch"], facts["step"], state, facts["version"], parts["published"] or None)
