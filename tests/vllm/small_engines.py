"""Small in-process vLLM engines for tests, and what is asked of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.example_policy import example_folder, load_problems

# For tests that do not care which.
DRAFTER = "nf4" if torch.cuda.is_available() else usual_quantizer("cpu", torch.float32)
POLICY = str(example_folder() / "policy")


def policy_prompts(count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    return [tokenizer(text)["input_ids"] for text in load_problems().prompts(count, 0, "test")]


def perturbed(model: str, folder: Path, strength: float) -> str:
    """A copy of a checkpoint with noise on its matrices, relative to their spread: a drafter that is often wrong."""
    source = Path(model)
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(1)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator)
            weights[name] = (weight.float() + strength * weight.float().std() * noise).to(weight.dtype)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def tiny_model(folder: Path, vocab_size: int = 32) -> str:
    """A random two-layer Qwen3 whose distributions are broad but not flat."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
        initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    return str(folder)


def start(
    model: str = POLICY,
    *,
    drafts: int = 0,
    drafter: str | None = None,
    plugin: dict[str, Any] | None = None,
    speculative: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An engine in fp32; with `drafts` = K it speculates, with a copy of the target unless a drafter is named.

    Without `plugin`, the fields of `SpeculationConfig`, the plugin is inert.
    """
    from vllm import LLM

    if drafts:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": drafter or model,
            "num_speculative_tokens": drafts,
            "draft_sample_method": "probabilistic",
        } | (speculative or {})
    if plugin is not None:
        options["additional_config"] = {"rollout_spec": plugin}
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 128 << 20,
        "max_num_seqs": 64,
        "seed": 0,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(model=model, **(defaults | options))
    _alive.append(llm)
    _count_drafts(llm)
    return llm


_alive: list[Any] = []  # the first engine to go takes the process groups of all others with it


def stop_all() -> None:
    """Let go of every engine started so far."""
    _alive.clear()
    gc.collect()


def generate(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    """Token ids per prompt, of its first completion."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in llm.generate(given, params, use_tqdm=False)]


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def counts(llm: Any) -> dict[str, int]:
    """Drafts verified so far, and those accepted. (vLLM's metrics are those of the engine that started last.)"""
    return dict(llm.draft_counts)


def _count_drafts(llm: Any) -> None:
    it = scheduler(llm)
    llm.draft_counts = {"drafted": 0, "accepted": 0}

    def make_spec_decoding_stats(
        stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **rest: Any
    ) -> Any:
        llm.draft_counts["drafted"] += num_draft_tokens
        llm.draft_counts["accepted"] += num_accepted_tokens
        return type(it).make_spec_decoding_stats(it, stats, num_draft_tokens, num_accepted_tokens, **rest)

    it.make_spec_decoding_stats = make_spec_decoding_stats


@contextmanager
def random_draft_lengths(llm: Any, choices: Sequence[int], seed: int = 0) -> Iterator[None]:
    """Draw K anew for every step."""
    it = scheduler(llm)
    chance = random.Random(seed)

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = type(it).schedule(it, *args, **kwargs)
        output.num_spec_tokens_to_schedule = chance.choice(choices)
        return output

    it.schedule = schedule
    try:
        yield
    finally:
        del it.schedule


@contextmanager
def recorded_drafts(llm: Any) -> Iterator[dict[str, int]]:
    """Most drafts verified in one step, per request id as the caller gave it."""
    it = scheduler(llm)
    most: dict[str, int] = {}

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = type(it).schedule(it, *args, **kwargs)
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            given = it.requests[name].request_id.rsplit("-", 1)[0]
            most[given] = max(most.get(given, 0), len(drafts))
        return output

    it.schedule = schedule
    try:
        yield most
    finally:
        del it.schedule
