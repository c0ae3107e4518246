"""The self-drafter on vLLM's V1 runner: nothing emitted changes, nothing is allocated for it, off is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engines import DRAFTER

from rollout_spec.integrations.vllm.arguments import llm_arguments
from rollout_spec.policy.baselines import Fixed, Off, RandomLengths, Stateless, uniform_plan
from rollout_spec.policy.records import Plan, Reason, StepState
from tests.vllm.conftest import POLICY, SMALL, Engine, Engines, prompts, run_apart

pytest.importorskip("vllm")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SPECULATING = llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 4})
DENSE = llm_arguments(POLICY, {"drafter": "dense", "longest_draft": 4})
CROWDED = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 48, "enable_prefix_caching": False}

SHORT, MANY, LONG, FULL = prompts(8), prompts(16, 12), prompts(6, 120), prompts(4, 200)
LENGTHS = [8 + 9 * (i * 7 % 11) for i in range(16)]  # requests that leave at different times
PREFIX = prompts(1, 100)[0]
FAMILY = [PREFIX + tail for tail in prompts(5, 9)]


@pytest.fixture(scope="module")
def stock(engines: Engines) -> dict[str, Any]:
    """What a vLLM without speculation and without the plugin's options says."""
    engine = engines()
    return {
        "short": engine.generate(SHORT, 64),
        "many": engine.generate(MANY, LENGTHS),
        "long": engine.generate(LONG, 90),
        "full": engine.generate(FULL, 100),
        "family": engine.generate(FAMILY, 40),
        "blocks": engine.config.cache_config.num_gpu_blocks,
    }


@pytest.fixture
def engine(stock: dict[str, Any], engines: Engines) -> Engine:
    """An engine with a quantized drafter, drafting 4 tokens a step."""
    engine = engines(**SPECULATING)
    engine.drafter.forwards = 0
    engine.scheduler.decisions.policy = Fixed(4)
    return engine


class Toggled(Stateless):
    """`first` and nothing in turn, for a number of steps each."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps, self.count = Fixed(first), steps, 0

    def plan(self, state: StepState) -> Plan:
        self.count += 1
        if (self.count // self.steps) % 2:
            return Plan.plain(len(state.slots), Reason.OFF)
        return self.first.plan(state)


class EveryLength(Stateless):
    """K = 0, 1, 2, 3, 4, 0, ..."""

    def __init__(self) -> None:
        self.count = -1

    def plan(self, state: StepState) -> Plan:
        self.count += 1
        return uniform_plan(state, self.count % 5)


@pytest.mark.parametrize(
    "policy", [Fixed(1), Fixed(4), RandomLengths(0, longest=4), RandomLengths(1, longest=4, off=0.7), Off()]
)
def test_greedy_tokens_are_those_of_plain_decoding(
    engine: Engine, stock: dict[str, Any], policy: Any
) -> None:
    engine.scheduler.decisions.policy = policy
    drafted, accepted = engine.counters()
    assert engine.generate(SHORT, 64) == stock["short"]
    drafted, accepted = (
        now - before for now, before in zip(engine.counters(), (drafted, accepted), strict=True)
    )
    if isinstance(policy, Off):
        assert (drafted, engine.drafter.forwards) == (0, 0)  # off is off
    else:
        assert accepted > 0.6 * drafted > 50 and engine.drafter.forwards > 20


def test_off_prepares_nothing(engine: Engine, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM prepares the drafter's inputs in every step, K = 0 or not; here only where they are drafted from."""
    from rollout_spec.integrations.vllm.hidden_states import capture

    prepared: list[int] = []
    prepare = engine.drafter.prepare_next_token_ids_padded

    def counting(*args: Any) -> Any:
        prepared.append(1)
        return prepare(*args)

    monkeypatch.setattr(engine.drafter, "prepare_next_token_ids_padded", counting)
    engine.scheduler.decisions.policy = Off()
    taken: list[int] = []
    take = engine.core.model_executor.take_draft_token_ids
    monkeypatch.setattr(engine.core.model_executor, "take_draft_token_ids", lambda: taken.append(1) or take())
    assert engine.generate(SHORT, 64) == stock["short"] and not prepared and not taken
    stop = capture(lambda seen: None)  # somebody wants what they hold
    try:
        engine.generate(SHORT, 8)
        assert len(prepared) == 8
    finally:
        stop()
    prepared.clear()
    engine.scheduler.decisions.policy = Toggled(2, 4)
    assert engine.generate(SHORT, 64) == stock["short"]
    lengths = engine.scheduler.decisions.draft_lengths
    assert 0 < len(prepared) < sum(lengths.values()) and len(taken) == len(prepared)

    # When this fails vLLM does neither by itself any more, and `skip_idle_drafting` or `take_only_drafts` can go.
    prepared.clear(), taken.clear()
    engine.scheduler.decisions.policy = Off()
    monkeypatch.setattr(engine.runner, "_rollout_spec_idles", False)
    monkeypatch.setattr(type(engine.scheduler), "drafting", True)
    assert engine.generate(SHORT, 8) == [tokens[:8] for tokens in stock["short"]]
    assert len(prepared) == len(taken) == 8


