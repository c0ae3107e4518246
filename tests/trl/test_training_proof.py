"""A longer training with our generation and with TRL's own: a proof whose result is committed."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from arithmetic_training import GROUP, POLICY, train

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.example_policy import load_problems
from rollout_spec.observe.machine import cpu_model, installed_versions

pytest.importorskip("trl", reason="needs requirements/trl.txt")
RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu" / "trl.json"
STEPS, PROMPTS, HELD_OUT = 40, 8, 400
OPTIONS = {"dtype": "float32", "speculation": {"drafter": "int8", "draft_length": 4}}


def accuracy(engine: RolloutEngine) -> float:
    """Share of held-out problems that greedy answers get right."""
    problems = load_problems()
    held_out = problems.sample(HELD_OUT, seed=11, split="test")
    answers = engine.generate([p.prompt for p in held_out], SamplingParams(temperature=0, max_tokens=160))
    return statistics.mean(problems.reward(p, a.text) for p, a in zip(held_out, answers))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_reaches_the_level_of_trls_own_generation(tmp_path: Path) -> None:
    from rollout_spec.integrations.trl.rollout import EngineRollout

    engine = RolloutEngine.from_pretrained(POLICY, OPTIONS)
    before = accuracy(engine)
    figures: dict[str, Any] = {}
    for version, (name, rollout) in enumerate((("rollout_spec", EngineRollout(OPTIONS)), ("trl", None)), 1):
        start = time.perf_counter()
        run = train(tmp_path, rollout, max_steps=STEPS, prompts=PROMPTS)
        seconds = time.perf_counter() - start
        engine.update_weights(run.trainer.model.named_parameters(), version=version)
        means = [statistics.mean(batch) for batch in run.scores]
        figures[name] = {
            "held_out_accuracy": accuracy(engine),
            "mean_reward": round(statistics.mean(means), 4),
            "mean_reward_last_10": round(statistics.mean(means[-10:]), 4),
            "seconds": round(seconds, 1),
            "rewards": [round(mean, 4) for mean in means],
        }
    ours, theirs = figures["rollout_spec"], figures["trl"]
    assert abs(ours["held_out_accuracy"] - theirs["held_out_accuracy"]) <= 0.05
    assert abs(ours["mean_reward"] - theirs["mean_reward"]) <= 0.05
    if os.environ.get("ROLLOUT_SPEC_WRITE_RESULTS"):
        report = {
            "what": f"GRPO with TRL, {STEPS} steps of {PROMPTS} prompts x {GROUP} samples, same prompts in the same order, T=1",
            "evidence": "L1",
            "command": "ROLLOUT_SPEC_WRITE_RESULTS=1 pytest -m slow tests/trl",
            "machine": {"cpu": cpu_model()[0], "versions": installed_versions()},
            "held_out_problems": HELD_OUT,
            "held_out_accuracy_before": before,
            **figures,
        }
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
