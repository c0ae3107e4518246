"""A policy whose logprobs round little: fp32 differs between implementations by far less than 1e-5."""

from __future__ import annotations

import shutil
from pathlib import Path

from verl_runs import POLICY


def make_small_policy(folder: Path) -> Path:
    """A random Qwen3 of two layers with the arithmetic policy's tokenizer, sharp enough to be drafted for."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = Qwen3Config(
        **sizes, vocab_size=128, num_hidden_layers=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=True
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POLICY / name, folder / name)
    return folder


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: object = None) -> float:
    """A reward that differs between any two answers of this policy, so that there is something to learn."""
    return len(solution_str) % 11 / 10


REWARD = f"reward.custom_reward_function.path={Path(__file__)}"
