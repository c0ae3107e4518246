"""`RolloutEngine` as the spot trainer's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from rollout_spec.adaptive.spot.protocol import Tensors
from rollout_spec.contracts import Completion, SamplingParams
from rollout_spec.drafters.eagle_spec import EagleSpec, Kind
from rollout_spec.engine import RolloutEngine


@dataclass(frozen=True)
class Share:
    """A worker's part of a rollout. With the same ids, seeds and policy it has the same answers on every worker.

    Attributes:
        prompts: Texts or token ids.
        request_ids: One each, unique over the rollout.
        params: One for all, or one each.
        seeds: One each; None: those of `params`.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    request_ids: tuple[str, ...]
    params: SamplingParams | tuple[SamplingParams, ...] = field(default_factory=SamplingParams)
    seeds: tuple[int, ...] | None = None


class ServedEngine:
    """A rollout engine that a spot trainer publishes to.

    Args:
        engine: On the torch backend.
        spec: Shape of the drafters to come; None: that of the one in force. A trainee that begins from a checkpoint sets it.
    """

    def __init__(self, engine: RolloutEngine, spec: EagleSpec | None = None) -> None:
        self.engine, self.spec = engine, spec

    @classmethod
    def from_pretrained(cls, model: str, config: Mapping[str, Any], kind: Kind = "eagle") -> ServedEngine:
        """An engine for drafters of this kind. `functools.partial` of it makes engines in Ray.

        Args:
            model: Folder of the policy.
            config: Of the engine; `speculation.adaptive` is on.
            kind: See `EagleSpec`.
        """
        speculation = {"adaptive": True, **config.get("speculation", {})}
        engine = RolloutEngine.from_pretrained(model, {**config, "speculation": speculation})
        return cls(engine, EagleSpec.for_target(engine.backend.spec, kind))

    @property
    def busy(self) -> bool:
        """Whether requests are waiting or being decoded."""
        stats = self.engine.stats()
        return bool(stats.live or stats.waiting)

    @property
    def free_bytes(self) -> int:
        """Free on the engine's device; the KV cache was taken when the engine was built."""
        device = self.engine.backend.device
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
        return int(psutil.virtual_memory().available)

    def publish(self, tensors: Tensors, version: int) -> None:
        """Put a drafter in force between two steps."""
        self.engine.publish_drafter(tensors.items(), version, self.spec)

    def update(self, weights: Tensors, version: int) -> None:
        """Put a policy in force, unless it is."""
        if version != self.engine.stats().version:
            self.engine.update_weights(weights.items(), version)

    def generate(self, share: Share, draining: Callable[[], None]) -> list[Completion]:
        """The share's completions, in order."""
        if not share.prompts:
            return []
        if len(share.prompts) <= self.engine.config.max_num_seqs:
            draining()  # all of it is decoded at once
        prompts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in share.prompts]
        params = share.params if isinstance(share.params, SamplingParams) else list(share.params)
        return self.engine.generate(prompts, params, seeds=share.seeds, request_ids=share.request_ids)


class NotedEngine(ServedEngine):
    """An engine for trainees whose drafters it could not run: it takes note of what is published."""

    published: Mapping[str, Tensor] | None = None

    def publish(self, tensors: Tensors, version: int) -> None:
        """Keep it."""
        self.published = tensors
