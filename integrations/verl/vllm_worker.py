"""vLLM's workers under verl: one weight update reaches the policy and the drafter made from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from rollout_spec.integrations.vllm import compat_worker as compat
from rollout_spec.integrations.vllm.weights import TiedHead
from rollout_spec.integrations.vllm.worker import WorkerExtension


class VerlWorkerExtension(WorkerExtension, vLLMColocateWorkerExtension):  # type: ignore[misc]
    """The plugin's methods and verl's, over one set of models.

    verl 0.9.1 sends its buckets to the target and to MTP layers alone, and loads into layers that vLLM has already
    processed, which on a CPU have no weights left to load into. Here vLLM's own reload takes the layers apart first,
    and puts each together, quantizing the drafter's, when its last tensor has come.
    """

    _rollout_spec_update_seconds = 0.0
    _rollout_spec_head = TiedHead(False)

    def update_weights_from_ipc(
        self, peft_config: Any = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """As verl's. The new policy has the next version until `rollout_spec_stamp` tells the trainer's.

        Raises:
            WeightError: Tensors are missing; nothing is drafted until an update is complete.
        """
        start = time.perf_counter()
        hf_config = self.vllm_config.model_config.hf_text_config
        self._rollout_spec_head = TiedHead(getattr(hf_config, "tie_word_embeddings", False))
        self.rollout_spec_begin_update()
        try:
            with compat.current_config(self.vllm_config):
                super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            self.rollout_spec_finish_update(self._rollout_spec_policy().version + 1)
        except BaseException:
            self.rollout_spec_abandon_update()
            raise
        self._rollout_spec_update_seconds = time.perf_counter() - start

    def rollout_spec_stamp(self, version: int) -> None:
        """Name the policy in force, and a drafter made from it, by the trainer's step."""
        policy = self._rollout_spec_policy()
        if policy.drafter is not None and policy.follows and policy.drafter.version == policy.version:
            policy.drafter.version = version
        policy.version = version
        self._rollout_spec_publish()

    def rollout_spec_state(self) -> dict[str, Any]:
        """As the plugin's, and `update_seconds`: what the last update took here."""
        return super().rollout_spec_state() | {"update_seconds": self._rollout_spec_update_seconds}

    def _iter_all_models(self) -> Iterator[nn.Module]:
        for model, _ in self._rollout_spec_models():
            yield model

    def _iter_all_models_with_config(self) -> Iterator[tuple[nn.Module, Any]]:
        yield from ()  # the reload processes every layer, and a second time would spoil it

    def _update_weights(
        self, weights: list[tuple[str, Tensor]], peft_config: Any, base_sync_done: bool
    ) -> None:
        """As verl's, of copies: the reload keeps tensors until their layer is complete, and verl refills its bucket."""
        head = self._rollout_spec_head
        kept = [(name, tensor.clone()) for name, tensor in weights if not head.redundant(name, tensor)]
        super()._update_weights(kept, peft_config, base_sync_done)
