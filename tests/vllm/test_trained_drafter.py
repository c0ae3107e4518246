"""A drafter trained and exported here, in vLLM's own eagle and eagle3 paths: as well accepted there as in our engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.adaptive.export import export
from rollout_spec.adaptive.offline import new_trainer, roll_out, train
from rollout_spec.adaptive.packing import EpisodeBatches
from rollout_spec.adaptive.trainer import DrafterTrainer, TrainConfig
from rollout_spec.drafters.eagle_spec import EagleSpec, Kind
from rollout_spec.example_policy import load_problems
from rollout_spec.integrations.vllm.arguments import SCHEDULER, WORKER_EXTENSION
from rollout_spec.integrations.vllm.options import KEY
from tests.vllm.conftest import POLICY, Engines

pytest.importorskip("vllm")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

K = 5


def trained(engine: RolloutEngine, kind: Kind) -> DrafterTrainer:
    """A drafter that is right about every other time."""
    spec = EagleSpec.for_target(engine.backend.spec, kind)
    tokens = torch.arange(spec.vocab_size) if spec.own_head else None
    steps = 150
    config = TrainConfig(learning_rate=3e-3, total_steps=steps, unroll=3, row_tokens=192)
    trainer = new_trainer(engine.backend.weights.target, spec, config, tokens)
    episodes = roll_out(engine, spec, load_problems().prompts(400, 0, "train"), max_tokens=200)
    train(trainer, EpisodeBatches(episodes[20:], 512), episodes[:20], steps)
    return trainer


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_vllm_accepts_what_we_accept(kind: Kind, engines: Engines, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32}
    speculation = {
        "drafter": "none", "adaptive": True, "draft_length": K, "verifier": "rejection", "history": False, "shadow": False,
        "canary_min_acceptance": 0.0,
    }  # fmt: skip
    ours = RolloutEngine.from_pretrained(POLICY, speculation=speculation, **options)
    trainer = trained(ours, kind)
    folder = export(trainer.module.spec, trainer.module.state_dict(), tmp_path / kind, dtype=torch.float32)

    texts = load_problems().prompts(800, 3, "test")
    before = ours.stats().spec
    ours.publish_drafter(folder, spec=trainer.module.spec)
    completions = ours.generate(texts, SamplingParams(temperature=1.0, max_tokens=120, seed=1))
    after = ours.stats().spec
    drafted, accepted = after.drafted - before.drafted, after.accepted - before.accepted

    theirs = engines(
        speculative_config={
            "method": kind, "model": str(folder), "num_speculative_tokens": K, "draft_sample_method": "probabilistic",
        },
        additional_config={KEY: {"draft_length": K, "canary_min_acceptance": 0.0}},
        scheduler_cls=SCHEDULER, worker_extension_cls=WORKER_EXTENSION,
        max_num_seqs=32, enable_prefix_caching=False,
    )  # fmt: skip
    sampled = theirs.generate(
        [c.prompt_token_ids for c in completions], 120, temperature=1.0, ignore_eos=False, seed=1,
        stop_token_ids=list(ours.backend.spec.eos_token_ids),
    )  # fmt: skip
    there = theirs.counters()
    assert min(len(tokens) for tokens in sampled) > 0
    assert there[0] > 50_000 and drafted > 50_000, "of a quarter as many, 3 % is within chance"
    assert accepted / drafted > 0.1, "too little is accepted to compare"
    assert there[1] / there[0] == pytest.approx(accepted / drafted, rel=0.03)
