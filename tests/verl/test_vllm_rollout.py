"""verl's own vLLM rollout with the plugin: each hole in verl 0.9.1, seen without us and closed with us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

pytest.importorskip("verl")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from verl_configs import model_config  # noqa: E402
from verl_runs import POLICY  # noqa: E402
from vllm_runs import name_vllm  # noqa: E402

from rollout_spec.contracts import InvalidRequest  # noqa: E402
from rollout_spec.integrations.verl import vllm_server  # noqa: E402
from rollout_spec.integrations.verl.vllm_server import KEY, PLUGIN, WORKER_EXTENSION  # noqa: E402

STOCK_EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
OURS = f"{KEY}.additional_config.{PLUGIN}"


@pytest.fixture(scope="module")
def server_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """verl's module of its vLLM server, as our plugin leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(name_vllm(tmp_path_factory.mktemp("named"))))
        from verl.workers.rollout.vllm_rollout import vllm_async_server

        yield vllm_async_server


def completed(**engine_kwargs: Any) -> dict[str, Any]:
    arguments = {"additional_config": {PLUGIN: {"drafter": "int8"}}} | engine_kwargs
    vllm_server.complete_arguments(arguments, str(POLICY), model_config())
    return arguments


def test_the_plugins_option_brings_the_rest() -> None:
    arguments = completed(additional_config={"other": 1, PLUGIN: {"drafter": "int8", "draft_length": 3}})
    assert arguments["additional_config"] == {"other": 1, PLUGIN: {"drafter": "int8", "draft_length": 3}}
    assert arguments["scheduler_cls"].endswith("PolicyScheduler")
    speculative = arguments["speculative_config"]
    assert speculative["quantization"] == "rollout_spec_int8" and speculative["num_speculative_tokens"] == 3
    assert arguments["per_request_spec_decode_metrics"] == "summary"
    assert "speculative_config" not in completed(additional_config={PLUGIN: {"drafter": "none"}})


