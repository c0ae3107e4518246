"""Sampling inside vLLM stays exact while the plugin speculates.

Three things would otherwise not be: a CPU kernel that leaves temperature, top_k and top_p of the verified rows unset;
parameters that the V1 verifier does not know (`min_p`, `logit_bias`, custom processors), which vLLM refuses beside
speculation or drops; and `min_tokens`, which it applies to the bonus row by the length before the drafts. Requests
with such parameters are admitted and get no drafts, or fewer; in a batch with them the others go on speculating.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.options import options_of
from rollout_spec.integrations.vllm.refusals import refuse_coupled_v2

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("rollout_spec")

_MARK = "__rollout_spec__"


def rebind(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `wrap(owner.name)`; a second time nothing happens.

    Raises:
        AttributeError: `owner` has no such attribute: this vLLM is laid out differently.
    """
    original = getattr(owner, name)
    done: frozenset[str] = getattr(original, _MARK, frozenset())
    key = f"{wrap.__module__}.{wrap.__qualname__}"
    if key in done:
        return
    wrapper = functools.wraps(original)(wrap(original))
    setattr(wrapper, _MARK, done | {key})
    setattr(owner, name, wrapper)


def is_coupled(vllm_config: VllmConfig) -> bool:
    """Whether coupled verification was asked for; `auto` means rejection here, as vLLM's passes depend on the batch.

    Raises:
        InvalidRequest: It was, and this engine cannot do it.
    """
    options = options_of(vllm_config)
    if options is None or options.verifier != "coupled":
        return False
    if getattr(vllm_config, "use_v2_model_runner", False):
        refuse_coupled_v2()
    method = getattr(vllm_config.speculative_config, "rejection_sample_method", "standard")
    if method != "standard":
        raise invalid("rejection_sample_method", method, 'leave it at "standard" with verifier="coupled"')
    if getattr(vllm_config.model_config, "use_fp64_gumbel", False):
        raise invalid(
            "use_fp64_gumbel", True, 'leave it off with verifier="coupled", which has noise of its own'
        )
    return True


# --- vllm#55005: the CPU version of the kernel that spreads per-request parameters over draft rows never writes them


def probe_expand() -> bool:
    """Whether vLLM's verifier reads unset memory for temperature, top_k and top_p here (vllm#55005).

    It is called with fresh random values, which leftover memory cannot hold by chance.
    """
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    chance = random.SystemRandom()
    lengths = torch.tensor([2, 0, 1])
    for dtype in (torch.float32, torch.int32):
        given = torch.tensor([chance.randrange(2, 2**24) for _ in lengths], dtype=dtype)
        spread = expand_batch_to_tokens(given, lengths.cumsum(0).to(torch.int32), int(lengths.sum()), 0, 1)
        if not torch.equal(spread, given.repeat_interleave(lengths)):
            return True
    return False