def test_off_looks_at_no_request(
    engine: Engine, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a policy rests, only steps with a prefill in them go through the requests."""
    looks: list[Any] = []
    look = engine.scheduler._look

    def looking(scheduled: Any) -> Any:
        looks.append(scheduled)
        return look(scheduled)

    monkeypatch.setattr(engine.scheduler, "_look", looking)
    engine.scheduler.decisions.policy = Off()
    engine.scheduler.decisions.reasons.clear()
    assert engine.generate(SHORT, 64) == stock["short"]
    assert len(looks) == 1 and engine.scheduler.decisions.reasons[Reason.OFF] >= 62


def test_requests_join_and_leave(engine: Engine, stock: dict[str, Any]) -> None:
    engine.scheduler.decisions.policy = RandomLengths(2, longest=4)
    assert engine.generate(MANY, LENGTHS) == stock["many"]
    assert engine.drafter.forwards > 50


def test_it_takes_no_kv_blocks(engine: Engine, stock: dict[str, Any]) -> None:
    assert engine.config.cache_config.num_gpu_blocks == stock["blocks"]
    context = engine.config.compilation_config.static_forward_context
    layers = [
        name for name in context if name.startswith("draft_model.") and hasattr(context[name], "kv_cache")
    ]
    assert len(layers) == 4
    for name in layers:
        assert context[name].kv_cache is context[name.removeprefix("draft_model.")].kv_cache
    embeddings = engine.drafter.model.model.embed_tokens.weight, engine.runner.model.model.embed_tokens.weight
    assert embeddings[0] is embeddings[1]
    dense = sum(x.numel() for x in engine.drafter.model.parameters()) - embeddings[0].numel()
    assert dense < 5000  # norms alone: the weights are quantized, and the dense ones gone


def test_prefix_cache_hits(engine: Engine, stock: dict[str, Any]) -> None:
    """Cached blocks hold what the target wrote, even where drafts were written before."""
    engine.llm.reset_prefix_cache()
    first = engine.run(FAMILY, 40)
    again = engine.run(FAMILY, 40)
    for outputs in (first, again):
        assert [list(x.outputs[0].token_ids) for x in outputs] == stock["family"]
    assert all(x.num_cached_tokens >= 96 for x in again)
    grown = [[*prompt, *tokens[:30]] for prompt, tokens in zip(FAMILY, stock["family"], strict=True)]
    hits = engine.run(grown, 10)  # these hit blocks that were filled while speculating
    assert [list(x.outputs[0].token_ids) for x in hits] == [tokens[30:] for tokens in stock["family"]]
    assert all(x.num_cached_tokens >= 128 for x in hits)


def test_near_the_longest_length(engine: Engine, stock: dict[str, Any]) -> None:
    """Drafts past the end go nowhere: neither into a block that others share, nor to anybody else's cost."""
    engine.llm.reset_prefix_cache()
    assert engine.generate(FULL, 100) == stock["full"]
    assert {len(tokens) for tokens in stock["full"]} == {56}
    before = engine.counters()
    outputs = engine.run([FULL[0], SHORT[0]], [100, 64])
    assert outputs[0].num_cached_tokens == 192
    assert [list(x.outputs[0].token_ids) for x in outputs] == [stock["full"][0], stock["short"][0]]
    drafted, accepted = (now - old for now, old in zip(engine.counters(), before, strict=True))
    assert accepted > 0.6 * drafted


@pytest.mark.parametrize("seed", [0, 1])
def test_preemption_and_chunked_prefill(stock: dict[str, Any], engines: Engines, seed: int) -> None:
    engine = engines(**SPECULATING, **CROWDED)
    engine.scheduler.decisions.policy = RandomLengths(seed, longest=4, off=0.2)
    before = engine.drafter.forwards
    outputs = engine.run(LONG, 90)
    assert [list(x.outputs[0].token_ids) for x in outputs] == stock["long"]
    assert engine.drafter.forwards > before + 50
    preemptions = next(x.value for x in engine.llm.get_metrics() if x.name == "vllm:num_preemptions")
    assert preemptions > 0
    assert engine.generate([*LONG[:3], *SHORT[:4]], 30) == [
        x[:30] for x in (*stock["long"][:3], *stock["short"][:4])
    ]


class TestControl:
    """A drafter that is not quantized equals its target, so that whatever it gets wrong is the plumbing's fault."""

    def acceptance(self, engine: Engine, policy: Any) -> float:
        engine.scheduler.decisions.policy = policy
        before = engine.counters()
        engine.generate(SHORT, 64)
        drafted, accepted = (now - old for now, old in zip(engine.counters(), before, strict=True))
        assert drafted > 50
        return accepted / drafted

    @pytest.fixture
    def dense(self, stock: dict[str, Any], engines: Engines) -> Engine:
        return engines(**DENSE)

    @pytest.mark.parametrize("policy", [Fixed(4), Toggled(4, 5), Toggled(2, 1), RandomLengths(3, longest=4)])
    def test_everything_is_accepted(self, dense: Engine, policy: Any) -> None:
        """Also after phases without drafting, which leave no gap in a cache that is the target's."""
        assert self.acceptance(dense, policy) >= 0.99

    def test_a_cache_of_its_own_is_noticed(self, dense: Engine, stock: dict[str, Any]) -> None:
        """What the acceptance above would be if the cache were not shared."""
        layers = dense.drafter._layers
        shared = [layer.kv_cache for layer in layers]
        try:
            for layer in layers:
                layer.kv_cache = torch.zeros_like(layer.kv_cache)
            assert self.acceptance(dense, Toggled(4, 5)) < 0.9
            assert dense.generate(SHORT, 64) == stock["short"]
        finally:
            for layer, cache in zip(layers, shared, strict=True):
                layer.kv_cache = cache

    def test_overwriting_what_was_verified_is_noticed(
        self, dense: Engine, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The comparisons with plain decoding do see a drafter that writes where it must not."""
        steps = dense.drafter._steps
        monkeypatch.setattr(
            dense.drafter, "_steps", lambda metadata, positions, count: steps(metadata, positions - 6, count)
        )
        dense.scheduler.decisions.policy = Fixed(4)
        dense.llm.reset_prefix_cache()
        assert dense.generate(SHORT, 64) != stock["short"]
        dense.llm.reset_prefix_cache()


class Instead:
    """A linear that multiplies so; the kernels are none."""

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._multiply = multiply

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x)

    def for_kernels(self) -> None:
        return None


class TestFailingDrafter:
    """A drafter that breaks is reported, and decoding goes on plainly."""

    @pytest.fixture(autouse=True)
    def _revived(self, engine: Engine) -> Iterator[None]:
        engine.llm.reset_prefix_cache()
        yield
        engine.drafter.revive()
        engine.llm.reset_prefix_cache()

    def caches(self, engine: Engine) -> list[torch.Tensor]:
        return [layer.kv_cache for layer in engine.drafter._layers]

    @pytest.mark.parametrize("where", ["lm_head", "qkv"])
    def test_nan(
        self, engine: Engine, stock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        model = engine.drafter.model
        layer = model.lm_head if where == "lm_head" else model.model.layers[1].self_attn.qkv_proj
        healthy, calls = layer.quantized, []

        def breaking(x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            y = healthy(x)
            return y * torch.nan if len(calls) > 10 else y

        monkeypatch.setattr(layer, "quantized", Instead(breaking))
        assert engine.generate(SHORT, 64) == stock["short"]
        assert engine.drafter.set_aside == "its logits were not finite"
        assert engine.drafter.forwards <= 14
        assert all(torch.isfinite(cache).all() for cache in self.caches(engine))
        engine.drafter.revive()
        monkeypatch.undo()
        assert engine.generate(SHORT, 64) == stock["short"] and engine.drafter.forwards > 30

    def test_what_a_nan_left_is_wiped_at_once(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, seen = engine.drafter.model.model.layers[1].self_attn.qkv_proj, []
        healthy, propose, wipe = layer.quantized, engine.drafter.propose, engine.drafter._wipe
        finite = lambda: all(bool(torch.isfinite(cache).all()) for cache in self.caches(engine))  # noqa: E731

        def watched(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            seen.append(("after", finite()))
            return drafts

        def wiping(*args: Any) -> None:
            seen.append(("before", finite()))
            wipe(*args)

        monkeypatch.setattr(layer, "quantized", Instead(lambda x: healthy(x) * torch.nan))
        monkeypatch.setattr(engine.drafter, "propose", watched)
        monkeypatch.setattr(engine.drafter, "_wipe", wiping)
        engine.generate(SHORT, 4)
        assert seen[:2] == [("before", False), ("after", True)]

    def test_raising(
        self,
        engine: Engine,
        stock: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        layer = engine.drafter.model.model.layers[2].mlp.down_proj

        def breaking(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel")

        monkeypatch.setattr(layer, "quantized", Instead(breaking))
        assert engine.generate(SHORT, 64) == stock["short"]
        assert engine.drafter.set_aside == "it raised RuntimeError: no kernel"
        assert [record.message for record in caplog.records if record.name == "rollout_spec"] == [
            "the self-drafter is set aside: it raised RuntimeError: no kernel; decoding plainly from now on"
        ]


def test_drafts_of_probabilities_are_kept_for_the_verifier(engine: Engine) -> None:
    """At a temperature the drafts are sampled, and the verifier gets what they were sampled from."""
    seen = []
    take = engine.drafter.take_last_draft_probs

    def taken() -> torch.Tensor | None:
        seen.append(take())
        return seen[-1]

    engine.drafter.take_last_draft_probs = taken
    try:
        engine.generate(SHORT, 32, temperature=0.9, seed=3)
    finally:
        del engine.drafter.take_last_draft_probs
    probs = seen[0]
    assert probs is not None and probs.shape == (8, 4, 128)
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))
    assert engine.config.speculative_config.draft_sample_method == "probabilistic"


def test_layerwise_reload_quantizes_again(engine: Engine) -> None:
    """vLLM's reload gives the quantized tensors of the new weights, the tied lm_head's too, and back again."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from rollout_spec.drafters.quantize import get_quantizer

    drafter, old = engine.drafter, load_file(f"{POLICY}/model.safetensors")
    new = {name: (x.float() * 1.5).to(x.dtype) for name, x in old.items()}

    def reload(weights: dict[str, torch.Tensor]) -> None:
        with set_current_vllm_config(engine.config):
            initialize_layerwise_reload(drafter.model)
            drafter.model.load_weights(iter(weights.items()))
            finalize_layerwise_reload(drafter.model, engine.config.speculative_config.draft_model_config)

    def check(weights: dict[str, torch.Tensor]) -> None:
        quantizer = get_quantizer(DRAFTER, "cpu", torch.float32)
        names = {
            "model.layers.3.mlp.down_proj.weight": drafter.model.model.layers[3].mlp.down_proj,
            "model.embed_tokens.weight": drafter.model.lm_head,
        }
        for name, layer in names.items():
            expected = quantizer.quantize(weights[name].float()).tensors()
            for part, tensor in layer.quantized.tensors().items():
                torch.testing.assert_close(tensor, expected[part], rtol=0, atol=0)

    check(old)
    reload(new)
    check(new)
    reload(old)
    check(old)
    assert drafter.model.model.embed_tokens.weight is engine.runner.model.model.embed_tokens.weight


def test_compiled_code_finds_the_quantized_weights(engine: Engine) -> None:
    """Under torch.compile a layer is one opaque operator, which looks its weights up by the layer's name."""
    from vllm.forward_context import set_forward_context

    layer, x = engine.drafter.model.model.layers[0].mlp.gate_up_proj, torch.randn(3, 256)
    call = torch.ops.vllm.rollout_spec_quantized_linear
    with set_forward_context(None, engine.config):
        y = call(x, layer.prefix, layer.out_features)
    torch.testing.assert_close(y, layer.quantized(x), rtol=0, atol=0)
    assert call(x.to("meta"), layer.prefix, layer.out_features).shape == y.shape


MULTIPROCESS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    given = json.load(sys.stdin)
    llm = LLM(**given["options"])
    outputs = llm.generate(
        [{"prompt_token_ids": x} for x in given["prompts"]],
        SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    counters = {x.name: x.value for x in llm.get_metrics() if x.name.endswith(("_draft_tokens", "_accepted_tokens"))}
    print("RESULT" + json.dumps({"tokens": [list(x.outputs[0].token_ids) for x in outputs], **counters}))
"""


def test_engine_in_another_process(stock: dict[str, Any], tmp_path: Path) -> None:
    """Scheduler, worker and caller are three processes, and all get the plugin through vLLM's own arguments."""
    fixed = llm_arguments(POLICY, {"drafter": DRAFTER, "draft_length": 4})
    given = {"options": SMALL | fixed, "prompts": SHORT}
    result = run_apart(MULTIPROCESS, given, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert result["tokens"] == stock["short"]
    drafted = result["vllm:spec_decode_num_draft_tokens"]
    assert result["vllm:spec_decode_num_accepted_tokens"] > 0.6 * drafted > 30


def test_bfloat16_as_it_is_served(engines: Engines) -> None:
    """vLLM builds a model under its own default dtype."""
    engine = engines(**SPECULATING, dtype="bfloat16")
    engine.scheduler.decisions.policy = Fixed(4)
    engine.generate(SHORT, 64)
    drafted, accepted = engine.counters()
    assert accepted > 0.7 * drafted > 0


def test_sliding_window_is_refused_at_start(engines: Engines) -> None:
    engines.close()
    overrides = {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}
    with pytest.raises(ValueError, match=r"sliding_window=64: the window's cache drops keys"):
        engines(**SPECULATING, hf_overrides=overrides)


def test_lengths_are_uniform(engine: Engine) -> None:
    """What `Decisions` rounds to is what the runner drafted."""
    widths = []
    propose = engine.drafter.propose

    def watched(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        widths.append(drafts.shape[1])
        return drafts

    engine.drafter.propose = watched
    engine.scheduler.decisions.policy = EveryLength()
    engine.scheduler.decisions.draft_lengths.clear()
    try:
        engine.generate(SHORT, 40)
    finally:
        del engine.drafter.propose
    counts = engine.scheduler.decisions.draft_lengths
    assert set(widths) == {1, 2, 3, 4} and counts[0]  # at K = 0 nobody is asked
    assert {length: widths.count(length) for length in (1, 2, 3, 4)} == {k: counts[k] for k in (1, 2, 3, 4)}
