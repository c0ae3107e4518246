"""What vLLM gives up beside speculation is said, in the log and by doctor; no vLLM runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_spec.commands import doctor
from rollout_spec.vllm_backend.fast_paths import ASYNCHRONOUS, FULL_GRAPHS, given_up_by


def config(method: str = "draft_model", device: str = "cuda", **changes: Any) -> Any:
    values: dict[str, Any] = {
        "v2": False,
        "table": [[1, 1, 4]],
        "eager": False,
        "asynchronous": True,
    } | changes
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method, num_speculative_tokens_per_batch_size=values["table"]
        ),
        device_config=SimpleNamespace(device_type=device),
        use_v2_model_runner=values["v2"],
        model_config=SimpleNamespace(enforce_eager=values["eager"]),
        scheduler_config=SimpleNamespace(async_scheduling=values["asynchronous"]),
    )


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        (config(), {FULL_GRAPHS}),
        (config(v2=True), set()),
        (config(table=None), set()),
        (config(eager=True), set()),
        (config("ngram", asynchronous=False, table=None), {ASYNCHRONOUS}),
        (config("ngram", asynchronous=False), {ASYNCHRONOUS, FULL_GRAPHS}),
        (config("eagle3", v2=True), set()),
        (config("draft_model", v2=True, asynchronous=False), set()),  # the user's own choice
        (config("ngram", device="cpu", asynchronous=False), set()),
    ],
)
def test_what_is_given_up_is_named(given: Any, lost: set[str]) -> None:
    assert set(given_up_by(given)) == lost


@pytest.mark.parametrize(("release", "full"), [("0.24.0", False), ("0.31.0", False), ("0.33.0", True)])
def test_doctor_says_so(release: str, full: bool) -> None:
    rows = {row.name: row for row in doctor.fast_path_rows(release)}
    asynchronous, graphs = rows[f"vLLM, {ASYNCHRONOUS}"], rows[f"vLLM, {FULL_GRAPHS}"]
    assert asynchronous.status is doctor.Status.OK and "beside ngram" in asynchronous.remedy
    assert (graphs.status is doctor.Status.OK) is full
    assert full or "piecewise graphs only" in graphs.remedy


@pytest.mark.integration
class TestInstalled:
    """vLLM gives up what is said here, and nothing else is wrapped to."""

    @pytest.fixture(autouse=True)
    def _vllm(self) -> None:
        pytest.importorskip("vllm")

    def test_the_scheduler_logs_it(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from rollout_spec.integrations.vllm import scheduler

        given = config("ngram", asynchronous=False)
        given.additional_config = {"rollout_spec": {}}
        given.parallel_config = SimpleNamespace(data_parallel_size=1)
        given.speculative_config.num_speculative_tokens = 4

        class Reached(Exception):
            pass

        def reached(*args: Any, **kwargs: Any) -> None:
            raise Reached

        monkeypatch.setattr(scheduler, "check_fit", lambda config: None)
        monkeypatch.setattr(scheduler.Scheduler, "__init__", reached)
        with pytest.raises(Reached):
            scheduler.PolicyScheduler(given)
        messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any(x.startswith(f"no {ASYNCHRONOUS}: vLLM schedules synchronously") for x in messages)
        assert any(x.startswith(f"no {FULL_GRAPHS}: vLLM's V1 runner captures piecewise") for x in messages)

    def test_vllm_still_gives_them_up(self) -> None:
        """When this fails, vLLM has learnt to keep one, and `fast_paths` has to say so."""
        import inspect

        from vllm.config import VllmConfig
        from vllm.config.compilation import CUDAGraphMode

        given = config()
        given.speculative_config.uses_dynamic_speculative_decoding = lambda: True
        given.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        VllmConfig._maybe_override_dynamic_sd_cudagraph_mode(given)
        assert given.compilation_config.cudagraph_mode is CUDAGraphMode.PIECEWISE
        source = inspect.getsource(VllmConfig.__post_init__)
        assert "Async scheduling not supported with %s-based" in source
        assert 'self.speculative_config.method != "draft_model"' in source
