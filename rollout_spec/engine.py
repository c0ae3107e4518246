"""The rollout engine a trainer talks to: requests in, completions out, weights in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import (
    Completion,
    InvalidRequest,
    RolloutSpecError,
    SamplingParams,
    SpecCounts,
    WeightError,
    invalid,
)
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.drafters.guard import DrafterReport
from rollout_spec.models.checkpoint import read_checkpoint, read_config, state_dict_from
from rollout_spec.models.spec import ModelSpec
from rollout_spec.observe.machine import cpu_model, installed_versions
from rollout_spec.observe.trace import TraceRecorder
from rollout_spec.policy.records import Trace
from rollout_spec.requests import Prompt, RequestReader, noise_key, read_request_ids
from rollout_spec.sampling.noise import fold
from rollout_spec.step_lock import StepLock
from rollout_spec.torch_backend.backend import StepTimes, TorchBackend
from rollout_spec.torch_backend.completions import to_completion
from rollout_spec.torch_backend.features import FeatureStore
from rollout_spec.torch_backend.kv_cache import OutOfBlocks
from rollout_spec.torch_backend.slots import Sample
from rollout_spec.torch_backend.weights import UpdateReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout_spec.vllm_backend.backend import VllmBackend

    Backend = TorchBackend | VllmBackend


class EngineAsleep(RolloutSpecError, RuntimeError):
    """The engine sleeps, or has no weights; the message says what wakes it."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine.

    Attributes:
        version: Policy version in force.
        verifier: `coupled` or `rejection`.
        exactness: Level reached: `E2` trajectories bitwise the same with speculation on and off, `E1` the
            same up to near-ties, `E0` lossless in distribution.
        drafter: Kind of the drafter in use, or None (off, or set aside).
        reports: Why drafters were set aside, if any were.
        calibration: Where the automatic policy's costs come from: `full` (`rollout-spec calibrate`), `brief` (the
            engine's own), or None (a fixed draft length, no speculation, or no room to measure).
        canary_acceptance: Acceptance on recent contexts after the last update; None if not measured.
        live, waiting: Sequences being decoded, and waiting.
        kv_tokens, kv_tokens_free: Capacity of the KV cache and what of it is free, in tokens.
        preemptions: Sequences sent back to the queue for lack of memory, by a weight update or by `sleep`.
        finished: Samples that ended, aborted ones included.
        generated_tokens: Output tokens of all samples so far, those in flight included.
        spec: Speculation counts over the same tokens.
        times: Where step time went, in seconds.
        last_update: What the last weight update cost.
        adaptive: Version of the trained drafter that may draft; None: there is none, it is in shadow, or set aside.
    """

    version: int
    verifier: str
    exactness: str
    drafter: str | None
    reports: tuple[DrafterReport, ...]
    calibration: str | None
    canary_acceptance: float | None
    live: int
    waiting: int
    kv_tokens: int
    kv_tokens_free: int
    preemptions: int
    finished: int
    generated_tokens: int
    spec: SpecCounts
    times: StepTimes
    last_update: UpdateReport
    adaptive: int | None = None


class RolloutEngine:
    """Generates rollouts of a policy whose weights a trainer keeps replacing.

    All methods may be called from several threads: a lock is held for one step, or one commit, at a time.

    Args:
        backend: What decodes; use `from_pretrained` or `from_model` to get one.
        config: The configuration it was built from.
        tokenizer: Needed for text prompts, text in completions, and stop strings.
        update: What loading the first weights cost.
    """

    def __init__(
        self,
        backend: Backend,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        update: UpdateReport,
    ) -> None:
        self.backend: Any = backend  # its own parts differ; what is called here both backends have
        self.config, self.tokenizer = config, tokenizer
        self._reader = RequestReader(
            tokenizer, backend.spec.vocab_size, backend.max_model_len, backend.kv_tokens
        )
        self._changed = StepLock()
        self._update_lock = threading.Lock()
        self._stepper = ThreadPoolExecutor(1, thread_name_prefix="rollout-spec")  # one, for all streams
        self._shared_step: asyncio.Future[None] | None = None
        self._asleep = False
        self._no_weights: str | None = None
        self._live: dict[str, list[Sample]] = {}
        self._submitted: dict[str, int] = {}
        self._finished = 0
        self._last_update = update

    # --- construction ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: EngineConfig | Mapping[str, Any] | None = None,
        *,
        version: int = 0,
        **options: Any,
    ) -> RolloutEngine:
        """Load a Hugging Face checkpoint folder (safetensors) and, if there is one, its tokenizer.

        Args:
            path: Folder with `config.json`, safetensors and, usually, tokenizer files.
            config: An `EngineConfig` or a mapping with its names.
            version: Policy version of these weights (a trainer that resumes passes its step).
            **options: Single `EngineConfig` fields, overriding `config`.

        Raises:
            UnsupportedModel: The architecture, quantization or attention kind is not served here.
            WeightError: The checkpoint is missing, truncated, a pickle, or does not fit its config.
            InvalidRequest: A configuration value is wrong.
        """
        config, tokenizer = _config(config, options), _load_tokenizer(Path(path))
        if config.backend == "vllm":
            from rollout_spec.vllm_backend.backend import VllmBackend

            served = VllmBackend(path, config, version, _text_decoder(tokenizer))
            return cls(served, config, tokenizer, served.loaded)
        spec = ModelSpec.from_hf_config(read_config(path))
        return cls._build(spec, read_checkpoint(path), config, tokenizer, version)

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module | Mapping[str, Tensor],
        config: EngineConfig | Mapping[str, Any] | None = None,
        *,
        hf_config: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        version: int = 0,
        **options: Any,
    ) -> RolloutEngine:
        """Take the weights of a `transformers` module, or a state dict with its `hf_config`; they are copied."""
        if not isinstance(model, (torch.nn.Module, Mapping)):
            raise WeightError(f"model={type(model).__name__}: give a transformers module or a state dict")
        config = _config(config, options)
        if config.backend != "torch":
            remedy = "vLLM loads folders: use from_pretrained, and update_weights for weights in memory"
            raise invalid("backend", config.backend, remedy)
        spec, tensors = state_dict_from(model, hf_config)
        return cls._build(spec, tensors, config, tokenizer, version)

    @classmethod
    def _build(
        cls,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, Tensor]],
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        version: int,
    ) -> RolloutEngine:
        if config.vllm is not None:
            raise invalid("vllm", config.vllm, "they are arguments of backend='vllm'; leave them out")
        device = _device(config.device)
        dtype = spec.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        if dtype == torch.float16 and device.type == "cpu":
            raise invalid("dtype", "float16", "on CPU use bfloat16 or float32")
        backend = TorchBackend(spec, config, dtype, device, _text_decoder(tokenizer))
        update = backend.start(tensors, version)
        return cls(backend, config, tokenizer, update)

    # --- generation ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int | None = None,
        seeds: Sequence[int] | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> list[Completion]:
        """Sample completions of every prompt from the current policy, and wait for all of them.

        Args:
            prompts: Texts or token id lists (a single one is fine too).
            sampling_params: One for all prompts or one each; default `SamplingParams()`.
            n: Samples per prompt, overriding `sampling_params.n`.
            seeds: One seed per prompt, overriding `sampling_params.seed`.
            request_ids: One id per prompt. The same id, seed, prompt and policy version give the same samples again
                (bitwise at exactness level E2). Under the coupled verifier that holds also for a prompt resumed
                with part of its answer appended, see `abort`.

        Returns:
            `n` completions per prompt, in order of prompts; the samples of a prompt are adjacent. A completion
            that `abort` ended has `finish_reason=ABORT` and what was sampled until then.

        Raises:
            InvalidRequest: A prompt or parameter cannot be honoured; nothing was started.
            EngineAsleep: Call `wake_up` (or `update_weights`) first.
        """
        groups = self._submit(*self._reader.read(prompts, sampling_params, n, seeds, request_ids))
        samples = [sample for group in groups for sample in group]
        try:
            while not all(sample.done for sample in samples):
                self._advance()
        except BaseException:
            self._withdraw(samples)
            raise
        return [to_completion(sample, self.tokenizer) for sample in samples]

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[Completion]:
        """Sample one prompt, yielding each of its `n` completions as it finishes.

        Any number of streams and `generate` calls may run at once; they share the batch. Closing the iterator
        aborts what is left of the request.
        """
        ids = None if request_id is None else [request_id]
        request = self._reader.read([prompt], sampling_params, None, None, ids)
        submitted = self._stepper.submit(self._submit, *request)  # not here: it may have to wait for a step
        try:
            pending = list((await asyncio.shield(asyncio.wrap_future(submitted)))[0])
        except asyncio.CancelledError:
            if not submitted.cancel():
                self._stepper.submit(lambda: self._withdraw(submitted.result()[0]))
            raise
        try:
            while pending:
                await self._step()
                for sample in [sample for sample in pending if sample.done]:
                    pending.remove(sample)
                    yield to_completion(sample, self.tokenizer)
        finally:
            if pending:
                self._withdraw(pending)

    async def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> list[Completion]:
        """All `n` completions of one prompt, in order of their index, without blocking the event loop."""
        completions = [c async for c in self.stream(prompt, sampling_params, request_id=request_id)]
        return sorted(completions, key=lambda completion: completion.index)

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End requests now (all, if none are named); whoever waits for them gets partial completions.

        To go on later, submit prompt + partial output as a longer prompt under the same `request_id`. At exactness
        level E2 and under the same policy version the answer is the one that would have been given without
        the interruption, for sample 0 and parameters that do not look back at the output: penalties,
        `min_tokens` and stop strings count from where the longer prompt ends.
        """
        with self._changed:
            ids = list(self._live) if request_ids is None else read_request_ids(request_ids)
            for request_id in ids:
                if request_id not in self._live:
                    raise invalid(
                        "request_ids", request_id, "not in flight; pass ids given to generate or stream"
                    )
            for request_id in dict.fromkeys(ids):
                samples = list(self._live[request_id])
                self.backend.abort(samples)
                for sample in samples:
                    self._forget(sample)

    # --- weights and memory ----------------------------------------------------------------------------

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int | None = None
    ) -> UpdateReport:
        """Replace the policy by a complete set of named tensors (Hugging Face names, any order).

        Tensors are packed, and quantized for the drafter, as they arrive, while generation goes on with the old
        weights; the commit falls between two steps. Requests in flight keep their tokens, recompute their cache
        and go on under the new policy (`Completion.version_spans` tells which token came from which).

        Args:
            weights: `(name, tensor)` pairs; buffers may be reused after each.
            version: The new policy version, larger than the last (after `sleep(level=2)` also the same again); None
                counts up by one.

        vLLM overwrites its weights in place: there, decoding stops from the first chunk of them on, and a failure
        after that leaves no policy in force until an update succeeds.

        Raises:
            WeightError: Something does not fit; the old weights stay in force, or (vLLM) none are, as it then says.
        """
        held = []

        def hold() -> None:
            self._changed.make_way()
            held.append(True)
            with self._changed:
                pass  # the step that was running is over

        with self._update_lock:
            version = self.backend.weights.version + 1 if version is None else version
            try:
                report = self.backend.stage(weights, version, hold)
                if not held:
                    hold()
                with self._changed:
                    if version != self.backend.weights.version:  # else ids would come twice
                        self._submitted.clear()
                    self._last_update = report = self.backend.commit(report)
                    self._no_weights = None
            finally:
                with self._changed:
                    if not self.backend.whole:
                        self._no_weights = "the last update_weights failed half-way"
                for _ in held:
                    self._changed.go_on()
        return report

    def publish_drafter(
        self,
        weights: Iterable[tuple[str, Tensor]] | str | Path,
        version: int | None = None,
        spec: EagleSpec | None = None,
    ) -> None:
        """Put a trained drafter in force beside the others, between two steps; requests in flight go on with it.

        It drafts unused at first, until its acceptance is known (`speculation.shadow`), and keeps its version through
        weight updates: it may lag behind the policy. Nothing of the policy is written.

        Args:
            weights: All of its tensors, by the names of `EagleSpec`, or a folder with them (safetensors).
            version: Of the drafter, larger than the last; None counts up by one.
            spec: Its shape; None: that of the drafter in force.

        Raises:
            WeightError: A name, shape, dtype or version does not fit; what was in force stays.
            InvalidRequest: The drafter does not fit this policy or configuration.
        """
        if not isinstance(self.backend, TorchBackend):
            remedy = (
                "only the torch backend takes one while it runs; name the exported folder in vLLM's options"
            )
            raise invalid("publish_drafter", self.config.backend, remedy)
        if isinstance(weights, (str, Path)):
            weights = read_checkpoint(weights)
        with self._update_lock:
            if self._no_weights:
                raise EngineAsleep(f"{self._no_weights}; call update_weights() before publish_drafter()")
            drafter = self.backend.make_drafter(weights, version, spec)
            with self._changed:
                self.backend.publish(drafter)

    def keep_features(
        self, layers: Sequence[int] = (), receive: Callable[[Sample, int], None] | None = None
    ) -> FeatureStore:
        """Keep the target's features of what is computed from now on, for training a drafter; see `FeatureStore`.

        Args:
            layers: As `EagleSpec.feature_layers`.
            receive: Called between two steps with every sample that finishes and the slot it is about to leave.

        Raises:
            InvalidRequest: Features of other layers are kept already, somebody else receives samples, or the backend is
                vLLM (use its hook there).
        """
        if not isinstance(self.backend, TorchBackend):
            remedy = "there, use rollout_spec.integrations.vllm.hidden_states.capture"
            raise invalid("keep_features", self.config.backend, remedy)
        with self._changed:
            if receive is not None and self.backend.on_finished is not None:
                raise invalid("receive", receive, "something else receives samples already; stop it first")
            kept = self.backend.keep_features(layers)
            self.backend.on_finished = receive
            return kept

    def sleep(self, level: int = 1) -> None:
        """Free the KV cache (level 1), and the weights too (level 2: `update_weights` must follow).

        Requests in flight wait and recompute after `wake_up`.
        """
        if level not in (1, 2):
            raise invalid("level", level, "use 1 (free the KV cache) or 2 (free the weights too)")
        with self._changed:
            if not self._asleep or (level == 2 and not self._no_weights):
                self.backend.sleep(discard_weights=level == 2)
                self._asleep = True
                if level == 2:
                    self._no_weights = "the engine slept at level 2"

    def wake_up(self) -> None:
        """Take the memory back; harmless when awake."""
        with self._changed:
            if self._asleep:
                self.backend.wake_up()
                self._asleep = False

    def stats(self) -> EngineStats:
        """A snapshot of what the engine is doing and has done."""
        with self._changed:
            return EngineStats(
                **self.backend.figures(), finished=self._finished, last_update=self._last_update
            )

    def start_trace(self, about: Mapping[str, object] | None = None) -> None:
        """Record every decode pass and finished sample from now on, replacing a trace that is under way.

        Args:
            about: JSON values to keep with it; machine facts and configuration are there already.
        """
        with self._changed:
            cpu, _ = cpu_model()
            facts = {"cpu": cpu, "versions": installed_versions(), "config": self.config.to_dict()}
            self.backend.recorder = TraceRecorder(facts | dict(about or {}))

    def stop_trace(self) -> Trace:
        """End the trace and return it; `rollout_spec.observe.trace.write_trace` keeps it in a file.

        Raises:
            RolloutSpecError: None was started.
        """
        with self._changed:
            recorder, self.backend.recorder = self.backend.recorder, None
        if recorder is None:
            raise RolloutSpecError("no trace is being recorded: call start_trace() first")
        return recorder.trace()

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Logprob of each token after the first given those before it, from a plain re-forward (T=1).

        Raises:
            InvalidRequest: Not a list of token ids, or more of them than the context or the free KV cache holds.
            EngineAsleep: Call `wake_up` (or `update_weights`) first.
        """
        tokens = self._reader.token_ids(token_ids, "token_ids")
        longest = self.backend.max_model_len
        if len(tokens) > longest:
            raise InvalidRequest(
                f"token_ids of {len(tokens)} tokens: the context holds {longest}; raise max_model_len"
            )
        with self._changed:
            self._check_awake()
            try:
                return self.backend.logprobs(tokens)
            except OutOfBlocks as error:
                raise InvalidRequest(
                    f"token_ids of {len(tokens)} tokens: no room in the KV cache now ({error}); wait for the "
                    "requests in flight or raise kv_cache_tokens"
                ) from error

    # --- inside ----------------------------------------------------------------------------------------

    def _submit(
        self, prompts: list[np.ndarray], params: list[SamplingParams], ids: list[str] | None
    ) -> list[list[Sample]]:
        backend = self.backend
        with self._changed:
            self._check_awake()
            for request_id in ids or ():
                if request_id in self._live:
                    raise invalid("request_ids", request_id, "is in flight already; use another id")
            for p in params:
                backend.check_params(p)
            groups = []
            for row, (tokens, p) in enumerate(zip(prompts, params, strict=True)):
                request_id = ids[row] if ids else self._own_id(tokens, p.seed)
                limit = min(
                    len(tokens) + (p.max_tokens or backend.max_model_len),
                    backend.max_model_len,
                    backend.kv_tokens,
                )
                ends = p.stop_token_ids + (() if p.ignore_eos else backend.spec.eos_token_ids)
                ends = tuple(dict.fromkeys(ends))
                prompt = backend.prompt(tokens)
                group = [
                    Sample(
                        request_id,
                        index,
                        prompt,
                        p,
                        noise_key(self.config.seed, request_id, p.seed, index),
                        limit,
                        ends,
                    )
                    for index in range(p.n)
                ]
                for sample in group:
                    backend.submit(sample)
                self._live[request_id] = list(group)
                groups.append(group)
        return groups

    def _own_id(self, tokens: np.ndarray, seed: int | None) -> str:
        """An id for a request that came without: its policy version, prompt and seed, and how often it came.

        The noise follows from the id, so a run that is repeated gives the same samples, and so does the id alone.
        """
        place = f"v{self.backend.weights.version}-{fold(*tokens.tolist()) % 2**64:016x}"
        place += "" if seed is None else f"-seed{seed}"
        while True:
            count = self._submitted.get(place, 0)
            self._submitted[place] = count + 1
            if f"{place}-{count}" not in self._live:
                return f"{place}-{count}"

    async def _step(self) -> None:
        """One step, shared by the streams of this event loop: each sees what is finished after every one."""
        loop = asyncio.get_running_loop()
        step = self._shared_step
        if step is None or step.done() or step.get_loop() is not loop:
            self._shared_step = step = loop.run_in_executor(self._stepper, self._advance)
        await asyncio.shield(step)

    def _advance(self) -> None:
        """Run one step for everybody, or wait while there is nothing to run."""
        with self._changed.step() as free:
            if self._asleep or self._no_weights or not free:
                self._changed.wait(0.1)
                return
            if not self.backend.has_work:
                return
            for sample in self.backend.step():
                self._forget(sample)

    def _forget(self, sample: Sample) -> None:
        self._finished += 1
        sample.done = True
        group = self._live[sample.request_id]
        group.remove(sample)
        if not group:
            del self._live[sample.request_id]

    def _withdraw(self, samples: Iterable[Sample]) -> None:
        """Abort what is left of an abandoned request."""
        with self._changed:
            for sample in samples:
                if not sample.done:
                    self.backend.abort([sample])
                    self._forget(sample)

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineAsleep("the engine is asleep; call wake_up() first")
        if self._no_weights:
            raise EngineAsleep(f"{self._no_weights} and has no weights; call update_weights() first")


def _config(config: EngineConfig | Mapping[str, Any] | None, options: Mapping[str, Any]) -> EngineConfig:
    if config is not None and not isinstance(config, (EngineConfig, Mapping)):
        raise invalid("config", config, "give an EngineConfig or a mapping with its names")
    if isinstance(config, EngineConfig):
        return EngineConfig.from_dict({**config.to_dict(), **options}) if options else config
    return EngineConfig.from_dict({**(config or {}), **options})


def _device(name: str) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise invalid("device", name, "no CUDA device is usable here; use cpu, or run rollout-spec doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("device", name, f"there are {torch.cuda.device_count()} CUDA devices here")
    return device


def _text_decoder(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[list[int]], str] | None:
    if tokenizer is None:
        return None
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
