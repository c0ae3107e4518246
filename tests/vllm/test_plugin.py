"""The plugin's entry point: which vLLM it accepts, what it does to one that does not ask for it, and its arguments."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from small_engines import DRAFTER

from rollout_spec.contracts import InvalidRequest
from rollout_spec.integrations.vllm import compat, plugin
from rollout_spec.integrations.vllm.arguments import SCHEDULER, llm_arguments, serve_flags
from rollout_spec.integrations.vllm.options import KEY
from rollout_spec.integrations.vllm.refusals import check_layers, refuse
from tests.vllm.conftest import POLICY, Engines, changed, prompts

pytest.importorskip("vllm")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


# --- Numba in vLLM's processes --------------------------------------------------------------------------------------


def test_engines_start_in_a_process_that_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second part fails, vLLM looks for holders of its kernels without the mend: delete `deny_special_names`."""
    from llvmlite.binding import ffi
    from vllm.platforms import current_platform

    import rollout_spec.policy.compiled  # noqa: F401

    plugin.register()
    current_platform.register_triton_kernel_overrides()
    answer = ffi._lib_wrapper.__getattr__
    original = next(cell.cell_contents for cell in answer.__closure__ if callable(cell.cell_contents))
    monkeypatch.setattr(ffi._lib_wrapper, "__getattr__", original)
    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        current_platform.register_triton_kernel_overrides()


# --- versions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        *(("0.24.0", True), ("0.31.0+cpu", True), ("0.33.9", True), ("0.33.0rc1", True)),
        *(("0.23.1", False), ("0.34.0", False), ("1.0", False)),
    ],
)
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, found: str, fits: bool) -> None:
    monkeypatch.setattr(compat, "version", lambda name: found)
    if fits:
        assert compat.check_version() == found
        return
    with pytest.raises(
        compat.UnsupportedVllm, match=rf"vllm=={found}: .* supports vllm<0\.34,>=0\.24"
    ) as error:
        compat.check_version()
    assert "install such a version" in str(error.value)


def test_the_installed_version_is_supported() -> None:
    import vllm

    assert compat.check_version().split("+")[0] == vllm.__version__.split("+")[0]


def test_an_unsupported_vllm_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "version", lambda name: "0.99.0")
    monkeypatch.setattr(compat, "after_import", lambda *args: pytest.fail("touched"))
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "switched off: vllm==0.99.0" in caplog.text
    with pytest.raises(compat.UnsupportedVllm):
        llm_arguments(POLICY)


# --- touches -------------------------------------------------------------------------------------------------------


def test_a_touch_waits_for_its_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "touched_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    touched: list[str] = []

    def touch(module: ModuleType) -> None:
        touched.append(module.__name__)
        module.value += 1  # type: ignore[attr-defined]

    for _ in range(2):
        compat.after_import("touched_module", touch)
    assert not touched and "touched_module" not in sys.modules
    assert importlib.import_module("touched_module").value == 2
    compat.after_import("touched_module", touch)
    assert importlib.import_module("touched_module").value == 2 and touched == ["touched_module"]
    monkeypatch.delitem(sys.modules, "touched_module")


def test_the_touches_still_fit_and_are_still_needed() -> None:
    import vllm.v1.worker.cpu_worker as cpu_worker
    import vllm.v1.worker.gpu_model_runner as runner
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from rollout_spec.integrations.vllm.self_drafter import StockOrSelfDrafter

    for _ in range(2):
        plugin.register()
    assert runner.DraftModelProposer is StockOrSelfDrafter
    made = inspect.getsource(runner.GPUModelRunner.__init__)
    assert "DraftModelProposer(" in made and "shared_kv_cache_layers" in made
    assert "effective_drafter_max_model_len" in inspect.getsource(
        runner.GPUModelRunner._input_fits_in_drafter
    )
    assert "torch.set_num_threads = " in inspect.getsource(cpu_worker)  # else `hush_thread_warning` can go
    assert [
        QUANTIZATION_METHODS.count(f"rollout_spec_{kind}") for kind in ("nf4", "int8", "int4", "dense")
    ] == [1] * 4


