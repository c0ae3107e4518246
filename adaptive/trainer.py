"""Training a drafter in units of one micro-batch, between any two of which it can be stopped, saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rollout_spec.adaptive.acceptance import Acceptance, measure
from rollout_spec.adaptive.losses import Objective, log_distribution, tv
from rollout_spec.adaptive.module import EagleModule, TargetTensors
from rollout_spec.adaptive.packing import Batch, pack
from rollout_spec.adaptive.samples import Episode
from rollout_spec.contracts import RolloutSpecError, invalid
from rollout_spec.observe.machine import BF16_FEATURES, cpu_model


class TrainingError(RolloutSpecError, RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        start: Of a new drafter: `random`, or `layer`, see `start_as_last_layer`; for kind `eagle`.
        learning_rate: Of AdamW, after the warm-up.
        relative_rate: Multiply the rate of each matrix by sqrt(H) times the root mean square of its weights, about 1 for a
            random start: what works on a small scale moves in small steps (Shazeer and Stern 2018, arXiv 1804.04235).
        warmup_steps: Micro-batches over which the rate rises from 0.
        total_steps: Micro-batches over which it then falls to `final_rate` of itself, along a half cosine; None:
            it stays, as for training that has no end.
        final_rate: See there.
        average: Share that a running average of the weights keeps in a micro-batch; 0: no average. It does for training
            without end what the falling rate does for one with an end. None: 0.99 without `total_steps`, else 0.
        weight_decay, betas: Of AdamW.
        gradient_clip: Largest norm of the gradient.
        unroll: Steps on the drafter's own states, as many as it is to draft (see `module`).
        first_unroll: Steps to begin with, rising to `unroll` over the first three quarters of `total_steps`: early on, later
            steps cost as much as the first and learn from states that mean nothing yet. None: `unroll`.
        begin_share: Share of the positions at which a round of more than one step begins, drawn anew in every
            micro-batch. Drafting begins a round once in tau tokens; beginning it everywhere costs `unroll` times as much.
        step_decay: Weight of a step's loss over that of the step before.
        replay: What a prediction that verification rejected counts for beyond 1.
        row_tokens: Longest row of a batch; longer episodes are cut.
        autocast: Compute in bfloat16 what torch's autocast does, where the device has such products (a CPU without
            them takes ten times as long); weights and their sums stay in float32.
        objective: The loss.
        last_objective: The loss in the last two fifths of `total_steps`; None: the same.
        seed: Of the initial weights.
    """

    start: Literal["random", "layer"] = "random"
    learning_rate: float = 2e-3
    relative_rate: bool = False
    warmup_steps: int = 30
    total_steps: int | None = None
    final_rate: float = 0.1
    average: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    unroll: int = 5
    first_unroll: int | None = None
    begin_share: float = 0.35
    step_decay: float = 0.9
    replay: float = 1.0
    row_tokens: int = 512
    autocast: bool = True
    objective: Objective = field(default_factory=Objective)
    last_objective: Objective | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in ("random", "layer"):
            raise invalid("start", self.start, "use random or layer")
        for name in ("learning_rate", "gradient_clip", "step_decay"):
            if not getattr(self, name) > 0:
                raise invalid(name, getattr(self, name), "use a number > 0")
        for name in ("unroll", "row_tokens"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "use an integer >= 1")
        for name in ("warmup_steps", "replay", "weight_decay", "final_rate"):
            if not getattr(self, name) >= 0:
                raise invalid(name, getattr(self, name), "use a number >= 0")
        if self.average is not None and not 0 <= self.average < 1:
            raise invalid("average", self.average, "use a share within [0, 1)")
        if not 0 < self.begin_share <= 1:
            raise invalid("begin_share", self.begin_share, "use a share within (0, 1]")
        if self.first_unroll is not None and not 1 <= self.first_unroll <= self.unroll:
            raise invalid(
                "first_unroll", self.first_unroll, f"use an integer within 1 .. unroll={self.unroll}"
            )
        for name in ("first_unroll", "last_objective"):
            if getattr(self, name) is not None and self.total_steps is None:
                raise invalid(name, getattr(self, name), "give total_steps, or leave it out")
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise invalid("total_steps", self.total_steps, f"must exceed warmup_steps={self.warmup_steps}")

    def without_end(self) -> TrainConfig:
        """For training that goes on from where this one led: with its last loss, at a third of its rate."""
        return replace(
            self,
            learning_rate=self.learning_rate / 3,
            total_steps=None,
            first_unroll=None,
            objective=self.last_objective or self.objective,
            last_objective=None,
        )

    @property
    def average_share(self) -> float:
        """`average`, decided."""
        if self.average is not None:
            return self.average
        return 0.99 if self.total_steps is None else 0.0

    def unrolled(self, step: int) -> int:
        """Steps that micro-batch `step`, from 0, is unrolled for."""
        if self.first_unroll is None or self.total_steps is None:
            return self.unroll
        stretch = 0.75 * self.total_steps / max(1, self.unroll - self.first_unroll)
        return min(self.unroll, self.first_unroll + int(step / stretch))

    def loss(self, step: int) -> Objective:
        """Of micro-batch `step`, from 0."""
        last = self.last_objective
        if last is None or self.total_steps is None or step < 0.6 * self.total_steps:
            return self.objective
        return last

    def rate(self, step: int) -> float:
        """Learning rate of micro-batch `step`, from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.total_steps is None or step < self.warmup_steps:
            return self.learning_rate * warm
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True)
class StepMetrics:
    """Of one micro-batch, before its update.

    Attributes:
        step: Its number, from 0.
        loss: The objective.
        alpha: Mean of 1 - TV(p, q) at each step of the unrolling.
        tokens: Predictions in the loss of step 0.
        gradient_norm: Before clipping.
        learning_rate: That it was applied with.
    """

    step: int
    loss: float
    alpha: tuple[float, ...]
    tokens: int
    gradient_norm: float
    learning_rate: float


class DrafterTrainer:
    """Trains `module` on episodes of the target that `target` is of. Everything is deterministic.

    Args:
        module: Float32; trained in place.
        target: Read only. Assign another after a policy update.
        config: How.

    Raises:
        InvalidRequest: The objective or the start does not fit the kind of drafter.
    """

    def __init__(self, module: EagleModule, target: TargetTensors, config: TrainConfig | None = None) -> None:
        self.module, self.target, self.config = module, target, config or TrainConfig()
        for objective in (self.config.objective, self.config.last_objective or self.config.objective):
            objective.check(module.spec.kind)
        if self.config.start == "layer" and module.spec.kind != "eagle":
            raise invalid("start", "layer", f"kind {module.spec.kind!r} cannot; use random")
        self.steps_done = 0
        self._bfloat16 = self.config.autocast and _multiplies_bfloat16(target.embed.device)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [{"params": [p]} for p in self._parameters],
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,  # one pass over the memory instead of one per operation
        )
        self._average: dict[str, Tensor] = {}
        if self.config.average_share:
            trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
            self._average = {name: p.detach().clone() for name, p in trained}

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    def step(self, episodes: Sequence[Episode]) -> StepMetrics:
        """Learn from one micro-batch: forward, backward, update. It can be interrupted after any call, not within.

        Raises:
            InvalidRequest: See `pack`.
            TrainingError: The gradient is not finite; nothing was updated.
        """
        config = self.config
        batch = pack(episodes, config.row_tokens, replay=config.replay).to(self.device)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            step = self.steps_done
            loss, alpha = unrolled_loss(
                self.module,
                self.target,
                batch,
                config,
                config.unrolled(step),
                self._begin(batch),
                config.loss(step),
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.gradient_clip)
        rate = config.rate(self.steps_done)
        for group, scale in zip(self._optimizer.param_groups, self._scales(), strict=True):
            group["lr"] = rate * scale
        if not torch.isfinite(norm):
            raise TrainingError(
                f"step {self.steps_done}: the gradient is {norm.item()}; lower learning_rate={config.learning_rate}"
            )
        self._optimizer.step()
        if self._average:
            with torch.no_grad():
                torch._foreach_lerp_(list(self._average.values()), self._parameters, 1 - config.average_share)
        step, self.steps_done = self.steps_done, self.steps_done + 1
        shares = tuple(torch.stack(alpha).tolist())
        return StepMetrics(step, loss.item(), shares, int((batch.weights > 0).sum()), norm.item(), rate)

    def _scales(self) -> list[float]:
        """Of the rate, by parameter, see `TrainConfig.relative_rate`."""
        scales = [1.0] * len(self._parameters)
        if self.config.relative_rate:
            matrices = [(i, p) for i, p in enumerate(self._parameters) if p.dim() == 2]
            norms = torch.stack(torch._foreach_norm([p.detach() for _, p in matrices])).tolist()
            for (i, p), norm in zip(matrices, norms, strict=True):
                scales[i] = norm * (self.module.spec.hidden_size / p.numel()) ** 0.5
        return scales

    def _begin(self, batch: Batch) -> Tensor | None:
        """Where rounds begin in the next micro-batch, by seed and step."""
        share = self.config.begin_share
        if share == 1:
            return None
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        return (torch.rand(batch.tokens.shape, generator=generator) < share).to(self.device)

    def restart(self, start: Callable[[EagleModule], None]) -> None:
        """Before the first step: let `start` overwrite the weights, and average from there."""
        start(self.module)
        for name, tensor in self._average.items():
            tensor.copy_(self.module.state_dict()[name])

    def acceptance(self, episodes: Sequence[Episode], draft_length: int | None = None) -> Acceptance:
        """Expected acceptance on held-out episodes, see `acceptance.measure`; None: at the length it is unrolled to."""
        return measure(
            self.module,
            self.target,
            episodes,
            draft_length or self.config.unroll,
        )

    def averaged(self) -> dict[str, Tensor]:
        """The drafter by its checkpoint names, referenced, with the running average of its weights where one is kept."""
        return self.module.state_dict() | self._average

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name, referenced: all that is averaged between trainings of one drafter."""
        found = {f"weights/{name}": tensor for name, tensor in self.module.state_dict().items()}
        for index, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            if not state:  # as the first step would make them
                zero = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                step = torch.zeros((), device=parameter.device)  # as fused updates want it
                state |= {"step": step, "exp_avg": zero, "exp_avg_sq": zero.clone()}
            found |= {f"moments/{index}/{name}": tensor for name, tensor in state.items()}
        return found | {f"average/{name}": tensor for name, tensor in self._average.items()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from copies of another training's `tensors`."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.steps_done = int(tensors["moments/0/step"])

    def state_dict(self) -> dict[str, Any]:
        """All that `step` depends on, but the target and the episodes. Tensors are referenced, not copied."""
        return {
            "steps_done": self.steps_done,
            "config": asdict(self.config),
            "module": self.module.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            InvalidRequest: It was trained with another configuration.
        """
        if state["config"] != asdict(self.config):
            differing = {k for k, v in asdict(self.config).items() if state["config"].get(k) != v}
            raise invalid(
                "config", sorted(differing), "resume with the configuration that training began with"
            )
        self.module.load_state_dict(state["module"])
        for name, tensor in self._average.items():
            tensor.copy_(state["average"][name])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.steps_done = state["steps_done"]


def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or not BF16_FEATURES.isdisjoint(cpu_model()[1])


def unrolled_loss(
    module: EagleModule,
    target: TargetTensors,
    batch: Batch,
    config: TrainConfig,
    steps: int | None = None,
    begin: Tensor | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The objective over all steps of the unrolling, and per step the mean of 1 - TV(p, q).

    In each step the loss is averaged over its predictions, by weight; the steps are averaged by `step_decay ** j`.

    Args:
        module, target, batch: See `EagleModule.unroll`.
        config: Weights of steps and losses.
        steps: Of the unrolling; None: `config.unroll`.
        begin: bool [B, L]: where rounds of more than one step begin; None: everywhere.
        objective: The loss; None: `config.objective`.
    """
    objective = objective or config.objective
    spec, counted = module.spec, (batch.weights > 0).flatten().nonzero()[:, 0]

    def chosen(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[counted]

    next_features, weights = chosen(batch.next_features), chosen(batch.weights)
    with torch.no_grad():
        _, on_draft = log_distribution(target.logits(spec, next_features), module.draft_tokens)
    total, scale, alpha = weights.new_zeros(()), 0.0, []
    for step, states in enumerate(module.unroll(target, batch, steps or config.unroll, begin)):
        used = chosen(batch.drafts(step, begin if step else None)).nonzero()[:, 0]
        if not len(used):
            alpha.append(weights.new_zeros(()))
            continue
        mine, p, w = chosen(states)[used], on_draft[used], weights[used]
        log_q = module.logits(target, mine).log_softmax(-1)
        losses = objective(p, log_q, mine, next_features[used][:, -spec.hidden_size :])
        factor = config.step_decay**step
        total = total + factor * (losses * w).sum() / w.sum()
        scale += factor
        with torch.no_grad():
            alpha.append(1.0 - tv(p, log_q).mean())
    return total / max(scale, 1e-30), alpha
