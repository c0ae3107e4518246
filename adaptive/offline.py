"""A warm start: a drafter trained on rollouts of the policy before any trainer runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from rollout_spec.adaptive.acceptance import Acceptance
from rollout_spec.adaptive.features import episodes_of
from rollout_spec.adaptive.last_layer import start_as_last_layer
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.trainer import DrafterTrainer, StepMetrics, TrainConfig
from rollout_spec.contracts import SamplingParams, SpecCounts
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.engine import RolloutEngine
from rollout_spec.models.decoder import Decoder


def roll_out(
    engine: RolloutEngine,
    spec: EagleSpec,
    prompts: Sequence[str | list[int]],
    *,
    n: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[Episode]:
    """Sample `n` responses to each prompt at temperature 1, and compute the features along them.

    Args:
        engine: On the torch backend.
        spec: Whose features.
        prompts: Texts or token ids.
        n, max_tokens: Of `SamplingParams`.
        seed: Of the samples.
    """
    params = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens, seed=seed)
    return episodes_of(engine.backend.weights.target, spec, engine.generate(list(prompts), params))


def decode(
    engine: RolloutEngine, module: EagleModule, prompts: Sequence[str | list[int]], params: SamplingParams
) -> SpecCounts:
    """What `module` is accepted with when `engine` really decodes; see `drafting_only`."""
    engine.publish_drafter(module.state_dict().items(), spec=module.spec)
    return sum((c.spec for c in engine.generate(list(prompts), params)), SpecCounts())


def drafting_only(draft_length: int, verifier: str) -> dict[str, Any]:
    """`speculation` of an engine that drafts `draft_length` tokens in every pass, with a trained drafter and no other."""
    return {
        "drafter": "none", "adaptive": True, "history": False, "shadow": False, "canary_min_acceptance": 0.0,
        "draft_length": draft_length, "verifier": verifier,
    }  # fmt: skip


@dataclass(frozen=True)
class CurvePoint:
    """Where training stood: seconds since it began, steps done, and the acceptance on held-out episodes."""

    seconds: float
    step: int
    held_out: Acceptance


@dataclass(frozen=True)
class Trained:
    """A finished training: the metrics of every step, and the held-out curve."""

    steps: tuple[StepMetrics, ...]
    curve: tuple[CurvePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": [asdict(step) for step in self.steps],
            "curve": [asdict(point) for point in self.curve],
        }


def train(
    trainer: DrafterTrainer,
    batches: EpisodeBatches,
    held_out: Sequence[Episode],
    steps: int,
    *,
    draft_length: int | None = None,
    seconds: float | None = None,
    evaluate_every: int = 200,
    progress: Callable[[StepMetrics, CurvePoint | None], None] = lambda metrics, point: None,
) -> Trained:
    """Train until `steps` are done, or `seconds` have passed.

    Now and then the acceptance on `held_out` is measured at `draft_length`, see `DrafterTrainer.acceptance`.
    """
    start = time.perf_counter()
    done: list[StepMetrics] = []
    curve: list[CurvePoint] = []
    while trainer.steps_done < steps:
        done.append(trainer.step(next(batches)))
        elapsed = time.perf_counter() - start
        last = trainer.steps_done == steps or (seconds is not None and elapsed > seconds)
        point = None
        if last or trainer.steps_done % evaluate_every == 0:
            point = CurvePoint(elapsed, trainer.steps_done, trainer.acceptance(held_out, draft_length))
            curve.append(point)
        progress(done[-1], point)
        if last:
            break
    return Trained(tuple(done), tuple(curve))


def new_trainer(
    target: Decoder,
    spec: EagleSpec,
    config: TrainConfig,
    draft_tokens: Tensor | None = None,
    sequences: Sequence[Tensor] = (),
) -> DrafterTrainer:
    """A trainer of a new drafter for `target`, on its device; `sequences` are for `start_as_last_layer`."""
    tensors = TargetTensors.of(target)
    module = EagleModule(spec, draft_tokens, seed=config.seed)
    module.head_from(tensors)
    trainer = DrafterTrainer(module.to(target.weights.embed.device), tensors, config)
    if config.start == "layer":
        trainer.restart(lambda module: start_as_last_layer(module, target, sequences))
    return trainer
