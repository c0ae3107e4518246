"""Reading models: a Hugging Face folder of safetensors, or a module or state dict in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rollout_spec.contracts import WeightError
from rollout_spec.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONVERT = "convert it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"


def read_config(path: str | Path) -> dict[str, Any]:
    """The folder's config.json. End tokens of generation_config.json, which generation obeys, take precedence.

    Raises:
        WeightError: No such folder, or no readable config.json.
    """
    folder = _folder(path)
    file = folder / "config.json"
    if not file.is_file():
        raise WeightError(
            f"{folder}: no config.json; give a Hugging Face model folder (save_pretrained writes one)"
        )
    config = _read_json(file)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos
    return config


def read_checkpoint(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) of a folder's safetensors, one file or an indexed set of shards, read as iterated.

    Every file is opened and its length checked before the first tensor is returned.

    Raises:
        WeightError: No such folder, no safetensors (pickles are refused), a missing, truncated or corrupt file.
    """
    files = _weight_files(_folder(path))
    for file in files:
        _names(file)
    return (pair for file in files for pair in _tensors(file))


def state_dict_from(
    model: nn.Module | Mapping[str, Tensor], config: Mapping[str, Any] | PretrainedConfig | None = None
) -> tuple[ModelSpec, Iterator[tuple[str, Tensor]]]:
    """Spec and (name, tensor) pairs of a transformers module, or of a state dict with its config.

    Tensors are detached and not copied.

    Raises:
        WeightError: A state dict without config, or a module with an unmerged adapter.
        UnsupportedModel: See `ModelSpec.from_hf_config`.
    """
    tensors: Mapping[str, Tensor]
    if isinstance(model, nn.Module):
        while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]  # DistributedDataParallel
        if hasattr(model, "peft_config"):
            raise WeightError("model has an unmerged PEFT adapter; pass model.merge_and_unload()")
        config = config or getattr(model, "config", None)
        tensors = model.state_dict()  # type: ignore[union-attr]
    else:
        tensors = model
    if config is None:
        raise WeightError("config=None: give the model's config with its state dict")
    return ModelSpec.from_hf_config(config), ((name, tensor.detach()) for name, tensor in tensors.items())


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise WeightError(
            f"{path}: no such folder; download the model first (`hf download NAME`) and pass its folder"
        )
    return folder


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise WeightError(f"{index}: no weight_map; download the file again")
        files = [folder / name for name in sorted(set(shards.values()))]
        absent = [file.name for file in files if file.parent != folder or not file.is_file()]
        if absent:
            raise WeightError(
                f"{folder}: {len(absent)} of {len(files)} shards missing, among them {absent[0]}; download again"
            )
        return files
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / "adapter_model.safetensors").is_file():
        raise WeightError(
            f"{folder}: a LoRA adapter without its model; merge it (merge_and_unload) and save the result"
        )
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise WeightError(
            f"{folder / pickles[0]}: pickled weights can run code when loaded and are refused; {_CONVERT}"
        )
    raise WeightError(f"{folder}: neither {_SINGLE} nor {_INDEX}; give a complete model folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise WeightError(f"{file}: unreadable ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise WeightError(f"{file}: not a JSON object; download the file again")
    return content


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file}: truncated or corrupt ({error}); download the file again") from error


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    names = _names(file)
    with safe_open(file, framework="pt") as tensors:
        for name in names:
            yield name, tensors.get_tensor(name)
