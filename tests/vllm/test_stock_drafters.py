"""vLLM's own drafters under the policy: stamped, counted, and greedy outputs unchanged; and the hidden states seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_engines import DRAFTER, perturbed

from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm import hidden_states
from rollout_spec.integrations.vllm.arguments import SCHEDULER, WORKER_EXTENSION, llm_arguments
from rollout_spec.integrations.vllm.options import KEY
from rollout_spec.policy.baselines import Fixed, Off
from tests.vllm.conftest import POLICY, Engine, Engines, prompts, run_apart

pytest.importorskip("vllm")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = prompts(3) + prompts(1, 100)
LENGTHS = [40, 24, 33, 30]


def stock(method: str, model: str, **speculation: Any) -> dict[str, Any]:
    return {
        "additional_config": {KEY: speculation},
        "scheduler_cls": SCHEDULER,
        "worker_extension_cls": WORKER_EXTENSION,
        "speculative_config": {"method": method, "model": model, "num_speculative_tokens": 4},
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 64,  # so that the long prompt comes in chunks
    }


def eagle3_head(folder: Path) -> str:
    """A head with random weights for the shipped policy."""
    folder.mkdir()
    H, inner, V, heads, kv, dim = 256, 512, 128, 4, 2, 64
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": H, "intermediate_size": inner, "num_attention_heads": heads, "head_dim": dim,
        "num_key_value_heads": kv, "num_hidden_layers": 1, "vocab_size": V, "draft_vocab_size": V,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
        "tie_word_embeddings": False, "torch_dtype": "float32", "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        "fc": (H, 3 * H), "midlayer.self_attn.q_proj": (heads * dim, 2 * H),
        "midlayer.self_attn.k_proj": (kv * dim, 2 * H), "midlayer.self_attn.v_proj": (kv * dim, 2 * H),
        "midlayer.self_attn.o_proj": (H, heads * dim), "midlayer.mlp.gate_proj": (inner, H),
        "midlayer.mlp.up_proj": (inner, H), "midlayer.mlp.down_proj": (H, inner), "lm_head": (V, H),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    weights = {f"{n}.weight": torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
    norms = "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"
    save_file(
        weights | {f"{name}.weight": torch.ones(H) for name in norms}, str(folder / "model.safetensors")
    )
    return str(folder)


class Collector:
    """The captured state of every position of every request; no position may come again with another token."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, tuple[int, torch.Tensor]]] = {}
        self.contradictions = 0

    def __call__(self, seen: hidden_states.HiddenStates) -> None:
        assert len(seen.tokens) == len(seen.positions) == len(seen.states) == int(seen.counts.sum())
        parts = zip(*(x.split(seen.counts.tolist()) for x in (seen.positions, seen.tokens, seen.states)))
        for name, (positions, tokens, states) in zip(seen.request_ids, parts, strict=True):
            kept = self.found.setdefault(name, {})
            for position, token, state in zip(positions.tolist(), tokens.tolist(), states):
                self.contradictions += kept.get(position, (token,))[0] != token
                kept[position] = token, state

    def sequences(self) -> list[tuple[list[int], torch.Tensor]]:
        """Tokens and states of each request in order of arrival; a gap in its positions is an error."""
        made = []
        for name in sorted(self.found, key=lambda x: int(x.partition("-")[0])):
            rows = [self.found[name][position] for position in range(len(self.found[name]))]
            made.append(([t for t, _ in rows], torch.stack([s for _, s in rows])))
        return made


@pytest.fixture
def collected() -> Iterator[Collector]:
    collector = Collector()
    stop = hidden_states.capture(collector)
    yield collector
    stop()


