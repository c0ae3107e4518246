"""vLLM as a backend of `RolloutEngine`: samples in, samples out, weights replaced in place.

vLLM runs in this process or in its own (`VLLM_ENABLE_V1_MULTIPROCESSING`). Nothing here knows about threads or trainers.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import (
    FinishReason,
    RolloutSpecError,
    SamplingParams,
    SpecCounts,
    WeightError,
    invalid,
)
from rollout_spec.drafters.guard import CONTEXTS, DrafterReport
from rollout_spec.integrations.vllm import compat_worker as compat
from rollout_spec.integrations.vllm.weights import WeightUpdate, set_version, states
from rollout_spec.integrations.vllm.worker import StampedDrafter
from rollout_spec.models.checkpoint import read_config
from rollout_spec.policy.records import SpeculationPolicy
from rollout_spec.torch_backend.backend import StepTimes
from rollout_spec.torch_backend.slots import Prompt, Sample
from rollout_spec.torch_backend.weights import UpdateReport
from rollout_spec.vllm_backend.arguments import engine_arguments
from rollout_spec.vllm_backend.samples import InFlight, check_params, vllm_params
from rollout_spec.vllm_backend.watch import Watch


@dataclass(frozen=True)
class ServedModel:
    """What the engine asks about the model: see `models.spec.ModelSpec`, which knows fewer families."""

    architecture: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    shape_key: str

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64


@dataclass
class ServedWeights:
    """Version of the policy in vLLM's workers and of the drafter beside it; `target` names the model for `score`."""

    version: int
    drafter: StampedDrafter | None
    target: str = "target"