MISTAKES = {
    "unknown option": ({"additional_config": {PLUGIN: {"drafer": 1}}}, f"{OURS}.", "drafer"),
    "wrong value": ({"additional_config": {PLUGIN: {"drafter": "int3"}}}, f"{OURS}.", "use one of"),
    "no mapping": ({"additional_config": {PLUGIN: 7}}, f"{OURS}=7", "give a mapping"),
    "another scheduler": ({"scheduler_cls": "mine"}, f"{KEY}.scheduler_cls='mine'", "leave it out"),
    "another extension": ({"worker_extension_cls": "mine"}, f"{KEY}.worker_extension_cls='mine'", "leave it out"),
    "no drafter": ({"speculative_config": "ngram"}, f"{KEY}.speculative_config='ngram'", "give a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake: str) -> None:
    changes, field, remedy = MISTAKES[mistake]
    with pytest.raises(InvalidRequest) as caught:
        completed(**changes)
    assert str(caught.value).startswith(field) and remedy in str(caught.value)


def test_adapters_have_to_be_merged() -> None:
    arguments = {"additional_config": {PLUGIN: {"drafter": "int8"}}}
    for lora in ({"lora_rank": 8}, {"lora": {"rank": 8}}):
        with pytest.raises(InvalidRequest, match=r"lora\.merge=False"):
            vllm_server.complete_arguments(dict(arguments), str(POLICY), model_config(**lora))
    merged = model_config(lora_rank=8, lora={"merge": True})
    vllm_server.complete_arguments(dict(arguments), str(POLICY), merged)


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout_spec.integrations.vllm import compat

    monkeypatch.setattr(compat, "version", lambda name: "0.23.1")
    with pytest.raises(compat.UnsupportedVllm, match=r"0\.23\.1"):
        completed()


# --- a drafter with weights of its own ----------------------------------------------------------------------------------

EAGLE = {"method": "eagle3", "model": "drafters/mine", "num_speculative_tokens": 3}


def test_a_drafter_of_ones_own_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl starts vLLM on dummy weights, and vLLM's drafter has the target's load format unless told otherwise."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import utils
    from vllm.v1.spec_decode import utils as spec_utils

    resolve = getattr(spec_utils, "get_draft_load_config", None) or utils.get_draft_load_config

    def format_of(speculative: dict[str, Any]) -> str:
        given = speculative.get("draft_load_config")
        config = SimpleNamespace(
            load_config=LoadConfig(load_format="dummy"),
            speculative_config=SimpleNamespace(draft_load_config=given and LoadConfig(**given)),
        )
        return str(resolve(config).load_format)

    assert format_of(EAGLE) == "dummy"
    assert format_of(completed(speculative_config=EAGLE)["speculative_config"]) == "auto"
    mine = EAGLE | {"draft_load_config": {"load_format": "safetensors"}}
    assert format_of(completed(speculative_config=mine)["speculative_config"]) == "safetensors"


def server_with(vllm: dict[str, Any]) -> Any:
    rollout = {"engine_kwargs": {"vllm": vllm}}
    return SimpleNamespace(config=rollout, lora_as_adapter=False)


def test_its_weights_survive_sleep(server_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At level 2 vLLM discards all weights; an update brings the policy's, and a copy's, but no other drafter's."""
    monkeypatch.setattr(server_module, "is_torch_npu_available", lambda **_: False)
    level = server_module.vLLMHttpServer._resolve_sleep_level
    plugin = {"additional_config": {PLUGIN: {}}}
    assert level(server_with({"speculative_config": EAGLE})) == 2, (
        "verl keeps it now: drop resolve_sleep_level"
    )
    assert level(server_with({"speculative_config": EAGLE} | plugin)) == 1
    assert level(server_with(plugin)) == 2, "a copy of the policy is made anew by every update"


def test_runs_without_the_plugin_are_left_alone(server_module: Any) -> None:
    extension = server_module.vLLMHttpServer._get_worker_extension_cls
    assert extension(server_with({})) == STOCK_EXTENSION
    assert extension(server_with({"additional_config": {PLUGIN: {}}})) == WORKER_EXTENSION


# --- updates ------------------------------------------------------------------------------------------------------------

ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 16, "seed": 0, "skip_tokenizer_init": True, "enable_prefix_caching": False,
    "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(server_module: Any) -> Iterator[Any]:
    """vLLM in this process, with the arguments that verl's server gives it; its weights are the policy's.

    vLLM adds the extension to the bases of its worker class, for good: here it gets a class that lives no longer.
    """
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer
    from vllm import LLM
    from vllm.v1.worker import cpu_worker

    arguments = completed(additional_config={PLUGIN: {"drafter": "int8", "draft_length": 4}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(bucketed_weight_transfer, "BucketedWeightReceiver", Buckets)
        patch.setattr(cpu_worker, "CPUWorker", type("CPUWorker", (cpu_worker.CPUWorker,), {}))
        made = LLM(model=str(POLICY), worker_extension_cls=WORKER_EXTENSION, **ENGINE, **arguments)
        yield made
        made.llm_engine.engine_core.shutdown()


def changed(strength: float = 0.2) -> dict[str, torch.Tensor]:
    """Another policy, as verl sends it: float32, and the tied head under its own name too."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(POLICY / "model.safetensors").items():
        tensors[name] = tensor.float()
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensors[name] + strength * tensors[name].std() * noise
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


class Buckets:
    """In the place of verl's receiver: its calls, from one buffer that is filled again and again."""

    BYTES = 1 << 20
    sent: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, zmq_handle: str, device: torch.device, use_shm: bool) -> None: ...

    def receive_weights(
        self, on_bucket_received: Callable[[list[tuple[str, torch.Tensor]], bool], None]
    ) -> None:
        buffer = torch.empty(self.BYTES // 4)
        bucket: list[tuple[str, torch.Tensor]] = []
        used = 0
        for name, tensor in self.sent.items():
            if used + tensor.numel() > len(buffer):
                on_bucket_received(bucket, False)
                bucket, used = [], 0
            view = buffer[used : used + tensor.numel()].view(tensor.shape)
            bucket.append((name, view.copy_(tensor)))
            used += tensor.numel()
        on_bucket_received(bucket, True)
        buffer.fill_(float("nan"))


def push(llm: Any, tensors: dict[str, torch.Tensor], version: int) -> None:
    """What verl's adapter and server do."""
    Buckets.sent = tensors
    llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
    llm.collective_rpc("rollout_spec_stamp", args=(version,))


def generate(llm: Any) -> tuple[list[list[int]], float]:
    """Greedy tokens, and the share of drafts accepted."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [5 + i, 9, 12, 7 + i]} for i in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    outputs = [answer.outputs[0] for answer in llm.generate(prompts, params, use_tqdm=False)]
    metrics = [output.spec_decode_metrics for output in outputs]
    drafted = sum(m.num_draft_tokens for m in metrics)
    accepted = sum(length * count for m in metrics for length, count in enumerate(m.histogram))
    return [list(output.token_ids) for output in outputs], accepted / drafted


def reference(tensors: dict[str, torch.Tensor]) -> list[list[int]]:
    """The same tokens by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(POLICY)).float().eval()
    model.load_state_dict(tensors)
    found = []
    for i in range(8):
        ids = [5 + i, 9, 12, 7 + i]
        for _ in range(40):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[4:])
    return found


def test_an_update_reaches_policy_and_drafter(llm: Any) -> None:
    before, _ = generate(llm)
    new = changed()
    push(llm, new, version=7)
    (state,) = llm.collective_rpc("rollout_spec_state")
    assert (state["version"], state["drafter_version"], state["drafts"]) == (7, 7, True)
    assert 0 < state["update_seconds"] < 60 and state["reports"] == []
    tokens, acceptance = generate(llm)
    assert tokens == reference(new) != before
    assert acceptance > 0.9


def test_verls_own_update_would_leave_the_drafter_behind(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when verl updates drafters itself: then `_iter_all_models` can go."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from rollout_spec.integrations.verl.vllm_worker import VerlWorkerExtension

    push(llm, changed(0.0), version=8)
    with monkeypatch.context() as patch:
        patch.setattr(VerlWorkerExtension, "_iter_all_models", vLLMColocateWorkerExtension._iter_all_models)
        with pytest.raises(Exception, match=r"(?i)incomplete|missing"):
            push(llm, changed(), version=9)
    push(llm, changed(), version=9)
    assert generate(llm)[1] > 0.9


def test_what_sleep_discarded_comes_back(llm: Any) -> None:
    """Level 2 leaves garbage in the weights of policy and drafter; the update that follows restores both."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for model in (runner.get_model(), runner.get_draft_model()):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.fill_(float("nan"))
            else:
                parameter.data.fill_(1)
    new = changed(0.1)
    push(llm, new, version=10)
    tokens, acceptance = generate(llm)
    assert tokens == reference(new) and acceptance > 0.9


def test_an_incomplete_update_is_an_error(llm: Any) -> None:
    tensors = changed()
    del tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.down_proj"):
        push(llm, tensors, version=11)
    (state,) = llm.collective_rpc("rollout_spec_state")
    assert not state["drafts"]
    push(llm, changed(), version=11)
    assert generate(llm)[1] > 0.9


def test_buckets_are_copied(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl refills its bucket while vLLM's reload still waits for the rest of a layer."""
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from rollout_spec.integrations.verl.vllm_worker import VerlWorkerExtension

    def without_copies(self: Any, weights: list[Any], **rest: Any) -> None:
        kept = [(name, tensor) for name, tensor in weights if name != "lm_head.weight"]
        vLLMColocateWorkerExtension._update_weights(self, kept, **rest)

    new = changed(0.15)
    with monkeypatch.context() as patch:
        patch.setattr(VerlWorkerExtension, "_update_weights", without_copies)
        push(llm, new, version=12)
        spoilt = generate(llm)[0]
    push(llm, new, version=13)
    assert generate(llm)[0] == reference(new) != spoilt
