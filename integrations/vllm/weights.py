"""New weights for a running vLLM engine: the policy and the drafter made from it, under one version number.

`update_weights` stops the scheduler between two steps, streams the tensors to every worker, and goes on. Requests in
flight keep their tokens, recompute their cache and continue under the new policy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollout_spec.contracts import WeightError
from rollout_spec.integrations.vllm.compat_worker import shares_process
from rollout_spec.torch_backend.weights import UpdateReport, pairs

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

CHUNK_BYTES = 256 << 20
_SHARED_MEMORY = Path("/dev/shm")
_HEADER_BYTES = 1 << 20  # room for the names in a file of weights


class HalfUpdated(WeightError):
    """An update failed after tensors had reached the workers: no policy is in force until one succeeds."""


def update_weights(
    llm: LLM | LLMEngine,
    weights: Iterable[tuple[str, Tensor]],
    version: int | None = None,
    *,
    contexts: Sequence[Sequence[int]] = (),
    chunk_bytes: int | None = None,
) -> UpdateReport:
    """Replace the policy of a `vllm.LLM` that was made with this plugin's arguments.

    Args:
        llm: The engine; nobody else may call it meanwhile.
        weights: `(name, tensor)` pairs, complete, under their Hugging Face names, in any order (by layer is best).
        version: The new policy version, larger than the last; None counts up by one.
        contexts: Recent token sequences, on which the canary compares the new drafter with the policy.
        chunk_bytes: What is sent at a time; None is `CHUNK_BYTES`. Nothing is overwritten before the first chunk is full, or complete.

    Raises:
        WeightError: The old weights stay in force.
        HalfUpdated: The weights are a mixture; the scheduler stays paused until an update succeeds.
    """
    engine: Any = getattr(llm, "llm_engine", llm)
    update = WeightUpdate(engine, chunk_bytes)
    return update.finish(update.send(weights, version), contexts)


class WeightUpdate:
    """One update: `send` the tensors, then `finish`.

    Args:
        engine: vLLM's engine.
        chunk_bytes: See `update_weights`.
        hold: Called before anything is overwritten: from its return on nobody else may step the engine.
        drain: Called when the scheduler has stopped: takes what it gave out before.

    Attributes:
        begun: Whether the weights in force have been touched.
    """

    def __init__(
        self,
        engine: LLMEngine,
        chunk_bytes: int | None = None,
        *,
        hold: Callable[[], None] = lambda: None,
        drain: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._chunk_bytes = engine, chunk_bytes or CHUNK_BYTES
        self._hold, self._drain = hold, drain
        self._start, self.begun = time.perf_counter(), False

    def send(self, weights: Iterable[tuple[str, Tensor]], version: int | None = None) -> UpdateReport:
        """Stream the tensors to the workers; nothing is in force before `finish`. Errors as `update_weights`."""
        force = states(self._engine)[0]["version"]
        version = force + 1 if version is None else version
        if isinstance(version, bool) or not isinstance(version, int) or not force < version < 2**31:
            raise WeightError(
                f"version={version!r}: use an integer larger than the version in force, {force}"
            )
        hf_config = self._engine.model_config.hf_text_config
        tied = TiedHead(getattr(hf_config, "tie_word_embeddings", False))
        names: set[str] = set()
        count = nbytes = waiting = 0
        chunk: list[tuple[str, Tensor]] = []
        with self._undoing():
            for name, tensor in pairs(weights):
                if name in names:
                    raise WeightError(f"weights: {name} came twice; send every tensor once")
                names.add(name)
                count, nbytes = count + 1, nbytes + tensor.nbytes
                if tied.redundant(name, tensor):
                    continue
                chunk.append((name, tensor.detach().clone()))
                waiting += tensor.nbytes
                if waiting >= self._chunk_bytes:
                    self._load(chunk)
                    chunk, waiting = [], 0
            if not names:
                raise WeightError("weights: nothing came; send every tensor of the policy")
            self._load(chunk)
        return UpdateReport(version, time.perf_counter() - self._start, 0.0, count, nbytes)

    def finish(self, report: UpdateReport, contexts: Sequence[Sequence[int]] = ()) -> UpdateReport:
        """Put what was sent in force everywhere under one version, and go on."""
        engine, version = self._engine, report.version
        with self._undoing():
            results = engine.collective_rpc(
                "rollout_spec_finish_update", args=(version, [list(map(int, tokens)) for tokens in contexts])
            )
            engine.reset_prefix_cache(reset_running_requests=True)  # the canary has written to it
        set_version(engine, version)
        engine.wake_up(tags=["scheduling"])
        seconds = time.perf_counter() - self._start
        return replace(report, seconds=seconds, quantize_seconds=results[0]["quantize_seconds"])

    def _begin(self) -> None:
        engine = self._engine
        self._hold()
        engine.sleep(level=0, mode="keep")
        self._drain()
        engine.reset_prefix_cache(reset_running_requests=True)
        self.begun = True
        engine.collective_rpc("rollout_spec_begin_update")

    def _load(self, tensors: list[tuple[str, Tensor]]) -> None:
        if shares_process(self._engine):
            self._hand_over(tensors)
            return
        with shared_file(tensors) as path:
            self._hand_over(path)

    def _hand_over(self, chunk: str | list[tuple[str, Tensor]]) -> None:
        if not self.begun:
            self._begin()
        self._engine.collective_rpc("rollout_spec_load", args=(chunk,))

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        """On an error put the models together again, and say what is in force."""
        try:
            yield
        except BaseException as error:
            if not self.begun:
                raise
            self._engine.collective_rpc("rollout_spec_abandon_update")
            if not isinstance(error, Exception):
                raise
            raise HalfUpdated(
                f"{error}; the weights are now a mixture of two policies, and nothing is generated until a "
                "complete update_weights succeeds"
            ) from error


class TiedHead:
    """Knows the redundant head that many trainers send of a tied model, and that it must equal the embedding."""

    def __init__(self, tied: bool) -> None:
        self._tied = tied
        self._one: Tensor | None = None  # the first of the two that came

    def redundant(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor need not be sent; WeightError if the head is another matrix than the embedding."""
        head = name == "lm_head.weight"
        if not self._tied or not (head or name.endswith("embed_tokens.weight")):
            return False
        if self._one is not None and not torch.equal(self._one, tensor.to(self._one)):
            raise WeightError(
                "lm_head.weight: differs from the embedding it is tied to; untie them in the config"
            )
        self._one = tensor.detach().clone()
        return head


