"""A warm start: a drafter trained on rollouts of the policy before any trainer runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_spec.adaptive.acceptance import Acceptance
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.trainer import DrafterTrainer, StepMetrics, TrainConfig
from rollout_spec.contracts import Completion, SamplingParams, SpecCounts
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.engine import RolloutEngine
from rollout_spec.models.decoder import Decoder

_PASS_TOKENS = 8192  # padding included, in one forward of the target


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


def episodes_of(target: Decoder, spec: EagleSpec, completions: Sequence[Completion]) -> list[Episode]:
    """Episodes of finished samples, in their order, with features that `target` computes anew, all but the last token's."""
    sequences = [c.prompt_token_ids + c.token_ids for c in completions]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, Episode] = {}
    for group in _groups(order, [len(sequence) for sequence in sequences]):
        tokens = [torch.tensor(sequences[i]) for i in group]
        for i, features, ids in zip(group, features_of(target, spec, tokens), tokens):
            c = completions[i]
            name, version = f"{c.request_id}/{c.index}", c.version_spans[-1].version
            found[i] = Episode(name, ids, features[:-1].clone(), len(c.prompt_token_ids), version)
    return [found[i] for i in range(len(sequences))]


@torch.no_grad()
def features_of(target: Decoder, spec: EagleSpec, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The target's features [T, F] along each of `sequences` int64 [T], in one plain forward pass over all of them."""
    device = target.weights.embed.device
    length = max(len(sequence) for sequence in sequences)
    ids = torch.stack([F.pad(sequence, (0, length - len(sequence))) for sequence in sequences]).to(device)
    rows = ids.numel()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, ids.shape).transpose(1, 2) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).reshape(rows, -1)

    positions = torch.arange(length, device=device).expand(ids.shape).flatten()
    streams: dict[int, Tensor] = {}

    def tap(layer: int, stream: Tensor) -> None:
        if layer in spec.feature_layers:
            streams[layer] = stream.clone()

    hidden = target.hidden(ids.flatten(), positions, attend, tap)
    features = torch.cat([streams[layer] for layer in spec.feature_layers], 1) if streams else hidden
    return [row[: len(sequence)] for row, sequence in zip(features.unflatten(0, ids.shape), sequences)]


def _groups(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Runs of `order`, which ascends in length, that fit a pass when padded to their longest."""
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * lengths[i] > _PASS_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


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
    seconds: float | None = None,
    evaluate_every: int = 200,
    progress: Callable[[StepMetrics, CurvePoint | None], None] = lambda metrics, point: None,
) -> Trained:
    """Train until `steps` are done, or `seconds` have passed; the acceptance on `held_out` is measured now and then."""
    start = time.perf_counter()
    done: list[StepMetrics] = []
    curve: list[CurvePoint] = []
    while trainer.steps_done < steps:
        done.append(trainer.step(next(batches)))
        elapsed = time.perf_counter() - start
        last = trainer.steps_done == steps or (seconds is not None and elapsed > seconds)
        point = None
        if last or trainer.steps_done % evaluate_every == 0:
            point = CurvePoint(elapsed, trainer.steps_done, trainer.acceptance(held_out))
            curve.append(point)
        progress(done[-1], point)
        if last:
            break
    return Trained(tuple(done), tuple(curve))


def new_trainer(
    target: Decoder, spec: EagleSpec, config: TrainConfig, draft_tokens: Tensor | None = None
) -> DrafterTrainer:
    """A trainer of a new drafter for `target`, on its device."""
    tensors = TargetTensors.of(target)
    module = EagleModule(spec, draft_tokens, seed=config.seed)
    module.head_from(tensors)
    return DrafterTrainer(module.to(target.weights.embed.device), tensors, config)
