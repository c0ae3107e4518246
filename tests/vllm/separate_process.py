"""Run as a script: vLLM in a process of its own, updated while requests are in flight; prints what was seen as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

from small_engines import DRAFTER, POLICY, policy_prompts  # isort: skip
from safetensors.torch import load_file

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.integrations.vllm import weights


def refusal(attempt: Callable[[], object]) -> str:
    """What an attempt that must fail says."""
    try:
        attempt()
    except RolloutSpecError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def main(folder: str, version: int) -> None:
    """Update to the policy in `folder`, in small chunks."""
    weights.CHUNK_BYTES = 1 << 20
    engine = RolloutEngine.from_pretrained(
        POLICY,
        backend="vllm",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=32,
        kv_cache_bytes=64 << 20,
        speculation={"drafter": DRAFTER, "draft_length": 4, "verifier": "coupled"},
        vllm={"enforce_eager": True},
    )
    prompts, ids = policy_prompts(4), [f"r{i}" for i in range(4)]
    sampled = SamplingParams(max_tokens=32, seed=3)
    greedy = SamplingParams(max_tokens=32, temperature=0)

    def outputs() -> list[list[int]]:
        made = [c for p in (greedy, sampled) for c in engine.generate(prompts, p, request_ids=ids)]
        return [c.token_ids for c in made]

    seen: dict[str, object] = {
        "shares_process": weights.shares_process(engine.backend.engine),
        "first": outputs(),
    }
    first = engine.generate(prompts, SamplingParams(max_tokens=24, seed=5))
    seen["logprobs"] = [(c.prompt_token_ids + c.token_ids, c.logprobs) for c in first]
    long = SamplingParams(max_tokens=160, seed=3, ignore_eos=True)
    groups = engine._submit(*engine._reader.read(prompts, long, None, None, None))
    for _ in range(2):
        engine._advance()
    pairs = list(load_file(f"{folder}/model.safetensors").items())
    report = engine.update_weights(pairs, version=version)
    while any(group[0].finish_reason is None for group in groups):
        engine._advance()
    seen["lengths"] = [len(group[0].output) for group in groups]
    seen["starts"] = [group[0].version_starts for group in groups]
    seen["tensors"], seen["quantize_seconds"] = report.tensors, report.quantize_seconds
    seen["outputs"] = outputs()
    stats = engine.stats()
    seen["stats"] = [stats.version, stats.drafter, stats.canary_acceptance, stats.spec.accepted]
    seen["refused"] = [
        refusal(lambda: engine.update_weights(pairs[1:])),
        refusal(lambda: engine.generate(prompts, sampled)),
    ]
    print("SEEN " + json.dumps(seen))
    engine.backend.engine.engine_core.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
