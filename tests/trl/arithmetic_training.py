"""GRPO with TRL on the arithmetic policy, with whatever generates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout_spec.example_policy import example_folder, load_problems

POLICY = example_folder() / "policy"
GROUP = 4


@dataclass
class Run:
    """What a training run showed: per generated batch the texts and their scores, its log, and the trainer."""

    completions: list[list[str]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    trainer: Any = None

    @property
    def log(self) -> list[dict[str, float]]:
        return [entry for entry in self.trainer.state.log_history if "reward" in entry]


def make_trainer(folder: Path, rollout_func: Any = None, *, prompts: int = 8, **settings: Any) -> Run:
    """A trainer of the shipped policy in fp32, on problems in a fixed order; `settings` are GRPOConfig's."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    problems = load_problems()
    rows = [{"prompt": p.prompt, "answer": str(p.answer)} for p in problems.sample(400, seed=3)]
    run = Run()

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        scores = [problems.score(text, right) for text, right in zip(completions, answer)]
        run.completions.append(list(completions))
        run.scores.append(scores)
        return scores

    defaults: dict[str, Any] = {
        "per_device_train_batch_size": prompts * GROUP, "num_generations": GROUP, "max_completion_length": 160,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "optim": "adamw_torch", "seed": 1, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    torch.manual_seed(1)
    run.trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **(defaults | settings)),
        train_dataset=Dataset.from_list(rows),
        rollout_func=rollout_func,
    )
    return run


def train(folder: Path, rollout_func: Any = None, **settings: Any) -> Run:
    run = make_trainer(folder, rollout_func, **settings)
    run.trainer.train()
    return run
