"""The drafter's trainer as the spot trainer's protocol sees it, on what one engine's rollouts leave behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rollout_spec.adaptive.acceptance import measure
from rollout_spec.adaptive.buffer import EpisodeBuffer
from rollout_spec.adaptive.capture import FeatureCapture
from rollout_spec.adaptive.checkpoint import read_checkpoint
from rollout_spec.adaptive.last_layer import start_as_last_layer
from rollout_spec.adaptive.losses import EAGLE_TV
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.samples import Episode
from rollout_spec.adaptive.spot.protocol import Tensors
from rollout_spec.adaptive.spot.serving import ServedEngine
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig
from rollout_spec.contracts import invalid
from rollout_spec.drafters.eagle_spec import Kind
from rollout_spec.engine import RolloutEngine

_START_PAIRS = 8  # to fit the start to at most, per channel of the target


def usual_config(checkpoint: str = "", kind: Kind = "eagle") -> TrainConfig:
    """How to train without end: on from a checkpoint as its training led there, or from nothing."""
    if checkpoint:
        return read_checkpoint(checkpoint).config.without_end()
    if kind != "eagle":
        return TrainConfig()
    return TrainConfig(start="layer", learning_rate=2.5e-4, relative_rate=True, unroll=3, objective=EAGLE_TV)


class DrafterTrainee:
    """Trains on the sequences that `engine` finishes from now on, under the policy in force and the one before.

    One request in `held_out` is never trained on; candidates are judged by the latest of those.

    Args:
        engine: On the torch backend.
        module: Where training begins; trained in place.
        config: How; without `total_steps`, for this training has no end.
        new: Whether the module is, so that the first micro-batch begins with `TrainConfig.start`.
        batch_tokens: Of a micro-batch, about.
        held_out: See above.
        judged_tokens: At most so many tokens, the latest, judge a candidate, and so bound how long a check takes.
        budget_bytes: Of the episodes kept to train on; those held out have a tenth of it.
        seed: Of the draws.

    Attributes:
        trainer: The trainer.
        taught, judged: Episodes to train on, and to judge by.
        capture: Of the engine's features; `stop` it when it is not wanted any more.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        module: EagleModule,
        config: TrainConfig | None = None,
        *,
        new: bool = False,
        batch_tokens: int = 512,
        held_out: int = 8,
        judged_tokens: int = 4096,
        budget_bytes: int = 256 << 20,
        seed: int = 0,
    ) -> None:
        if held_out < 2:
            raise invalid("held_out", held_out, "use an integer >= 2: one request in so many is held out")
        self._engine, self._held_out, self._judged_tokens = engine, held_out, judged_tokens
        self.trainer = DrafterTrainer(module, self._lent(), config)
        self._new = new and self.trainer.config.start == "layer"
        least = 2 * module.spec.hidden_size**2 * self.trainer.target.embed.element_size()
        if self._new and budget_bytes < least:
            remedy = (
                f"a start as the target's last layer takes {least} bytes of features; or use start='random'"
            )
            raise invalid("budget_bytes", budget_bytes, remedy)
        self._version: int | None = engine.backend.weights.version
        self._judge = EagleModule(module.spec, module.draft_tokens).to(self.trainer.device)
        self.taught = EpisodeBuffer(budget_bytes, seed=seed)
        self.judged = EpisodeBuffer(max(1, budget_bytes // 10), seed=seed)
        self._batch_tokens = batch_tokens
        self.capture = FeatureCapture(engine, self.add, module.spec.feature_layers)

    @classmethod
    def begin(
        cls, served: ServedEngine, config: TrainConfig | None = None, checkpoint: str = "", **options: Any
    ) -> DrafterTrainee:
        """On a served engine, from nothing or from a checkpoint folder. `functools.partial` of it makes trainees in Ray.

        Args:
            served: With the spec of the drafter; from a checkpoint, it gets that one's.
            config: How to train; None: `usual_config`.
            checkpoint: Of `rollout-spec drafter train`.
            options: Others of the class.

        Raises:
            InvalidRequest: There is no spec, or it is of another kind than the checkpoint.
            CheckpointError: See `read_checkpoint`.
        """
        engine = served.engine
        if checkpoint:
            module = read_checkpoint(checkpoint).module()
            kind = module.spec.kind
            if served.spec is not None and served.spec.kind != kind:
                raise invalid(
                    "kind", served.spec.kind, f"{checkpoint} holds a drafter of kind {kind!r}; use that kind"
                )
            served.spec = module.spec
        elif served.spec is None:
            raise invalid("spec", None, "give the served engine the EagleSpec of the drafter to train")
        else:
            module = EagleModule(served.spec, seed=0 if config is None else config.seed)
        config = config or usual_config(checkpoint, module.spec.kind)
        return cls(engine, module.to(engine.backend.device), config, new=not checkpoint, **options)

    @property
    def bytes(self) -> int:
        """Parameters, gradients, moments and average, and what the forward pass of a micro-batch keeps, as much as the first four."""
        return (9 if self.trainer.config.average_share else 8) * sum(
            p.numel() * p.element_size() for p in self.trainer.module.parameters()
        )

    def add(self, episode: Episode) -> bool:
        """Take in an episode; called by the capture."""
        request = episode.request_id.rsplit("/", 1)[0].encode()
        held = int.from_bytes(hashlib.blake2b(request, digest_size=8).digest(), "big") % self._held_out == 0
        self.taught.advance(episode.version)
        self.judged.advance(episode.version)
        return (self.judged if held else self.taught).add(episode)

    def micro_step(self) -> float | None:
        """One update."""
        self._follow_policy()
        if self._new and not self._start():
            return None
        batch = next(self.taught.batches(self._batch_tokens), None)
        return None if batch is None else self.trainer.step(batch).loss

    def _start(self) -> bool:
        """Start as the target's last layer, fitted to few samples, for it should not take long; False: too few yet."""
        hidden, sequences, pairs = self.trainer.module.spec.hidden_size, list[Tensor](), 0
        for episode in self.taught.episodes():
            if pairs < _START_PAIRS * hidden:
                sequences.append(episode.tokens)
                pairs += len(episode.tokens) - 1
        if pairs < 2 * hidden:
            return False
        target = self._engine.backend.weights.target
        self.trainer.restart(lambda module: start_as_last_layer(module, target, sequences))
        self._new = False
        return True

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, on the CPU."""
        return _on_host(self.trainer.tensors())

    def load(self, state: Tensors) -> None:
        """Take a state over."""
        self.trainer.take(state)
        self._new = False

    def candidate(self) -> dict[str, Tensor]:
        """The drafter by its checkpoint names, on the CPU, with averaged weights if the training keeps them."""
        return _on_host(self.trainer.averaged())

    def evaluate(self, tensors: Tensors, needed: Callable[[], bool] = lambda: False) -> tuple[float, int]:
        """Share of drafts accepted, at the length trained for, on the newest held-out episodes."""
        self._follow_policy()
        chosen: list[Episode] = []
        room = self._judged_tokens
        for episode in reversed(self.judged.episodes()):
            room -= len(episode.tokens)
            if room < 0 and chosen:
                break
            chosen.append(episode)
        self._judge.load_state_dict(dict(tensors))
        length = self.trainer.config.unroll
        found = measure(
            self._judge, self.trainer.target, chosen, length, batch_tokens=self._batch_tokens, stop=needed
        )
        return ((found.tau - 1.0) / length, found.tokens) if found.tokens else (0.0, 0)

    def release(self) -> None:
        """Hold none of the policy's tensors until the next task: they are about to be freed."""
        self.trainer.target, self._version = None, None  # type: ignore[assignment]

    # --- inside ----------------------------------------------------------------------------------------

    def _lent(self) -> TargetTensors:
        return TargetTensors.of(self._engine.backend.weights.target)

    def _follow_policy(self) -> None:
        version = self._engine.backend.weights.version
        if version != self._version:
            self.trainer.target, self._version = self._lent(), version


def _on_host(tensors: Tensors) -> dict[str, Tensor]:
    """Copies for a coordinator, which may have no accelerator."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