def states(engine: LLMEngine) -> list[dict[str, Any]]:
    """What every worker says of its policy: see `WorkerExtension.rollout_spec_state`."""
    found: list[dict[str, Any]] = engine.collective_rpc("rollout_spec_state")
    return found


def set_version(engine: LLMEngine, version: int) -> None:
    """Tell vLLM's engine core, which serves it to clients, the version in force (where the release has a place for it)."""
    tell = getattr(engine, "set_weight_version", None)
    if tell is not None:
        tell(str(version))


@contextmanager
def shared_file(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[str]:
    """Path of a file with the tensors, in memory where the system has room for it there; gone afterwards.

    Workers on other machines do not see it: there, use vLLM's own weight transfer.

    Raises:
        WeightError: It cannot be written; the message names it.
    """
    nbytes = sum(tensor.nbytes for _, tensor in tensors)
    roomy = (
        os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free > nbytes + _HEADER_BYTES
    )
    folder = _SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
    path = folder / f"rollout-spec-{uuid.uuid4().hex}.safetensors"
    try:
        try:
            path.touch(mode=0o600, exist_ok=False)
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors}, path)
        except (OSError, SafetensorError) as error:
            raise WeightError(
                f"{path}: {nbytes} bytes of weights for vLLM's workers could not be written ({error}); make room there, "
                "or set TMPDIR to a folder that has it, or chunk_bytes to less"
            ) from error
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def read_shared_file(path: str) -> list[tuple[str, Tensor]]:
    """What `shared_file` wrote, mapped into memory: it stays valid after the file is deleted."""
    return list(load_file(path).items())
