"""vLLM's scheduler with a speculation policy: K is decided in every step, from measured costs and acceptance.

Give `scheduler_cls` the name of `PolicyScheduler`; where vLLM schedules asynchronously it makes the asynchronous one.
The policy works over every method of vLLM that drafts as many tokens as it is told.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from rollout_spec.contracts import invalid
from rollout_spec.integrations.vllm.choose_policy import (
    choose_policy,
    draft_lengths,
    drafter_name,
    drafts_late,
    longest_beside_drafts,
    why_no_history,
)
from rollout_spec.integrations.vllm.decisions import Decision, Decisions, Ended, Live, Verified
from rollout_spec.integrations.vllm.fit import check_fit
from rollout_spec.integrations.vllm.history import RequestHistory
from rollout_spec.integrations.vllm.metrics import SchedulerMetrics, set_aside
from rollout_spec.integrations.vllm.options import KEY, options_of
from rollout_spec.integrations.vllm.refusals import refuse_data_parallel, refuse_ignored
from rollout_spec.integrations.vllm.sampling import may_draft
from rollout_spec.policy.records import Matches
from rollout_spec.vllm_backend.fast_paths import given_up_by

logger = logging.getLogger("rollout_spec")

_TELL_EVERY = 32  # steps of a rest
_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
_FIXED_LENGTH = ("medusa", "mlp_speculator", "custom_class", "extract_hidden_states")


@dataclass
class _Step:
    """A step under way."""

    output: Any
    before: Decision
    now: Decision
    began: float


class PolicyScheduler(Scheduler):
    """vLLM's scheduler, asking a policy for K.

    Attributes:
        decisions: What was decided, by reason and by K.
    """

    dynamic_sd_lookup: list[int] | None

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> PolicyScheduler:
        if cls is PolicyScheduler and vllm_config.scheduler_config.async_scheduling:
            return super().__new__(AsyncPolicyScheduler)
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_fit(vllm_config)
        options = options_of(vllm_config)
        if options is None:
            raise invalid(
                "scheduler_cls", type(self).__name__, f"give additional_config={{{KEY!r}: {{...}}}} too"
            )
        refuse_data_parallel(vllm_config)
        refuse_ignored(vllm_config, options)
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method in _FIXED_LENGTH:
            raise invalid(
                "speculative_config.method",
                speculative.method,
                "it drafts at one length only; use another method",
            )
        for path, why in given_up_by(vllm_config).items():
            logger.warning("no %s: %s", path, why)
        super().__init__(vllm_config, *args, **kwargs)
        captured = None if self.dynamic_sd_lookup is None else self.dynamic_sd_lookup[1:]
        lengths = draft_lengths(vllm_config, captured)
        without_history = why_no_history(vllm_config, options)
        self._history = RequestHistory(options.history_tokens) if without_history is None else None
        if options.history and without_history is not None:
            logger.info("nothing is drafted from text seen before: %s", without_history)
        # Not None, so that vLLM does not pad new requests with placeholders for a K that is not decided here.
        self.dynamic_sd_lookup = [0] * (self.scheduler_config.max_num_seqs + 1)
        self.decisions = Decisions(
            choose_policy(vllm_config, options, lengths),
            drafter_name(vllm_config),
            lengths,
            0.0 if speculative is None or "ngram" in speculative.method else options.canary_min_acceptance,
            drafts_late(vllm_config),
            self._history is not None,
        )
        self._longest = longest_beside_drafts(vllm_config, self.max_model_len)
        self._metrics = SchedulerMetrics(vllm_config, self.kv_cache_config)
        self._decided = Decision(0)
        self._steps: deque[_Step] = deque()
        self._ended = 0.0
        self._began = 0.0
        self._untold = 0
        self._renewed = False  # since the last step

    @property
    def drafting(self) -> bool:
        """Whether the step that ended last may have made drafts to be verified."""
        return bool(self._steps) or (self._decided.draft_length > 0 and not self._decided.dropped)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._history is not None and self._decided.looked and not self._decided.draft_length:
            self._draft_from(self._history)
        self._began = time.perf_counter()
        return super().schedule(*args, **kwargs)

    def _draft_from(self, history: RequestHistory) -> None:
        """Decide what history drafts for the step about to be scheduled, and give it to the running requests."""
        began, known = time.perf_counter(), set(self._decided.requests)
        requests = [x for x in self.running if x.request_id in known and _decodes(x)]
        if not requests:
            return
        live = [self._live(x, x.num_tokens) for x in requests]
        matches = history.matches(requests, self._allowed(requests, live))
        self._decided = self.decisions.revise(self._decided, live, len(self.waiting), matches, began)
        if self._decided.by_history and self._decided.plan is not None:
            drafts = history.drafts(requests, self._decided.plan.draft_lengths)
            for request, tokens in zip(requests, drafts, strict=True):
                request.spec_token_ids = tokens

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        before, self._decided = self._decided, self._decide(scheduler_output)
        if before.plan is not None:  # nothing can change it any more
            self._metrics.decided(before.plan.reason, before.longest, before.drafter)
        scheduler_output.num_spec_tokens_to_schedule = self._decided.draft_length
        self._renewed = self._renewed and not scheduler_output.num_scheduled_tokens
        self._untold += 1
        if self._decided.state is not None or self._untold >= _TELL_EVERY:
            scheduler_output.rollout_spec = (
                self.figures()
            )  # so that `rollout_spec_state` can tell from outside
            self._metrics.publish()
            self._untold = 0
        self._steps.append(_Step(scheduler_output, before, self._decided, self._began))
        super()._update_after_schedule(scheduler_output)

    def _decide(self, scheduler_output: Any) -> Decision:
        scheduled = scheduler_output.num_scheduled_tokens
        if not scheduled or not self.num_spec_tokens:
            return Decision(0)
        decision = None
        if scheduler_output.total_num_scheduled_tokens == len(
            scheduled
        ):  # all decode, and nothing was drafted
            decision = self.decisions.rest(len(scheduled))
        return decision or self._look(scheduler_output)

    def _look(self, scheduler_output: Any) -> Decision:
        began = time.perf_counter()
        live: list[Live] = []
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            known = request.num_tokens + request.num_output_placeholders
            if request.num_computed_tokens + count < known or request.sampling_params is None:
                continue  # it goes on prefilling
            one = self._live(request, known + 1)
            if one.allowed > 0:
                live.append(one)
        self.decisions.forget_others(self.requests)
        if not any(may_draft(self, self.requests[one.request]) for one in live):
            return Decision(0)
        if self._too_long(scheduler_output):
            return Decision(0)
        matches = None
        if self._history is not None and self.decisions.looks:
            matches = self._expected(self._history, live, scheduler_output.scheduled_spec_decode_tokens)
        return self.decisions.decide(live, len(self.waiting), began, matches)

    def _too_long(self, scheduler_output: Any) -> bool:
        """Whether the runner would draft zeros for every request; rejected, they would count against the drafter."""
        return self._longest is not None and any(
            self.requests[request_id].num_computed_tokens + count > self._longest
            for request_id, count in scheduler_output.num_scheduled_tokens.items()
        )

    def _expected(
        self, history: RequestHistory, live: Sequence[Live], drafts: Mapping[str, Sequence[int]]
    ) -> Matches:
        """What history will have for the requests of `live` that can take it, after a step that verifies `drafts`."""
        requests = [self.requests[one.request] for one in live]
        under_way = np.array([1 + len(drafts.get(one.request, ())) for one in live], np.int64)
        return history.expected(requests, under_way, self._allowed(requests, live))

    def _allowed(self, requests: Sequence[Any], live: Sequence[Live]) -> np.ndarray:
        """Draft tokens allowed to each request, int64."""
        return np.array(
            [
                one.allowed - 1 if may_draft(self, x) and x.structured_output_request is None else 0
                for x, one in zip(requests, live, strict=True)
            ],
            np.int64,
        )

    def _live(self, request: Any, known: int) -> Live:
        """A request that has `known` tokens when the pass begins that is decided about."""
        outputs = known - request.num_prompt_tokens
        allowed = min(request.max_tokens - outputs, self.max_model_len - known)
        return Live(request.request_id, known, outputs, allowed)

    def figures(self) -> dict[str, Any]:
        """What was decided so far, as plain values: see `WorkerExtension.rollout_spec_state`."""
        return {
            "reasons": {reason.value: steps for reason, steps in self.decisions.reasons.items()},
            "draft_lengths": dict(self.decisions.draft_lengths),
            "drafters": dict(self.decisions.drafters),
            "set_aside": self.decisions.set_aside,
            "drafter_kv_blocks": self._metrics.kv_blocks,
        }

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        while self._steps and self._steps[0].output is not scheduler_output:
            self._steps.popleft()
        step = self._steps.popleft() if self._steps else None
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if step is None or (step.before.state is None and not drafts):
            return self._update_unobserved(step, scheduler_output, model_runner_output)
        tokens, row = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        decoded, clean = {}, True
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            drafted = len(drafts.get(request_id, ()))
            if count != 1 + drafted:
                clean = False
            elif tokens and request_id in row:
                decoded[request_id] = drafted, len(tokens[row[request_id]])
        result = super().update_from_output(scheduler_output, model_runner_output)
        now = time.perf_counter()
        deciding = step.now.seconds if step.began >= self._ended else 0.0  # else it was done beside a step
        # Late drafts were made since the last step ended, whether or not this one was scheduled by then.
        late = self.decisions.late and step.before.draft_length > 0
        began = self._ended if late else max(step.began, self._ended)
        seconds, self._ended = now - began - deciding, now
        verified = []
        for request_id, (drafted, emitted) in decoded.items():
            request = self.requests.get(request_id)
            finished = request is None or request.is_finished()
            verified.append(Verified(request_id, drafted, emitted, finished))
        self.decisions.observe(step.before, step.now, verified, seconds, clean)
        if self.decisions.set_aside is not None:
            set_aside(self.vllm_config, "scheduler", True)
        return result

    def _update_unobserved(self, step: _Step | None, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Of a step that teaches nothing, only the lengths of what ends in it are kept."""
        requests = [self.requests.get(request_id) for request_id in scheduler_output.num_scheduled_tokens]
        result = super().update_from_output(scheduler_output, model_runner_output)
        self._ended = time.perf_counter()
        if step is not None:
            self.decisions.observe(step.before, step.now, (), 0.0, False)
        if self.finished_req_ids and self.num_spec_tokens:
            ended = [
                Ended(x.request_id, x.num_output_tokens, x.num_output_tokens >= x.max_tokens)
                for x in requests
                if x is not None and x.request_id in self.finished_req_ids
            ]
            if ended:
                self.decisions.ended(ended)
                self._metrics.publish()
        return result

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if self._history is not None:
            self._history.finish(request, request.status in _COMPLETE)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's. Every weight update ends with it, so what was learnt of the drafter counts less from here on.

        Updates reset it several times, and so does vLLM's sleep before them: they count once between two steps.
        """
        if not self._renewed:
            self._renewed = True
            self.decisions.after_update()
            if self._history is not None:
                self._history.after_update()
            set_aside(self.vllm_config, "scheduler", False)
        return super().reset_prefix_cache(*args, **kwargs)


def _decodes(request: Any) -> bool:
    """Whether a step computes no more of a running request than its next token, and drafts."""
    return request.num_output_tokens > 0 and request.num_computed_tokens == request.num_tokens - 1


class AsyncPolicyScheduler(PolicyScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler: K is decided before the last step's outcome is known."""

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        if self._decided.dropped:  # the next step verifies no placeholders
            for request_id in scheduler_output.num_scheduled_tokens:
                self.requests[request_id].spec_token_ids = []