def expand(
    output: Tensor,
    given: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write given [B] to output [N], request b's value to its rows cu_num_tokens[b - 1] up to cu_num_tokens[b].

    Values equal to `replace_from` are written as `replace_to`. The arguments are the kernel's own.
    """
    ends = cu_num_tokens.to(torch.int64)
    values = torch.where(given == replace_from, replace_to, given).to(output.dtype)
    output.copy_(values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1))))


def fix_expand() -> bool:
    """Work around vllm#55005 in this process if this is vLLM on CPU and has it; returns whether it was needed."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not probe_expand():
        return False
    import vllm.utils.cpu_triton_utils as kernels
    import vllm.v1.sample.rejection_sampler as verifier
    from vllm.triton_utils.dispatcher import KernelOverride

    kernels._expand_kernel_impl = expand  # every engine that starts in this process registers it again
    # Made anew in place for everyone who holds it; `register_kernels` would look for holders in every module.
    KernelOverride.__init__(verifier.expand_kernel, verifier.expand_kernel, expand)
    if probe_expand():
        raise RuntimeError(
            "vLLM's expand_kernel (vllm#55005): the workaround has no effect on this release, and sampling with "
            "temperature > 0 would be wrong; start without speculative_config, or use a supported release"
        )
    logger.info("replaced vLLM's expand_kernel, which leaves sampling parameters unset on CPU (vllm#55005)")
    return True


# --- parameters that vLLM cannot combine with speculation


def has_custom_processors(vllm_config: VllmConfig) -> bool:
    """Whether logits processors other than vLLM's own are given or installed."""
    return bool(vllm_config.model_config.logits_processors) or _processors_installed()


@functools.cache
def _processors_installed() -> bool:
    return bool(entry_points(group="vllm.logits_processors"))


def most_drafts(request: Any) -> int | None:
    """How many drafts of a request the V1 verifier can judge exactly in its next pass; None for any number.

    Args:
        request: A `vllm.v1.request.Request` about to be scheduled.

    0 with `min_p` or `logit_bias`, which only bonus rows are given. While the output is shorter than `min_tokens`, end
    tokens are barred from the bonus row too, however many drafts precede it; so the drafts must end before the
    row where they are free.
    """
    params = request.sampling_params
    if params is None:
        return None
    if params.min_p > 0 or params.logit_bias:
        return 0
    missing = params.min_tokens - request.num_output_tokens
    if missing <= 0 or not params.all_stop_token_ids:
        return None
    return 0 if request.num_output_placeholders else missing - 1


@dataclass
class DraftLimits:
    """Drops the drafts that one engine's verifier would judge inexactly.

    Attributes:
        none_at_all: Whether no request may have any: custom logits processors may act on all of them.
    """

    none_at_all: bool
    _told: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> DraftLimits | None:
        """The limits of an engine; None if it is not configured for rollout-spec, or does not speculate."""
        if vllm_config.speculative_config is None or options_of(vllm_config) is None:
            return None
        limits = cls(has_custom_processors(vllm_config))
        if limits.none_at_all:
            logger.warning("custom logits processors are installed: every request is decoded without drafts")
        return limits

    def apply(self, running: Iterable[Any]) -> None:
        """Shorten the drafts of the requests about to be scheduled, `vllm.v1.request.Request`s."""
        for request in running:
            drafts = request.spec_token_ids
            most = 0 if self.none_at_all else most_drafts(request) if drafts else None
            if most is not None and most < len(drafts):
                request.spec_token_ids = drafts[:most]
                if not self._told:
                    self._told = True
                    logger.info("requests with min_p, logit_bias or min_tokens get no drafts, or fewer")


def check_judged(runner: Any, num_drafts: list[int]) -> None:
    """Refuse to verify drafts of a request whose parameters the verifier would drop.

    Only a scheduler that does not derive from vLLM's own lets them through.
    """
    custom = has_custom_processors(runner.vllm_config)
    for request_id, drafted in zip(runner.input_batch.req_ids, num_drafts, strict=True):
        params = runner.requests[request_id].sampling_params if drafted else None
        if params is not None and (custom or params.min_p > 0 or params.logit_bias):
            raise RuntimeError(
                f"request {request_id}: {drafted} drafts were scheduled for a request with min_p, logit_bias or a custom "
                "logits processor, which the verifier would drop; use a scheduler_cls derived from vLLM's Scheduler"
            )


def _admit(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        is_coupled(vllm_config)  # raises where it cannot be
        # Read only to refuse requests; where one may replay a trace, those that do have to be.
        if options_of(vllm_config) is not None and not getattr(
            vllm_config.model_config, "enable_trace_replay", False
        ):
            self.speculative_config = None

    return init


def limits_of(scheduler: Any) -> DraftLimits | None:
    """The limits of a scheduler's engine, looked up once."""
    try:
        limits: DraftLimits | None = scheduler._rollout_spec_limits
    except AttributeError:
        limits = scheduler._rollout_spec_limits = DraftLimits.of(scheduler.vllm_config)
    return limits


def may_draft(scheduler: Any, request: Any) -> bool:
    """Whether drafts of a request can be verified at all, now or later; a policy need not ask for others."""
    limits, params = limits_of(scheduler), request.sampling_params
    if limits is None or params is None:
        return True
    return not (limits.none_at_all or params.min_p > 0 or params.logit_bias)


def _schedule_fewer(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        limits = limits_of(self)
        if limits is None:
            return original(self, *args, **kwargs)
        limits.apply(self.running)
        output = original(self, *args, **kwargs)
        if limits.none_at_all:
            output.num_spec_tokens_to_schedule = 0
        return output

    return schedule


def _build_all_processors(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_logitsprocs(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.speculative_config is not None and options_of(vllm_config) is not None:
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = None
        return original(vllm_config, *args, **kwargs)

    return build_logitsprocs


def admit(module: ModuleType) -> None:
    """Touch `vllm.v1.engine.input_processor`: admit requests that vLLM refuses beside speculation.

    `InputProcessor.speculative_config` is read only to refuse them (`SamplingParams.verify`): those with `min_p` or
    `logit_bias`, and those with `trace_decode_token_ids`. So it is cleared, except with `enable_trace_replay`, without
    which vLLM refuses the last anyway: in a pass with drafts its V2 runner samples all requests by its verifier, which
    ignores traces, those without drafts too. There `min_p` and `logit_bias` stay refused.
    """
    rebind(module.InputProcessor, "__init__", _admit)


def schedule_fewer(module: ModuleType) -> None:
    """Touch `vllm.v1.core.sched.scheduler`: before it schedules, drop the drafts that could not be judged exactly.

    vLLM lets nobody limit the drafts of one request. Schedulers that derive from vLLM's come here through super().
    """
    rebind(module.Scheduler, "schedule", _schedule_fewer)


def load_all_processors(module: ModuleType) -> None:
    """Touch `vllm.v1.worker.gpu_model_runner`: load the logits processors that vLLM leaves out when it speculates.

    Its samplers apply them to the bonus row of each request, which is the only row of a request without drafts.
    """
    rebind(module, "build_logitsprocs", _build_all_processors)
