"""What it costs to turn speculation on and off at random in every step, part of `rollout-spec bench never-slower`.

Nothing is made or thrown away when speculation is turned on or off. But both kinds of steps read weights by way of one cache:
where that holds much of the policy, a step that drafted leaves less of it there for the next. Every way to mix them pays
this. How much it is shows in a rollout that never drafts: between its steps, as often as others would draft there, the drafter's
weights are read, outside of what is timed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.contracts import SamplingParams
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.drafters.quantized import QuantizedSelfDrafter
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems
from rollout_spec.models.weights import slots_of
from rollout_spec.policy.baselines import Stateless
from rollout_spec.policy.records import Plan, Reason, StepOutcome, StepState

_DRAFT_LENGTH = 4
_TOKENS = 160  # of every answer
_WARM = 8  # steps


class Switching(Stateless):
    """Speculates with K tokens in the steps that `on` says.

    Attributes:
        steps: Of those with all sequences live: whether it speculated, and the seconds.
    """

    def __init__(self, draft_length: int, batch: int, on: Callable[[], bool]) -> None:
        self.draft_length, self._batch, self._on = draft_length, batch, on
        self.steps: list[tuple[bool, float]] = []

    def plan(self, state: StepState) -> Plan:
        lengths = np.minimum(self.draft_length, state.allowed - 1)
        if lengths.any() and state.drafters and self._on():
            return Plan(lengths, np.zeros_like(lengths), state.drafters[0], Reason.FIXED)
        return Plan.plain(len(state.slots), Reason.FIXED)

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if len(state.slots) == self._batch:
            self.steps.append((plan.speculates, outcome.seconds))

    def count(self, on: bool) -> int:
        """Steps with speculation, or those without, that count: not the first, whose weights may be in no cache yet."""
        return sum(speculated is on for speculated, _ in self.steps[_WARM:])

    def mean(self, on: bool) -> float:
        """Mean of their seconds.

        A median would not see what half of the steps pay. The slowest twentieth, in which the machine did something else, is
        left out.
        """
        seconds = np.sort([s for speculated, s in self.steps[_WARM:] if speculated is on])
        return float(seconds[: math.ceil(0.95 * len(seconds))].mean())


class _Beside(Switching):
    """Decodes plainly; before steps that `on` says, it reads the drafter's weights as drafting would.

    Such a step reads the target's weights as verifying would. So it is not kept.
    """

    def __init__(self, engine: RolloutEngine, batch: int, on: Callable[[], bool]) -> None:
        super().__init__(0, batch, on)
        target, drafter = engine.backend.weights.target, engine.backend.weights.drafter
        assert isinstance(drafter, QuantizedSelfDrafter)
        slots = slots_of(target.weights)
        self._drafter = [
            (linear, torch.zeros(1, slots[slot].dense().shape[1], dtype=engine.backend.dtype))
            for slot, linear in drafter.linears.items()
        ]
        self._stands_in = False

    def observe(self, state: StepState, plan: Plan, outcome: StepOutcome) -> None:
        if not self._stands_in:
            super().observe(state, plan, outcome)
        self._stands_in = self._on()
        if self._stands_in:  # here, where no step is being timed
            self._read()

    @torch.inference_mode()
    def _read(self) -> None:
        for linear, row in _DRAFT_LENGTH * self._drafter:
            linear(row)


def toggling_overhead(path: Path, batch: int, pairs: int, seed: int) -> dict[str, Any]:
    """What switching at random in every step costs over the weighted mean of both modes.

    One engine emits the same tokens again and again, for several would push each other's weights out of the cache: on or off at
    random in every step, always on, always off, and always off beside the drafter's weights. The mean on and off steps of
    the first are compared with those of the others, in the proportions of the first.

    Returns:
        Median and interval over the comparisons: of `overhead`, over the modes alone; of `overhead_beyond_cache`, over always
        on alone and off beside the drafter's weights; and by how much steps of either mode take longer than alone.
    """
    engine = RolloutEngine.from_pretrained(
        path,
        seed=seed,
        max_model_len=512,
        max_num_seqs=batch,
        speculation={"drafter": usual_quantizer("cpu", torch.bfloat16), "draft_length": _DRAFT_LENGTH},
    )
    prompts = sorted(load_problems().prompts(256, seed, "test"), key=len)[-batch:]
    params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
    ids = [f"toggling-{row}" for row in range(batch)]
    rng = np.random.default_rng(seed)

    def heads() -> bool:
        return bool(rng.random() < 0.5)

    modes: dict[str, Callable[[], Switching]] = {
        "toggled": lambda: Switching(_DRAFT_LENGTH, batch, heads),
        "on": lambda: Switching(_DRAFT_LENGTH, batch, lambda: True),
        "off": lambda: Switching(_DRAFT_LENGTH, batch, lambda: False),
        "beside": lambda: _Beside(engine, batch, heads),
    }
    order, compared, answers = deque(modes), [], []
    for _ in range(pairs):
        order.rotate()
        done = {}
        for mode in order:
            engine.backend.policy = done[mode] = modes[mode]()
            answers.append([c.token_ids for c in engine.generate(prompts, params, request_ids=ids)])
        toggled, on, off, beside = (done[mode] for mode in modes)
        compared.append(
            {
                "overhead": overhead(toggled, on, off),
                "overhead_beyond_cache": overhead(toggled, on, beside),
                "on_toggled": toggled.mean(True) / on.mean(True) - 1,
                "off_toggled": toggled.mean(False) / off.mean(False) - 1,
                "off_beside": beside.mean(False) / off.mean(False) - 1,
            }
        )
    row: dict[str, Any] = {"batch": batch, "comparisons": pairs}
    for name in compared[0]:
        values = [found[name] for found in compared]
        low, high = median_interval(values)
        row[name] = {
            "median": round(float(np.median(values)), 4),
            "interval": [round(low, 4), round(high, 4)],
        }
    identical = all(answer == answers[0] for answer in answers)
    return row | {"identical": identical, "tokens": sum(map(len, answers[0]))}


def overhead(toggled: Switching, on: Switching, off: Switching) -> float:
    """Of the steps of `toggled`, over as many of either mode as the others took them."""
    ons, offs = toggled.count(True), toggled.count(False)
    taken = ons * toggled.mean(True) + offs * toggled.mean(False)
    return taken / (ons * on.mean(True) + offs * off.mean(False)) - 1