class VllmBackend:
    """Decodes samples with a vLLM engine it owns.

    Attributes:
        engine: vLLM's `LLMEngine`.
        spec: The model.
        weights: Versions in force.
        whole: False after a weight update failed half-way: nothing can be computed until one succeeds.
        times: Whole steps; what a step spends on what is not known outside vLLM.
        loaded: What starting took; vLLM does not say how many tensors it read.
    """

    updates_in_place = True
    row_invariant = False
    calibration = None

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig,
        version: int,
        decode_text: Callable[[list[int]], str] | None,
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.config, self._decode_text, start = config, decode_text, time.perf_counter()
        self._watch = Watch()
        self.engine: Any = LLMEngine.from_engine_args(
            EngineArgs(**engine_arguments(path, config)), stat_loggers=[self._watch.logger]
        )
        vllm_config = self.engine.vllm_config
        model, cache = vllm_config.model_config, vllm_config.cache_config
        self.spec = _served_model(path, model)
        self.dtype, self.device = model.dtype, torch.device(vllm_config.device_config.device_type)
        self.max_model_len: int = model.max_model_len
        self.kv_tokens: int = (cache.num_gpu_blocks - 1) * cache.block_size
        self._coupled = config.speculation.verifier == "coupled"
        self.times = StepTimes(prefill=float("nan"), draft=float("nan"), target=float("nan"))
        self.weights = ServedWeights(version, None)
        self.whole, self._asleep = True, False
        self.generated_tokens = 0
        self._in_flight: dict[str, InFlight] = {}
        self._early: list[Sample] = []  # ended while something else was being done
        self._names = itertools.count()
        self._recent: deque[list[int]] = deque(maxlen=CONTEXTS)
        self._update: WeightUpdate | None = None
        self.engine.collective_rpc("rollout_spec_start", args=(version,))
        set_version(self.engine, version)
        self._refresh()
        self.loaded = UpdateReport(version, time.perf_counter() - start, 0.0, 0, 0)

    # --- decoding --------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._early)

    def prompt(self, tokens: np.ndarray) -> Prompt:
        """The record of a prompt; vLLM's prefix cache is what shares its blocks."""
        return Prompt(tokens)

    def check_params(self, params: SamplingParams) -> None:
        """Refuse what vLLM would change or cannot report; InvalidRequest names the field."""
        check_params(params)

    def submit(self, sample: Sample) -> None:
        name = f"{sample.request_id}-{sample.index}-{next(self._names)}"
        params = vllm_params(sample, self.coupled, self.weights.version)
        self._in_flight[name] = InFlight(sample)
        self.engine.add_request(name, {"prompt_token_ids": sample.prompt.tokens.tolist()}, params)

    def step(self) -> list[Sample]:
        """Advance every sequence vLLM chooses to; returns the samples that ended."""
        finished, self._early = self._early, []
        if self._in_flight:
            finished += self._step()
        return finished

    def abort(self, samples: Iterable[Sample]) -> None:
        """End samples now; each keeps the output it has."""
        wanted = {id(sample) for sample in samples if sample.finish_reason is None}
        names = [name for name, flight in self._in_flight.items() if id(flight.sample) in wanted]
        self.engine.abort_request(names)
        for name in names:
            self._in_flight.pop(name).end(FinishReason.ABORT)

    def _step(self, others: dict[str, Any] | None = None) -> list[Sample]:
        """One of vLLM's steps; the last output of requests that are not samples goes to `others`."""
        start, finished, stopped = time.perf_counter(), [], []
        for output in self.engine.step():
            flight = self._in_flight.get(output.request_id)
            if flight is None:
                if others is not None:
                    others[output.request_id] = output
                continue
            (completion,) = output.outputs
            before = len(flight.tokens)
            reason = flight.take(completion, self.weights.version, self._decode_text)
            self.generated_tokens += len(flight.tokens) - before
            if reason is None:
                continue
            if not output.finished:
                stopped.append(output.request_id)
            del self._in_flight[output.request_id]
            sample = flight.end(reason)
            self._recent.append([*sample.prompt.tokens.tolist(), *flight.tokens])
            finished.append(sample)
        if stopped:
            self.engine.abort_request(stopped)
        self.times.steps += 1
        self.times.total += time.perf_counter() - start
        return finished

    # --- weights and memory ----------------------------------------------------------------------------

    def stage(
        self, weights: Iterable[tuple[str, Tensor]], version: int, hold: Callable[[], None]
    ) -> UpdateReport:
        """Stream new weights into the workers; `hold` is called before the first one is overwritten.

        Raises:
            WeightError: Nothing was overwritten.
            HalfUpdated: See `whole`.
        """
        if self._asleep:
            raise WeightError("update_weights: vLLM has given its memory back; call wake_up() first")

        def drain() -> None:
            while compat.pending_outputs(self.engine):
                self._early += self._step()

        self._update = update = WeightUpdate(self.engine, hold=hold, drain=drain)
        try:
            return update.send(weights, version)
        finally:
            self.whole = self.whole and not update.begun

    def commit(self, report: UpdateReport) -> UpdateReport:
        """Put what was staged in force for target and drafter."""
        assert self._update is not None, "nothing staged"
        report = self._update.finish(report, list(self._recent))
        self.whole, self._update = True, None
        self.weights.version = report.version
        self._refresh()
        return report

    def sleep(self, *, discard_weights: bool = False) -> None:
        """vLLM's sleep, level 1 or 2; on a CPU it only pauses. Requests in flight wait and recompute."""
        model = self.engine.vllm_config.model_config
        if self.device.type != "cpu" and not model.enable_sleep_mode:
            raise invalid("vllm.enable_sleep_mode", False, "set it to true at start to use sleep()")
        self.engine.sleep(level=2 if discard_weights else 1, mode="keep")
        self._asleep = True

    def wake_up(self) -> None:
        """Take the memory back and go on."""
        self.engine.wake_up()
        self._asleep = False

    # --- looking in ------------------------------------------------------------------------------------

    def logprobs(self, tokens: np.ndarray) -> list[float]:
        """Logprob of each token after the first, from a prefill of its own (T=1)."""
        import vllm

        name = f"score-{next(self._names)}"
        params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": tokens.tolist()}, params)
        others: dict[str, Any] = {}
        while name not in others or not others[name].finished:
            self._early += self._step(others)
        rows = others[name].prompt_logprobs
        return [row[int(token)].logprob for token, row in zip(tokens[1:], rows[1:], strict=True)]

    def score(self, model: Any, tokens: np.ndarray) -> Tensor:
        """Logits float32 `[T, V]` after each of `tokens [T]`, from a plain pass of `weights.target`; only while idle."""
        assert not self._in_flight, "requests are in flight"
        self.engine.reset_prefix_cache()
        found = self.engine.collective_rpc(
            "rollout_spec_score", args=(tokens.tolist(), model != self.weights.target)
        )[0]
        self.engine.reset_prefix_cache()
        if found is None:
            raise RolloutSpecError("score: this model's KV cache has several kinds of layers")
        rows, columns, data = found
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, columns)

    @contextmanager
    def biased_drafter(self, bias: Tensor) -> Iterator[None]:
        """Add `bias [V or more]` to the drafter's logits for a while; only where vLLM runs in this process."""
        model = compat.model_runner(self.engine).get_draft_model()
        compute = model.compute_logits
        model.compute_logits = lambda hidden: (logits := compute(hidden)) + bias[: logits.shape[-1]]
        try:
            yield
        finally:
            del model.compute_logits

    @property
    def policy(self) -> SpeculationPolicy:
        """What decides K; to be read and replaced only where vLLM runs in this process."""
        policy: SpeculationPolicy = compat.scheduler(self.engine).decisions.policy
        return policy

    @policy.setter
    def policy(self, policy: SpeculationPolicy) -> None:
        compat.scheduler(self.engine).decisions.policy = policy

    @property
    def coupled(self) -> bool:
        """Which verifier is in force; one engine started as coupled can be told to use rejection for a while."""
        return self._coupled

    @coupled.setter
    def coupled(self, coupled: bool) -> None:
        if coupled != self._coupled:
            compat.switch_coupled(self.engine, coupled)
            self._coupled = coupled

    @property
    def recorder(self) -> None:
        """Traces are recorded by the torch backend; vLLM has its own metrics."""

    @recorder.setter
    def recorder(self, recorder: object) -> None:
        if recorder is not None:
            raise RolloutSpecError("start_trace: backend='vllm' records no trace; look at vLLM's metrics")

    def figures(self) -> dict[str, Any]:
        """What `EngineStats` says of a backend."""
        state = states(self.engine)[0]
        seen = self._watch
        reports = tuple(DrafterReport(**report) for report in state["reports"])
        set_aside = self._set_aside_by_scheduler(state)
        if set_aside is not None:
            message = f"{set_aside}; decoding plainly until the next weight update"
            reports = (*reports, DrafterReport("low-acceptance", message, self.weights.version))
        return {
            "version": self.weights.version,
            "verifier": "coupled" if self.coupled else "rejection",
            "exactness": "E1" if self.coupled else "E0",
            "drafter": state["drafter"] if state["drafts"] and set_aside is None else None,
            "reports": reports,
            "calibration": None,
            "canary_acceptance": state["canary_acceptance"],
            "live": min(seen.running, len(self._in_flight)),
            "waiting": max(0, len(self._in_flight) - seen.running),
            "kv_tokens": self.kv_tokens,
            "kv_tokens_free": round(self.kv_tokens * (1 - seen.kv_usage)),
            "preemptions": seen.preemptions,
            "generated_tokens": self.generated_tokens,
            "spec": SpecCounts(seen.drafted, seen.accepted, seen.drafts, self._plain_steps()),
            "times": StepTimes(**vars(self.times)),
        }

    def _set_aside_by_scheduler(self, state: dict[str, Any]) -> str | None:
        """Why it no longer plans with the drafter; from a process of its own, as of the last step's start."""
        if compat.shares_process(self.engine):
            found: str | None = compat.scheduler(self.engine).decisions.set_aside
        else:
            found = state["decisions"].get("set_aside")
        return found

    def _plain_steps(self) -> int:
        seen = self._watch
        return max(0, self.generated_tokens - seen.accepted - seen.drafts)

    def _refresh(self) -> None:
        state = states(self.engine)[0]
        name = state["drafter"]
        self.weights.drafter = None if name is None else StampedDrafter(name, state["drafter_version"])


def _served_model(path: str | Path, model_config: Any) -> ServedModel:
    values = read_config(path)
    eos = values.get("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    text = model_config.hf_text_config
    architecture = (values.get("architectures") or [values.get("model_type", "")])[0]
    shape = f"{text.num_hidden_layers}x{text.hidden_size}"
    return ServedModel(architecture, model_config.get_vocab_size(), ends, shape)