def test_an_engine_that_does_not_ask_is_stock(engines: Engines) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    engine = engines()
    assert type(engine.scheduler) is Scheduler and not hasattr(engine.runner, "drafter")
    assert not [name for name in sys.modules if name.endswith("vllm.self_drafter_v2")]
    blocks, expected = engine.config.cache_config.num_gpu_blocks, engine.generate(prompts(4), 24)
    speculative = {"method": "draft_model", "model": POLICY, "num_speculative_tokens": 2}
    engine = engines(speculative_config=speculative | {"quantization": f"rollout_spec_{DRAFTER}"})
    from rollout_spec.integrations.vllm.self_drafter import SelfDrafter, StockOrSelfDrafter

    assert type(engine.drafter) is StockOrSelfDrafter and not isinstance(engine.drafter, SelfDrafter)
    assert type(engine.scheduler) is Scheduler
    assert (
        engine.config.cache_config.num_gpu_blocks == blocks // 2
    )  # vLLM's own drafter has a cache of its own
    assert engine.generate(prompts(4), 24) == expected
    drafted, accepted = engine.counters()
    assert accepted > 0.6 * drafted > 20  # quantized by the same method


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("parallel_config__pipeline_parallel_size", 2, "pipeline_parallel_size=2: .* use 1"),
        ("parallel_config__data_parallel_size", 2, "data_parallel_size=2: .* one engine per rank"),
        ("parallel_config__decode_context_parallel_size", 2, "decode_context_parallel_size=2"),
        ("speculative_config__model", "other", "the drafter is made from the target"),
        ("speculative_config__kv_cache_dtype", "fp8", r"speculative_config\.kv_cache_dtype='fp8'"),
        ("speculative_config__parallel_drafting", True, r"speculative_config\.parallel_drafting"),
        ("model_config__is_multimodal_model", True, "reads text alone"),
        ("model_config__uses_mrope", True, "reads text alone"),
        ("model_config__use_mla", True, "latents"),
        ("model_config__is_moe", True, "experts would stay unquantized"),
        ("model_config__is_hybrid", True, "recurrent state"),
        ("model_config__has_inner_state", True, "recurrent state"),
        (
            "model_config__hf_text_config__layer_types",
            ["full_attention", "sliding_attention"],
            "sliding_window",
        ),
        ("kv_transfer_config", SimpleNamespace(kv_connector="Some"), "kv_connector='Some'"),
    ],
)
def test_refused(engines: Engines, field: str, value: Any, reason: str) -> None:
    config = engines(**llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 2})).config
    refuse(config)
    with pytest.raises(InvalidRequest, match=reason):
        refuse(changed(config, **{field: value}))


def test_refused_layers(engines: Engines) -> None:
    """What only the layers themselves tell: another kind of cache, a cache shared between layers."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    full = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=None)
    sliding = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=None, sliding_window=64)
    wider = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=64, dtype=None)

    def layer(spec: Any, shares: str | None = None) -> Any:
        return SimpleNamespace(
            get_kv_cache_spec=lambda config: spec,
            get_attn_backend=lambda: str,
            kv_sharing_target_layer_name=shares,
        )

    pairs = {"draft_model.0": "0"}
    check_layers(None, {"draft_model.0": layer(full), "0": layer(full)}, pairs)
    for layers, reason in (
        ({"draft_model.0": layer(full), "0": layer(sliding)}, "caches SlidingWindowSpec"),
        ({"draft_model.0": layer(full), "0": layer(None)}, "caches nothing"),
        ({"draft_model.0": layer(full), "0": layer(full, "1")}, "shares the KV cache of 1"),
        ({"draft_model.0": layer(wider), "0": layer(full)}, "differs from the target's"),
        ({"draft_model.0": layer(full), "0": layer(full), "1": layer(full)}, "no layer like it"),
        ({"draft_model.0": layer(full)}, "not a layer of the target"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            check_layers(None, layers, pairs)


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_switch_everything_on() -> None:
    arguments = llm_arguments("a/model", {"drafter": "int8", "draft_length": 3, "margin": 0.05})
    assert arguments["additional_config"] == {KEY: {"drafter": "int8", "draft_length": 3, "margin": 0.05}}
    assert arguments["scheduler_cls"] == SCHEDULER and arguments["model"] == "a/model"
    speculative = arguments["speculative_config"]
    assert (speculative["model"], speculative["method"]) == ("a/model", "draft_model")
    assert (speculative["quantization"], speculative["num_speculative_tokens"]) == ("rollout_spec_int8", 3)
    assert "speculative_config" not in llm_arguments("a/model", {"drafter": "none"})
    lengths = [
        k for *_, k in llm_arguments("a/model")["speculative_config"]["num_speculative_tokens_per_batch_size"]
    ]
    assert lengths == [0, 4, 8, 2, 1, 6, 12, 3, 16, 0]
    with pytest.raises(InvalidRequest, match="unknown option"):
        llm_arguments("a/model", {"drafters": "nf4"})


def test_vllm_serve_reads_the_flags() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = serve_flags(POLICY, {"drafter": DRAFTER, "longest_draft": 2})
    parser = make_arg_parser(FlexibleArgumentParser())
    given = parser.parse_args(words)
    given.model = given.model_tag  # as `vllm serve` does
    parsed = AsyncEngineArgs.from_cli_args(given)
    arguments = llm_arguments(POLICY, {"drafter": DRAFTER, "longest_draft": 2})
    for name in ("additional_config", "scheduler_cls", "speculative_config"):
        assert getattr(parsed, name) == arguments[name]
    assert words[0] == POLICY
