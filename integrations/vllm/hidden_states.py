"""Hidden states of the target, taken while vLLM decodes: what a trained drafter learns from, without a further pass.

vLLM hands its drafter the hidden states of every step. `capture` passes those on whose input token is settled: prompt
tokens, tokens sampled last and accepted drafts. Without a callback nothing is done.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.refusals import V1
from rollout_spec.integrations.vllm.sampling import rebind

logger = logging.getLogger("rollout_spec")


@dataclass(frozen=True)
class HiddenStates:
    """What one step computed; rows lie by request in the order of `request_ids`, and by position within each.

    Rows can go beyond the end of a request, where drafts behind its last token were accepted and then cut; the token
    sampled last of all has none. A position comes again when its request was preempted or its weights changed. It never
    comes where the prefix cache had it, or where vLLM did not ask its drafter (near `max_model_len`).

    Attributes:
        request_ids: vLLM's own ids, `<id given>-<suffix>`; [B].
        counts: Rows of each request, int64 [B].
        tokens: Input tokens [T]; the state of a row is the one from which the token after it is predicted.
        positions: Of these tokens in their sequences, int64 [T] (the last dimension, with multimodal rotary positions).
        states: [T, D] in the model's dtype, after the last norm; for `eagle3` and `dflash` those of the layers that
            the drafter reads, side by side.
    """

    request_ids: tuple[str, ...]
    counts: Tensor
    tokens: Tensor
    positions: Tensor
    states: Tensor


Callback = Callable[[HiddenStates], None]
_callbacks: list[Callback] = []
_silent: WeakSet[Any] = WeakSet()  # runners that show nobody their hidden states


def capture(callback: Callback) -> Callable[[], None]:
    """Call `callback` after every step of the engines in this process, which must be that of the workers.

    From elsewhere use `collective_rpc("rollout_spec_capture", args=("module:function",))`. Works over vLLM's V1 runner,
    with the self-drafter and with methods that read hidden states (`draft_model`, `eagle`, `eagle3`, `mtp`, `dflash`).
    The callback runs before drafting, so it should only keep what it needs; one that raises is reported and dropped.

    Returns:
        Stops it.

    Raises:
        InvalidRequest: An engine here runs on vLLM's V2 runner.
    """
    if _silent:
        refuse_capture(callback)
    _callbacks.append(callback)

    def stop() -> None:
        if callback in _callbacks:
            _callbacks.remove(callback)

    return stop


def shows_nothing(runner: Any) -> None:
    """Note a runner whose hidden states are not taken, or refuse it if they are wanted: InvalidRequest."""
    if _callbacks:
        refuse_capture(_callbacks[0])
    _silent.add(runner)


def refuse_capture(callback: Callback) -> None:
    """Raise InvalidRequest: nothing would ever come."""
    raise invalid(
        "capture",
        getattr(callback, "__name__", callback),
        f"the V2 model runner's hidden states are not taken; {V1}",
    )


def capturing() -> bool:
    """Whether anybody in this process wants hidden states."""
    return bool(_callbacks)


def tap(module: ModuleType) -> None:
    """Touch `vllm.v1.spec_decode.llm_base_proposer`: show the callbacks what is handed to the drafter."""
    rebind(module.SpecDecodeBaseProposer, "__init__", _knowing_its_runner)
    rebind(module.SpecDecodeBaseProposer, "propose", _tapped)


def _knowing_its_runner(construct: Callable[..., None]) -> Callable[..., None]:
    """vLLM's proposers are given the runner, which knows the requests of each row, and forget it."""
    signature = inspect.signature(construct)

    def knowing(self: Any, *args: Any, **options: Any) -> None:
        self.rollout_spec_runner = signature.bind(self, *args, **options).arguments.get("runner")
        construct(self, *args, **options)

    return knowing


def _tapped(propose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    signature = inspect.signature(propose)

    def tapped(self: Any, *args: Any, **options: Any) -> Tensor:
        if _callbacks:
            show(self.rollout_spec_runner, signature.bind(self, *args, **options).arguments)
        return propose(self, *args, **options)

    return tapped


def show(runner: Any, given: Mapping[str, Any]) -> None:
    """Give the callbacks what a proposer was `given`, by name; one that reads no hidden states has nothing for them."""
    if _callbacks and "target_hidden_states" in given and "common_attn_metadata" in given:
        offer(
            runner,
            given["target_token_ids"],
            given["target_positions"],
            given["target_hidden_states"],
            given["common_attn_metadata"],
            given.get("num_rejected_tokens_gpu"),
        )


def offer(
    runner: Any, tokens: Tensor, positions: Tensor, states: Tensor, metadata: Any, rejected: Tensor | None
) -> None:
    """Give the callbacks what a drafter was given: `rejected [B]` says how many last rows of each request fell."""
    if not _callbacks:
        return
    batch = metadata.batch_size()
    bounds = metadata.query_start_loc[: batch + 1].long()
    scheduled = bounds.diff()
    counts = scheduled if rejected is None else scheduled - rejected[:batch]
    starts = bounds[:-1].repeat_interleave(counts)
    within = torch.arange(len(starts), device=starts.device)
    rows = starts + within - (counts.cumsum(0) - counts).repeat_interleave(counts)
    captured = HiddenStates(
        tuple(runner.input_batch.req_ids[:batch]), counts, tokens[rows], positions[..., rows], states[rows]
    )
    for callback in tuple(_callbacks):
        _call(callback, captured)


def _call(callback: Callback, captured: HiddenStates) -> None:
    try:
        callback(captured)
    except Exception:  # a guest's failure must not end the rollout
        _callbacks.remove(callback)
        logger.exception("hidden states are no longer captured: %r raised", callback)