def reference(sequences: list[list[int]], layers: list[int]) -> list[torch.Tensor]:
    """Hidden states of a plain forward by transformers in float32; -1 is after the last norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        runs = [
            model(torch.tensor([tokens]), output_hidden_states=True).hidden_states for tokens in sequences
        ]
    return [torch.cat([run[layer][0] for layer in layers], -1) for run in runs]


def compare(engine: Engine, collected: Collector, layers: list[int]) -> float:
    """Largest difference from a forward of the finished sequences, with drafts accepted and rejected."""
    drafted, accepted = engine.counters()
    outputs = engine.generate(PROMPTS, LENGTHS, temperature=1.0)
    after = engine.counters()
    assert after[0] - drafted > after[1] - accepted, "nothing was rejected: this would prove nothing"
    whole = [prompt + output for prompt, output in zip(PROMPTS, outputs)]
    seen = collected.sequences()
    assert len(seen) == len(whole) and collected.contradictions == 0
    for (tokens, _), expected in zip(seen, whole):
        common = min(len(tokens), len(expected))
        assert tokens[:common] == expected[:common] and -1 <= len(tokens) - len(expected) <= 4
    computed = reference([tokens for tokens, _ in seen], layers)
    return max((a - b).abs().max().item() for (_, a), b in zip(seen, computed)) / size(computed, layers)


def size(states: list[torch.Tensor], layers: list[int]) -> float:
    """1 after the last norm; the residual stream inside the model is some hundreds, and so is its rounding."""
    return 1.0 if layers == [-1] else max(x.abs().max().item() for x in states)


def metric(name: str, **labels: str) -> float | None:
    from prometheus_client import REGISTRY

    value: float | None = REGISTRY.get_sample_value(f"rollout_spec:{name}", {"model_name": POLICY} | labels)
    return value


def state(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.llm.llm_engine.collective_rpc("rollout_spec_state")[0]
    return found


def check_policy(engine: Engine) -> None:
    """On and off under the policy; counted by reason and K; stamped with a version."""
    assert state(engine)["drafter_version"] == 0
    decisions = engine.scheduler.decisions
    plain_before = metric("decisions_total", reason="off") or 0.0
    fixed_before = metric("draft_lengths_total", draft_length="3") or 0.0
    decisions.policy = Off()
    plain = engine.generate(PROMPTS, LENGTHS)
    still = engine.counters()
    decisions.policy = Fixed(3)
    assert engine.generate(PROMPTS, LENGTHS) == plain
    assert engine.counters()[0] > still[0]
    assert metric("decisions_total", reason="off") - plain_before > 20
    assert metric("draft_lengths_total", draft_length="3") - fixed_before > 5
    told = state(engine)["decisions"]
    assert told["draft_lengths"] == dict(decisions.draft_lengths)
    assert told["reasons"] == {reason.value: n for reason, n in decisions.reasons.items()}
    assert metric("policy_version") == metric("drafter_version") == metric("version_lag") == 0


def test_a_draft_model(engines: Engines, tmp_path: Path, collected: Collector) -> None:
    engine = engines(**stock("draft_model", perturbed(POLICY, tmp_path / "other", 0.4)))
    check_policy(engine)
    assert engine.scheduler.decisions.drafter == "draft_model"
    collected.found.clear()
    assert compare(engine, collected, [-1]) < 1e-4
    blocks = engine.config.cache_config.num_gpu_blocks
    assert metric("drafter_kv_blocks") == blocks  # as many layers as the target's
    assert _in_step_with_vllm(engine)


def _in_step_with_vllm(engine: Engine) -> bool:
    """Whether nothing is verified where vLLM makes zeros of a batch's drafts, near `max_model_len`; and just before it is."""
    seen = [engine.counters()[0]]
    for length in (253, 251):
        engine.generate(prompts(1, length), 256 - length)
        seen.append(engine.counters()[0])
    return seen[0] == seen[1] < seen[2]


def test_an_eagle3_head(engines: Engines, tmp_path: Path, collected: Collector) -> None:
    engine = engines(**stock("eagle3", eagle3_head(tmp_path / "head")))
    check_policy(engine)
    assert engine.scheduler.decisions.drafter == "eagle3"
    collected.found.clear()
    assert compare(engine, collected, [1, 2, 3]) < 1e-5
    blocks = engine.config.cache_config.num_gpu_blocks
    assert metric("drafter_kv_blocks") == round(blocks / 4)  # one layer beside four


def test_a_head_that_raises_costs_nothing_but_speed(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs it in every step, to draft nothing too, so it is not run again."""
    engine = engines(**stock("eagle3", eagle3_head(tmp_path / "head")))
    assert state(engine)["drafts"]
    engine.scheduler.decisions.policy = Fixed(3)
    before, expected = engine.counters(), engine.generate(PROMPTS, LENGTHS)
    assert engine.counters() > before
    calls = []

    def broken(**given: Any) -> None:
        calls.append(1)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(engine.drafter, "set_inputs_first_pass", broken)
    before = engine.counters()
    assert engine.generate(PROMPTS, LENGTHS) == expected
    assert calls == [1] and engine.counters() == before
    assert state(engine)["reports"][-1]["cause"] == "raised" and not state(engine)["drafts"]
    assert metric("drafter_set_aside", by="worker") == 1


class TestSelfDrafter:
    @pytest.fixture
    def engine(self, engines: Engines) -> Engine:
        options = llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 4})
        engine = engines(**options, enable_prefix_caching=False, max_num_batched_tokens=64)
        engine.scheduler.decisions.policy = Fixed(4)
        return engine

    def test_hidden_states(self, engine: Engine, collected: Collector) -> None:
        assert compare(engine, collected, [-1]) < 1e-4

    def test_with_the_drafter_off(self, engine: Engine, collected: Collector) -> None:
        engine.scheduler.decisions.policy = Off()
        outputs = engine.generate(PROMPTS, LENGTHS)
        whole = [prompt + output for prompt, output in zip(PROMPTS, outputs)]
        assert [tokens for tokens, _ in collected.sequences()] == [tokens[:-1] for tokens in whole]

    def test_rejected_rows_would_be_seen(
        self, engine: Engine, collected: Collector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Broken on purpose: what was rejected is given too."""
        from rollout_spec.integrations.vllm import self_drafter

        monkeypatch.setattr(self_drafter, "offer", lambda *given: hidden_states.offer(*given[:-1], None))
        (drafted, accepted), rounds = engine.counters(), 0
        while drafted == accepted or not rounds:  # by chance all drafts of one round may be right
            before = engine.counters()
            engine.generate(PROMPTS, LENGTHS, temperature=2.0)
            drafted, accepted = (now - old for now, old in zip(engine.counters(), before, strict=True))
            rounds += 1
            assert rounds < 20, "nothing is ever rejected"
        assert collected.contradictions > 0

    def test_nothing_is_done_without_a_callback(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hidden_states, "HiddenStates", None)
        engine.generate(PROMPTS[:1], 12)

    def test_a_callback_that_raises_is_dropped(
        self, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = []

        def broken(seen: hidden_states.HiddenStates) -> None:
            calls.append(seen)
            raise ValueError("full")

        hidden_states.capture(broken)
        assert len(engine.generate(PROMPTS[:1], 12)[0]) == 12
        assert len(calls) == 1 and "no longer captured" in caplog.text

    def test_it_costs_no_blocks(self, engine: Engine) -> None:
        state(engine)  # what the scheduler says is kept from here on
        engine.generate(PROMPTS[:1], 4)
        assert metric("drafter_kv_blocks") == state(engine)["decisions"]["drafter_kv_blocks"] == 0

    def test_what_the_scheduler_set_aside_is_published(self, engine: Engine) -> None:
        decisions = engine.scheduler.decisions
        decisions.least_acceptance, kept = 1.0, decisions.least_acceptance
        try:
            engine.generate(prompts(8), 120)
            assert decisions.set_aside is not None
            assert metric("drafter_set_aside", by="scheduler") == 1
            engine.generate(PROMPTS[:1], 4)
            assert "canary_min_acceptance" in state(engine)["decisions"]["set_aside"]
        finally:
            decisions.least_acceptance = kept
            engine.scheduler.reset_prefix_cache()
        assert decisions.set_aside is None and metric("drafter_set_aside", by="scheduler") == 0


SEPARATE = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from vllm import LLM, SamplingParams

def main():
    given = json.load(sys.stdin)
    from vllm.v1.metrics.prometheus import get_prometheus_registry
    llm = LLM(**given["options"])
    llm.llm_engine.collective_rpc("rollout_spec_start", args=(7,))
    llm.llm_engine.collective_rpc("rollout_spec_capture", args=("keep_states:keep",))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": x} for x in given["prompts"]], params, use_tqdm=False)
    state = llm.llm_engine.collective_rpc("rollout_spec_state")[0]
    seen = {}
    for found in get_prometheus_registry().collect():
        if found.name.startswith("rollout_spec:"):
            for sample in found.samples:
                labels = [v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "pid")]
                seen["/".join([sample.name, *labels])] = sample.value
    print("RESULT" + json.dumps({"state": state, "metrics": seen}))
    llm.llm_engine.engine_core.shutdown()

if __name__ == "__main__":
    main()
"""
KEEP = """
import os
def keep(seen):
    with open(os.environ["KEPT"], "a") as file:
        file.write(f"{len(seen.tokens)}\\n")
"""


def test_from_a_process_of_its_own(tmp_path: Path) -> None:
    """Engine core and worker apart from the front end: figures by RPC, and by Prometheus' own way between processes."""
    from tests.vllm.conftest import SMALL

    (tmp_path / "keep_states.py").write_text(KEEP, encoding="utf-8")
    (tmp_path / "metrics").mkdir()
    options = SMALL | llm_arguments(POLICY, {"drafter": DRAFTER, "draft_length": 2})
    found = run_apart(
        SEPARATE,
        {"options": options, "prompts": PROMPTS[:2]},
        tmp_path,
        PYTHONPATH=":".join([str(tmp_path), *sys_path()]),
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics"),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        KEPT=str(tmp_path / "kept"),
    )
    steps = found["state"]["decisions"]["draft_lengths"]["2"]
    assert steps > 5 and found["state"]["version"] == found["state"]["drafter_version"] == 7
    seen = found["metrics"]
    assert seen["rollout_spec:draft_lengths_total/2"] == steps
    assert seen["rollout_spec:decisions_total/fixed"] >= steps
    assert seen["rollout_spec:policy_version"] == 7 and seen["rollout_spec:version_lag"] == 0
    assert seen["rollout_spec:drafter_kv_blocks"] == 0
    assert sum(map(int, (tmp_path / "kept").read_text().split())) >= 2 * (20 + 23)


def sys_path() -> list[str]:
    import os

    return [x for x in os.environ.get("PYTHONPATH", "").split(":") if x]


def test_capture_names_are_checked(engines: Engines) -> None:
    from rollout_spec.integrations.vllm.worker import WorkerExtension

    with pytest.raises(InvalidRequest, match=r"function='nowhere'.*module:function"):
        WorkerExtension.rollout_spec_capture(None, "nowhere")  # type: ignore[arg-type]


def test_vllms_proposers_still_forget_their_runner() -> None:
    """When this fails, `hidden_states` need not keep it any more."""
    import inspect

    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    assert "self.runner =" not in inspect.getsource(SpecDecodeBaseProposer.__init__)
